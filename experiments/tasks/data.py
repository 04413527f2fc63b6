"""Rows of a data set: from a local file, or from the Hugging Face hub."""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dms_jax.config import ConfigError
from dms_jax.weights.text import check_unicode

FILES = (".jsonl", ".json", ".csv", ".parquet")


class DataError(ValueError):
    """Data that is missing or not of a task's form; the message names the file and the line."""


class Record(NamedTuple):
    """A problem: its text, its right answer (empty where tests decide), and what else its task needs."""

    id: str
    problem: str
    answer: str
    more: Any = None


class Row(NamedTuple):
    """A row and where it stands, which every complaint about it names."""

    where: str
    fields: dict[str, Any]

    def text(self, *names: str) -> str:
        """The first of these fields that is there, which must be text.

        Raises:
          DataError: none of them is there, or it is no text.
        """
        value = next((self.fields[name] for name in names if self.fields.get(name) is not None), None)
        if not isinstance(value, str) or not value.strip():
            wanted = " or ".join(map(repr, names))
            raise DataError(f"{self.where}: {wanted} must be text, got {value!r} (fields: {', '.join(self.fields)})")
        return self._unicode(value)

    def identity(self, number: int, *names: str) -> str:
        """The row's name: the first of these fields that is there, or its number."""
        value = next((self.fields[name] for name in names if self.fields.get(name) is not None), number)
        return self._unicode(str(value))

    def _unicode(self, value: str) -> str:
        try:
            check_unicode(value)
        except ConfigError as error:
            raise DataError(f"{self.where}: {error}") from None
        return value


def collect(pairs: Iterable[tuple[str, Record]], source: str) -> tuple[Record, ...]:
    """The problems of a data set, in its order, each with the place where it stands.

    Raises:
      DataError: no problems, or two of the same name.
    """
    found, seen = [], {}
    for where, record in pairs:
        if record.id in seen:
            raise DataError(f"{where}: id {record.id!r} was already used by {seen[record.id]}")
        seen[record.id] = where
        found.append(record)
    if not found:
        raise DataError(f"{source}: no problems in it")
    return tuple(found)


def records(source: str, read: Callable[[Row, int], Record], split: str = "test") -> tuple[Record, ...]:
    """The problems that `read` makes of the rows of a source (see `rows`) and their numbers.

    Raises:
      DataError: data that is missing or damaged, a row that `read` refuses, or two problems of the same name.
    """
    return collect(((row.where, read(row, number)) for number, row in enumerate(rows(source, split))), source)


def rows(source: str, split: str = "test") -> Iterator[Row]:
    """The rows of a file (JSON, JSON Lines, CSV, Parquet) or of a hub data set, `org/name[/subset][:split]`.

    split: the one that is read where the source names none and there are several.
    Raises:
      DataError: a file or data set that is missing, damaged, or has a row that is no object.
    """
    path = Path(source)
    pairs = _local(path) if path.suffix in FILES or path.is_file() else _hub(source, split)
    for where, fields in pairs:
        if not isinstance(fields, dict):
            raise DataError(f"{where}: expected an object with named fields, got {type(fields).__name__}")
        yield Row(where, fields)


def _local(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix == ".csv":
        yield from _csv(path)
    elif path.suffix == ".json" and path.read_bytes().lstrip()[:1] == b"[":
        try:
            listed = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON ({error})") from None
        yield from ((f"{path}[{number}]", fields) for number, fields in enumerate(listed))
    else:
        yield from ((where, fields) for where, _, fields in json_lines(path))


def json_lines(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Where each line of a file stands, the byte at which it begins, and its content."""
    offset = 0
    with path.open("rb") as lines:  # decoded line by line, so that a bad byte is reported with its line
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"{path}:{number}", offset, json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError alike
                    raise DataError(f"{path}:{number}: not a line of JSON ({error})") from None
            offset += len(line)


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets put a byte order mark first
            reader = csv.DictReader(file)
            for fields in reader:
                if None in fields:  # an unquoted comma, say, which moves the answer to another column
                    raise DataError(f"{path}:{reader.line_num}: has more cells than the table has columns")
                yield f"{path}:{reader.line_num}", fields
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a table ({error})") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
        table.validate(full=True)
        listed = table.to_pylist()
    except (OSError, ValueError, ArrowException) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error})") from error
    yield from ((f"{path}[{number}]", fields) for number, fields in enumerate(listed))


def _hub(source: str, split: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        reason = "data sets of the hub need the datasets package: pip install 'dms_jax[experiments]'"
        raise DataError(f"{source}: no such file, and {reason}") from None
    name, _, named = source.partition(":")
    owner, _, rest = name.partition("/")
    repository, _, subset = rest.partition("/")
    try:
        data = datasets.load_dataset(f"{owner}/{repository}" if rest else owner, subset or None)
    except Exception as error:  # datasets raises many kinds; the message is what helps
        raise DataError(f"{name}: no such file, and no data set that can be loaded: {error}") from error
    splits = list(data)
    chosen = named or (splits[0] if len(splits) == 1 else split)
    if chosen not in splits:
        raise DataError(f"{name}: choose a split, as in {name}:{splits[0]} (it has {', '.join(splits)})")
    yield from ((f"{name}:{chosen}[{number}]", fields) for number, fields in enumerate(data[chosen]))
