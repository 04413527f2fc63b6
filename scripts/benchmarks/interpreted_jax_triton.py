"""A stand-in for jax_triton that runs kernels in Triton's interpreter, so that the whole launch is checked on a CPU.

It takes what jax-triton's `triton_call` takes, of version 0.3 (`out_shape`) or 0.4 (`out_type`), and is as strict:
arrays and plain integers, each output after the inputs, constexpr parameters by name. Outputs start as garbage (NaN,
or a large number), as device memory does; an aliased output shares its input's buffer, in the way of each version.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from dms_jax.kernels import triton_decode_kernels

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


def run(kernel, inputs: int, grid, out, options, arrays, shared) -> list[np.ndarray]:
    """Runs it on copies; `shared`: output index -> index of the array whose buffer it is."""
    tensors = [x if isinstance(x, int) else to_torch(x) for x in arrays]
    outputs = [tensors[shared[i]] if i in shared else garbage(x.shape, x.dtype) for i, x in enumerate(out)]
    kernel[grid](*tensors[:inputs], *outputs, **options)
    return [to_numpy(tensor, spec.dtype) for tensor, spec in zip(outputs, out, strict=True)]


def call(arrays, inputs: int, kernel, grid, out, options, shared):
    """`arrays`: the inputs that the kernel gets under their own names, then buffers that it gets as outputs."""
    traced = [x for x in arrays if not isinstance(x, int)]
    assert all(isinstance(x, jax.Array) for x in traced)
    for output, source in shared.items():
        assert (arrays[source].shape, arrays[source].dtype) == (out[output].shape, out[output].dtype)
    names = kernel.arg_names[inputs + len(out) :]
    assert set(options) == {*names, "num_warps", "num_stages"}, set(options) ^ {*names}
    result = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out)

    def on_host(*traced):
        values = iter(traced)
        given = [x if isinstance(x, int) else next(values) for x in arrays]
        return run(kernel, inputs, grid, out, options, given, shared)

    return list(jax.pure_callback(on_host, result, *traced))


def triton_call_03(*arrays, kernel, out_shape, grid, input_output_aliases=None, **options):
    """An aliased output is an argument like every output."""
    shared = {output: source for source, output in (input_output_aliases or {}).items()}
    return call(arrays, len(arrays), kernel, grid, out_shape, options, shared)


def triton_call_04(*arrays, kernel, out_type, grid, input_output_aliases=None, **options):
    """An aliased output is an input: it is given by keyword in the output's place, and counted after the others."""
    inputs = len(arrays)
    outputs = kernel.arg_names[inputs : inputs + len(out_type)]
    given = [name for name in outputs if name in options]
    arrays += tuple(options.pop(name) for name in given)
    shared = {output: source for source, output in (input_output_aliases or {}).items()}
    assert [outputs[output] for output in sorted(shared)] == given
    assert sorted(shared.values()) == list(range(inputs, len(arrays)))
    return call(arrays, inputs, kernel, grid, out_type, options, shared)


def module(version: str = "0.3") -> types.ModuleType:
    """To be put into sys.modules under the name jax_triton."""
    stand_in = types.ModuleType("jax_triton")
    stand_in.triton_call = {"0.3": triton_call_03, "0.4": triton_call_04}[version]
    return stand_in


def install(version: str = "0.3") -> None:
    """From now on implementation="triton" runs in the interpreter; TRITON_INTERPRET must have been set before."""
    import sys

    sys.modules["jax_triton"] = module(version)
