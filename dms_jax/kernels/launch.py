"""One way to launch a Triton kernel from JAX, and when that is possible.

Triton's Python front end turns a kernel into Triton IR; XLA compiles that itself, as it does for JAX's own Pallas. So a
kernel is to XLA what its own kernels are: it lies in the CUDA graphs that XLA makes of them, with no gap around it.
"""

import functools
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax.config import ConfigError, one_of

IMPLEMENTATIONS = (None, "reference", "triton")

# Scores live in the base-2 domain inside the kernels: exp2 is one instruction.
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

POINTERS = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "int32": "*i32",
    "int8": "*i8",
    "float8_e4m3fn": "*fp8e4nv",
}


def choose(implementation: str | None) -> str:
    """ "triton" or "reference". None takes triton where the default backend is a GPU and triton is installed."""
    one_of("implementation", implementation, IMPLEMENTATIONS)
    if implementation is not None:
        return implementation
    return "triton" if jax.default_backend() == "gpu" and find_spec("triton") else "reference"


def multiprocessors() -> int:
    """How many the GPU has; 132 (H100, H200) where it does not say, which only costs balance."""
    return getattr(jax.devices()[0], "core_count", None) or 132


def hopper() -> bool:
    """Whether the GPU is an H100 or its like, as also assumed where it does not say."""
    return getattr(jax.devices()[0], "compute_capability", "9.0") == "9.0"


def launch(kernel, *arrays, out: tuple, grid: tuple, aliases: dict[int, int] | None = None, **options: Any) -> tuple:
    """Runs `kernel(*arrays, *outputs, **options)` over `grid`.

    Args:
      kernel: a `triton.jit` function: pointers of inputs, pointers of outputs, then constexpr parameters.
      out: `jax.ShapeDtypeStruct` of each output.
      aliases: input index -> output index that shares its buffer. The kernel must read and write such a buffer
        through the pointer of the output.
      options: `num_warps`, `num_stages`, and the kernel's constexpr parameters.
    """
    outputs = xla_call(kernel, arrays, out, grid, aliases or {}, options)
    # Under shard_map the call does not say over which mesh axes its results vary: over all that its inputs vary over.
    axes = tuple(sorted(frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))))
    if axes:
        outputs = [jax.lax.pcast(x, axes, to="varying") for x in outputs]
    return tuple(outputs)


def xla_call(kernel, arrays: tuple, out: tuple, grid: tuple, aliases: dict[int, int], options: dict[str, Any]):
    """The outputs of a kernel as an instruction of XLA's; ConfigError without a GPU and triton."""
    if jax.default_backend() != "gpu" or not find_spec("triton"):
        raise ConfigError("implementation='triton': a GPU build of jax and triton are needed")
    dtypes = tuple(str(x.dtype) for x in (*arrays, *out))
    numbers = {f"grid_{axis}": size for axis, size in zip("xyz", (*grid, 1, 1), strict=False)}
    numbers |= {name: options[name] for name in ("num_warps", "num_stages")}
    return jax.ffi.ffi_call("__gpu$xla.gpu.triton", out, input_output_aliases=aliases)(
        *arrays,
        name=kernel.__name__,
        ir=triton_ir(kernel, dtypes, tuple(sorted(options.items()))),
        debug=False,
        **{name: np.int32(number) for name, number in numbers.items()},
    )


@functools.lru_cache(1024)
def triton_ir(kernel, dtypes: tuple[str, ...], options: tuple[tuple[str, Any], ...]) -> str:
    """A kernel in Triton IR, its helpers inlined, for pointers to `dtypes` that are aligned to 16 bytes."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import ASTSource

    constants = dict(options)
    build = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    target = GPUTarget("cuda", int(capability.replace(".", "")), 32)
    backend = CUDABackend(target)
    build = backend.parse_options(build)
    signature = {name: POINTERS[dtype] for name, dtype in zip(kernel.arg_names, dtypes, strict=False)}
    aligned = {(n,): [["tt.divisibility", 16]] for n in range(len(dtypes))}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(build), backend.get_module_map()
    module = source.make_ir(target, build, functions, modules, context)
    # Without the lines of the source, which would make another program of a kernel that only moved.
    return backend.make_ttir(module, {}, build, target.arch).str_nodebug()


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is no less than n and `least`."""
    return max(1 << max(n - 1, 0).bit_length(), least)


def unused(dtype=jnp.int32) -> jax.Array:
    """What is passed for a pointer that the chosen variant of a kernel never follows."""
    return jnp.zeros((1,), dtype)
