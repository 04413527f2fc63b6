"""Named tensors in files, read a few rows at a time, and the safetensors format in both directions.

Whole-file memory maps are avoided on purpose: touched pages of a mapped file count as this process's memory,
so a float32 file turned into bfloat16 parameters would cost three times the parameters. Here a tensor costs
its final size plus one piece.

Format: 8 bytes (little-endian length of the header), the header in JSON, the bytes of the tensors.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

PIECE = 8 << 20  # bytes read at a time
MAX_HEADER = 100 << 20  # what the safetensors library accepts

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

    def pieces(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """`(start, stop, rows[start:stop])` until all rows are read."""
        rows, columns = self.matrix
        step = max(1, PIECE // max(1, 4 * columns))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield start, stop, self.read(start, stop)


def read_bytes(file: Path, offset: int, size: int, name: str) -> bytearray:
    """Exactly `size` bytes at `offset`, or a WeightError that names the tensor and the file."""
    buffer = bytearray(size)
    with open(file, "rb", buffering=0) as stream:
        stream.seek(offset)
        done = 0
        while done < size:
            count = stream.readinto(memoryview(buffer)[done:])
            if not count:
                raise WeightError(f"{file}: truncated inside tensor {name}")
            done += count
    return buffer


def _header(file: Path) -> tuple[dict, int]:
    """The JSON header of a safetensors file and the offset of its data."""
    with open(file, "rb") as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= MAX_HEADER:
            raise WeightError(f"{file}: not a safetensors file, or truncated in its header")
        text = stream.read(length)
    if len(text) < length:
        raise WeightError(f"{file}: truncated in its header")
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, file))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightError(f"{file}: damaged header ({error})") from error
    if not isinstance(header, dict):
        raise WeightError(f"{file}: damaged header (not a JSON object)")
    return header, 8 + length


def _unique(pairs: list[tuple[str, object]], file: Path) -> dict:
    seen = {}
    for key, value in pairs:
        if key in seen:
            raise WeightError(f"{file}: tensor {key} appears twice")
        seen[key] = value
    return seen


def open_safetensors(file: Path) -> tuple[dict[str, Source], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata. Reads the header only."""
    file = Path(file)
    header, start = _header(file)
    metadata = header.pop("__metadata__", {})
    available = file.stat().st_size - start
    sources, end = {}, 0
    for name, entry in header.items():
        sources[name] = _source(file, name, entry, start, available)
        end = max(end, entry["data_offsets"][1])
    if available > end:
        raise WeightError(f"{file}: {available - end} bytes after the last tensor, the file is damaged")
    return sources, metadata


def _source(file: Path, name: str, entry: dict, start: int, available: int) -> Source:
    """One entry of the header as a Source, checked against the size of the file."""
    try:
        code, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise WeightError(f"{file}: damaged header entry for tensor {name}") from error
    if code not in DTYPES:
        raise WeightError(f"{file}: tensor {name} has dtype {code}, expected one of {', '.join(DTYPES)}")
    dtype = DTYPES[code]
    if last - first != math.prod(shape) * dtype.itemsize or first < 0:
        raise WeightError(f"{file}: tensor {name} of shape {shape} does not fill bytes {first} to {last}")
    if last > available:
        raise WeightError(f"{file}: truncated, tensor {name} ends {last - available} bytes past the end")
    columns = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    row = columns * dtype.itemsize

    def read(begin: int, stop: int) -> np.ndarray:
        data = read_bytes(file, start + first + begin * row, (stop - begin) * row, name)
        return np.frombuffer(data, dtype).reshape(-1, columns)

    return Source(name, shape, file, read)


class Saved(NamedTuple):
    """A tensor to be written: its shape and dtype in the file, and its rows in order, a piece at a time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[np.ndarray]]


def write_safetensors(file: Path, tensors: Mapping[str, Saved], metadata: Mapping[str, str]) -> None:
    """Writes the file in place of an old one only once every byte is on disk."""
    header, offset = {"__metadata__": dict(metadata)}, 0
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

    replace(file, write)


def replace(file: Path, write: Callable) -> None:
    """Runs `write(stream)` on a new file beside `file` and renames it: an interruption leaves the old one."""
    file = Path(file)
    new = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        with open(new, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)
