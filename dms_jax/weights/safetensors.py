"""Named tensors in files, read and written a few rows at a time: the safetensors format in both directions.

Reading goes through the safetensors library, which maps a file. Touched pages of a mapped file count as this
process's memory, so a float32 file turned into bfloat16 parameters would cost three times the parameters; it is
therefore mapped anew for each piece, and a tensor costs its final size plus one piece. Writing is ours: the library
wants every tensor of the file in memory, in the layout of the file.

Format: 8 bytes (little-endian length of the header), the header in JSON, the bytes of the tensors.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from dms_jax.files import write_atomically

PIECE = 8 << 20  # bytes read at a time

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class WeightError(ValueError):
    """Weights that are missing, unexpected, duplicate, misshaped or damaged; names the tensor or the file."""


class Source(NamedTuple):
    """A tensor in a file. `read(start, stop)` gives rows `[stop - start, columns]`, a vector being one."""

    name: str
    shape: tuple[int, ...]
    file: Path
    read: Callable[[int, int], np.ndarray]

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape as rows and columns."""
        if len(self.shape) < 2:
            return 1, math.prod(self.shape)
        return self.shape[0], math.prod(self.shape[1:])

    def pieces(self) -> list[tuple[int, int]]:
        """`(start, stop)` of the rows to read at a time."""
        rows, columns = self.matrix
        step = max(1, PIECE // max(1, 4 * columns))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def open_safetensors(file: Path) -> tuple[dict[str, Source], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata. Reads the header only, which the library checks."""
    with _opened(file) as opened:
        tensors = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        sources = {name: _source(file, name, tensor) for name, tensor in tensors.items()}
        return sources, opened.metadata() or {}


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The library's view of a file, mapped for as long as the context lasts; its errors as a WeightError."""
    if not file.is_file():
        raise WeightError(f"{file}: no such file, or no regular one")
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            yield opened
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightError(f"{file}: truncated, damaged or no safetensors file ({error})") from error


def _source(file: Path, name: str, tensor: Any) -> Source:
    code, shape = tensor.get_dtype(), tuple(tensor.get_shape())
    if code not in DTYPES:
        raise WeightError(f"{file}: tensor {name} has dtype {code}, expected one of {', '.join(DTYPES)}")

    def read(start: int, stop: int) -> np.ndarray:
        with _opened(file) as opened:
            if len(shape) < 2:
                return opened.get_tensor(name).reshape(1, -1)
            return opened.get_slice(name)[start:stop].reshape(stop - start, -1)

    return Source(name, shape, file, read)


class Saved(NamedTuple):
    """A tensor to be written: its shape and dtype in the file, and its rows in order, a piece at a time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[np.ndarray]]


def write_safetensors(file: Path, tensors: Mapping[str, Saved], metadata: Mapping[str, str]) -> None:
    """Writes the file in place of an old one only once every byte is on disk."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        code = CODES[tensor.dtype]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8

    def write(stream):
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in tensors.values():
            for piece in tensor.pieces():
                stream.write(np.ascontiguousarray(piece).view(np.uint8).data)

    write_atomically(file, write)
