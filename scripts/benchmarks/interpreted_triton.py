"""Runs launched kernels in Triton's interpreter, so that the whole launch is checked on a CPU.

It takes the place of XLA's call, and is as strict: arrays, each output after the inputs, constexpr parameters by name.
Outputs start as garbage (NaN, or a large number), as device memory does; an aliased output shares its input's buffer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from dms_jax.kernels import launch, triton_decode_kernels, triton_flash_kernels

TORCH_ONLY = {"bfloat16": (np.int16, torch.bfloat16), "float8_e4m3fn": (np.int8, torch.float8_e4m3fn)}


def dot_with_bfloat16(self, a, b, *rest, interpreter_dot=InterpreterBuilder.create_dot):
    """The interpreter keeps bfloat16 as its bits, and its dot multiplies those as integers: widen them first."""

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    return interpreter_dot(self, widen(a), widen(b), *rest)


InterpreterBuilder.create_dot = dot_with_bfloat16


def widened_without_ptx(pairs, FLOAT8):
    """The interpreter knows no PTX: what that of triton_decode_kernels does, in Triton."""
    low, high = ((pairs >> shift).to(tl.uint8) for shift in (0, 8))
    return tuple(x.to(tl.float8e4nv if FLOAT8 else tl.int8, bitcast=True).to(tl.float16) for x in (low, high))


triton_decode_kernels.widened = widened_without_ptx
triton_flash_kernels.exp2 = lambda x: tl.exp2(x)  # noqa: PLW0108 (tl.exp2 changes while a kernel runs)


def to_torch(array) -> torch.Tensor:
    array = np.array(array)  # a copy: the kernel may write
    if array.dtype.name in TORCH_ONLY:
        raw, dtype = TORCH_ONLY[array.dtype.name]
        return torch.from_numpy(array.view(raw)).view(dtype)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor, dtype) -> np.ndarray:
    if np.dtype(dtype).name in TORCH_ONLY:
        return tensor.view({1: torch.int8, 2: torch.int16}[tensor.element_size()]).numpy().view(dtype)
    return tensor.numpy()


def garbage(shape, dtype) -> torch.Tensor:
    if jnp.issubdtype(dtype, jnp.floating):
        return to_torch(np.full(shape, np.nan, dtype))
    return to_torch(np.full(shape, np.iinfo(dtype).max, dtype))


def run(kernel, grid, out, options, arrays, aliases) -> list[np.ndarray]:
    """Runs it on copies."""
    tensors, shared = [to_torch(x) for x in arrays], {output: source for source, output in aliases.items()}
    outputs = [tensors[shared[i]] if i in shared else garbage(x.shape, x.dtype) for i, x in enumerate(out)]
    kernel[grid](*tensors, *outputs, **options)
    return [to_numpy(tensor, spec.dtype) for tensor, spec in zip(outputs, out, strict=True)]


def call(kernel, arrays, out, grid, aliases, options):
    """As `launch.xla_call`."""
    assert all(isinstance(x, jax.Array) for x in arrays)
    for source, output in aliases.items():
        assert (arrays[source].shape, arrays[source].dtype) == (out[output].shape, out[output].dtype)
    names = kernel.arg_names[len(arrays) + len(out) :]
    assert set(options) == {*names, "num_warps", "num_stages"}, set(options) ^ {*names}
    result = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out)
    return jax.pure_callback(lambda *arrays: run(kernel, grid, out, options, arrays, aliases), result, *arrays)


def install() -> None:
    """From now on implementation="triton" runs in the interpreter; TRITON_INTERPRET must have been set before."""
    launch.xla_call = call
