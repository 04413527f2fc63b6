"""One way to launch a Triton kernel from JAX for every version of jax-triton, and when that is possible."""

import inspect
import os
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from dms_jax.config import ConfigError, one_of

IMPLEMENTATIONS = (None, "reference", "triton")

# Scores live in the base-2 domain inside the kernels: exp2 is one instruction.
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


def jax_triton():
    """The module jax_triton; ConfigError where it cannot be had (its import raises without a GPU build of jax)."""
    cache_dir = os.environ.get("TRITON_CACHE_DIR")
    try:
        import jax_triton  # pyright: ignore[reportMissingImports]  an extra, for GPUs
    except (ImportError, ValueError) as error:
        raise ConfigError(f"implementation='triton': jax-triton and a GPU build of jax are needed ({error})") from error
    finally:
        # jax-triton 0.3 empties this variable on import, which breaks the disk cache of Triton's other users (torch).
        if os.environ.get("TRITON_CACHE_DIR") == "":
            del os.environ["TRITON_CACHE_DIR"]
        if cache_dir:
            os.environ["TRITON_CACHE_DIR"] = cache_dir
    return jax_triton


def choose(implementation: str | None) -> str:
    """ "triton" or "reference". None takes triton where the default backend is a GPU and jax-triton is installed."""
    one_of("implementation", implementation, IMPLEMENTATIONS)
    if implementation is not None:
        return implementation
    if jax.default_backend() != "gpu":
        return "reference"
    try:
        jax_triton()
    except ConfigError:
        return "reference"
    return "triton"


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
      arrays: the inputs; plain integers may follow, for parameters that change from call to call of one program.
      out: `jax.ShapeDtypeStruct` of each output.
      aliases: input index -> output index that shares its buffer. The kernel must read and write such a buffer
        through the pointer of the output: the other one may point nowhere.
      options: `num_warps`, `num_stages`, and the kernel's constexpr parameters.
    """
    call = jax_triton().triton_call
    arguments = {"kernel": kernel, "grid": grid, **options}
    if "out_type" in inspect.signature(call).parameters:
        outputs = _launch_04(call, arrays, out, aliases or {}, arguments)
    else:
        outputs = call(*arrays, out_shape=out, input_output_aliases=aliases or {}, **arguments)
    # Under shard_map the call does not say over which mesh axes its results vary: over all that its inputs vary over.
    axes = tuple(
        sorted(frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays if not isinstance(x, int))))
    )
    if axes:
        outputs = [jax.lax.pcast(x, axes, to="varying") for x in outputs]
    return tuple(outputs)


def _launch_04(call, arrays: tuple, out: tuple, aliases: dict[int, int], arguments: dict[str, Any]):
    """jax-triton 0.4, where an aliased output is no argument of its own: its input takes the place of the output."""
    inputs, moved = list(arrays), {}
    places = sorted(aliases, key=aliases.__getitem__)
    for source in places:
        moved[arguments["kernel"].arg_names[len(arrays) + aliases[source]]] = arrays[source]
        inputs[source] = unused(arrays[source].dtype)
    renumbered = {len(arrays) + n: aliases[source] for n, source in enumerate(places)}
    with warnings.catch_warnings():
        # It would rather have mutable references, which 0.3 does not know.
        warnings.filterwarnings("ignore", "input_output_aliases is deprecated", DeprecationWarning)
        return call(*inputs, out_type=out, input_output_aliases=renumbered, **moved, **arguments)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is no less than n and `least`."""
    return max(1 << max(n - 1, 0).bit_length(), least)


def unused(dtype=jnp.int32) -> jax.Array:
    """What is passed for a pointer that the chosen variant of a kernel never follows."""
    return jnp.zeros((1,), dtype)
