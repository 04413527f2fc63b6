"""Documents to train on, as token ids: JSONL and parquet files, or a data set of the Hugging Face hub.

Only what a batch needs is read: of a JSONL file the offsets of its lines are kept, parquet files and hub data sets are
memory-mapped.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from dms_jax.config import ConfigError, in_file, require
from dms_jax.training.config import SourceConfig
from dms_jax.weights.text import check_unicode, encode_all, has_chat, rendered


class Fields(NamedTuple):
    """The fields of a row that make its document: a text, a chat (a list of turns), or a prompt and its response."""

    kind: Literal["text", "chat", "pair"]
    names: tuple[str, ...]


# Fields by which a data set is understood if the config names none; the first that are there count.
USUAL = (
    Fields("chat", ("messages",)),
    Fields("chat", ("conversations",)),
    Fields("pair", ("problem", "solution")),
    Fields("pair", ("question", "answer")),
    Fields("pair", ("prompt", "response")),
    Fields("pair", ("prompt", "completion")),
    Fields("pair", ("instruction", "output")),
    Fields("text", ("text",)),
)
PROMPTS = ("problem", "question", "prompt", "instruction")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


@runtime_checkable
class Rows(Protocol):
    """The rows of a data set, read one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Mapping[str, Any]: ...


@runtime_checkable
class Documents(Protocol):
    """A data set as token ids."""

    def __len__(self) -> int: ...

    def encode(self, rows: Sequence[int]) -> list[np.ndarray]:
        """An int32 array of ids for each of the rows, none of them empty."""
        ...


@dataclass(frozen=True, eq=False)
class JsonLines:
    """The rows of a JSONL file. starts: offsets of the lines that are not blank."""

    path: Path
    starts: np.ndarray

    @classmethod
    def open(cls, path: Path) -> "JsonLines":
        starts, position = [], 0
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    starts.append(position)
                position += len(line)
        return cls(path, np.asarray(starts, np.int64))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        with open(self.path, "rb") as file:
            file.seek(self.starts[row])
            try:
                value = json.loads(file.readline())
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{self.path}, row {row}: cannot be read as JSON ({error})") from error
        require(isinstance(value, dict), f"{self.path}, row {row}", type(value).__name__, "expected a JSON object")
        return value


@dataclass(frozen=True, eq=False)
class ParquetRows:
    """The rows of a parquet file, as a table of pyarrow."""

    table: Any

    @classmethod
    def open(cls, path: Path) -> "ParquetRows":
        from pyarrow import ArrowException, parquet

        try:
            table = parquet.read_table(path, memory_map=True)
            table.validate(full=True)  # or text that is not UTF-8 shows when its row is read
            table.slice(0, 1).to_pylist()  # and so do names of fields
            return cls(table)
        except (OSError, ValueError, ArrowException) as error:
            raise ConfigError(f"{path}: cannot be read as parquet ({error})") from error

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return self.table.slice(row, 1).to_pylist()[0]


def open_rows(source: SourceConfig) -> Rows:
    """The rows of a source.

    Raises:
      ConfigError: no such data.
    """
    path = Path(source.path).expanduser()
    if path.suffix in (".jsonl", ".json") and path.is_file():
        return JsonLines.open(path)
    if path.suffix == ".parquet" and path.is_file():
        return ParquetRows.open(path)
    if path.suffix or path.exists() or source.path.count("/") != 1:
        raise ConfigError(f"data.path={source.path!r}: neither a .jsonl or .parquet file, nor a hub name")
    try:
        import datasets
    except ImportError:
        reason = "data sets of the hub need the datasets package: pip install 'dms_jax[experiments]'"
        raise ConfigError(f"data.path={source.path!r}: {reason}") from None
    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split)
    except Exception as error:  # offline, gated, misspelt: the library raises many kinds
        reason = f"not to be had from the Hugging Face hub ({type(error).__name__}: {error})"
        raise ConfigError(f"data.path={source.path!r}: {reason}") from error


@dataclass(frozen=True, eq=False)
class RenderedDocuments:
    """The documents of a source, as text or rendered by the tokenizer's chat template where they are chats."""

    path: str
    rows: Rows
    fields: Fields
    tokenizer: Any

    def __len__(self) -> int:
        return len(self.rows)

    def encode(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Token ids of each of the rows.

        Raises:
          ConfigError: a row that cannot be read, rendered or encoded, or has no token; names file and row. (An empty
            text has one where the tokenizer has an EOS.)
        """
        if not rows:
            return []
        texts = [self.render(row) for row in rows]
        ids = encode_all(self.tokenizer, texts, begins=not self._by_template)
        for row, text, one in zip(rows, texts, ids, strict=True):
            if not text or not one:
                raise ConfigError(f"{self.path}, row {row}: is empty")
        return [np.asarray(one, np.int32) for one in ids]

    def render(self, row: int) -> str:
        """The text of a row."""
        where, end, given = f"{self.path}, row {row}", self.tokenizer.eos_token or "", self.rows[row]
        values = [_field(given, name, where) for name in self.fields.names]
        if self.fields.kind == "text":
            text = _string(values[0], f"{where}, {self.fields.names[0]}") + end
        else:
            chat = self._chat(values, where)
            text = "\n".join(turn["content"] for turn in chat) + end
            if self._by_template:
                with in_file(where):
                    text = rendered(self.tokenizer, chat)
        with in_file(where):
            check_unicode(text)
        return text

    @property
    def _by_template(self) -> bool:
        return self.fields.kind != "text" and has_chat(self.tokenizer)

    def _chat(self, values: Sequence[Any], where: str) -> list[dict[str, str]]:
        if self.fields.kind == "pair":
            turns = zip(("user", "assistant"), values, self.fields.names, strict=True)
            return [{"role": role, "content": _string(value, f"{where}, {name}")} for role, value, name in turns]
        (turns,), name = values, f"{where}, {self.fields.names[0]}"
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            raise ConfigError(f"{name}={reprlib.repr(turns)}: expected a list of turns")
        return [_turn(turn, f"{name}[{n}]") for n, turn in enumerate(turns)]


def open_documents(source: SourceConfig, tokenizer: Any) -> Documents:
    """The documents of a source.

    Raises:
      ConfigError: no such data, or no field that is understood.
    """
    require(tokenizer is not None, "tokenizer", None, f"{source.path} is text, and this model has no tokenizer")
    rows = open_rows(source)
    require(len(rows) > 0, "data.path", source.path, "holds no documents")
    return RenderedDocuments(source.path, rows, _fields(source, rows[0]), tokenizer)


def prompt_of(row: Mapping[str, Any], field: str, where: str) -> str:
    """A row's prompt: the text of `field`, or of the first usual field where that is empty."""
    names = (field,) if field else PROMPTS
    found = next((row[name] for name in names if isinstance(row.get(name), str) and row[name]), None)
    if found is None:
        raise ConfigError(f"{where}: no text in {' or '.join(names)} (it has {', '.join(row)})")
    return found


def _fields(source: SourceConfig, row: Mapping[str, Any]) -> Fields:
    """The fields that the config names, or the usual ones that the first row has."""
    named = (
        Fields("chat", (source.messages,)),
        Fields("text", (source.text,)),
        Fields("pair", (source.prompt, source.response)),
    )
    for fields in named:
        if all(fields.names):
            missing = [name for name in fields.names if name not in row]
            require(not missing, "data.path", source.path, f"has no field {', '.join(missing)} (but {', '.join(row)})")
            return fields
    for fields in USUAL:
        if all(row.get(name) for name in fields.names):
            return fields
    raise ConfigError(f"data.path={source.path!r}: name its fields, none of {', '.join(row)} is understood")


def _field(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise ConfigError(f"{where}: has no field {name} (but {', '.join(row)})")
    return row[name]


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}={reprlib.repr(value)}: expected text")
    return value


def _turn(turn: Any, where: str) -> dict[str, str]:
    """A turn as chat templates want it; ShareGPT's names are turned into theirs."""
    if not isinstance(turn, Mapping):
        raise ConfigError(f"{where}={reprlib.repr(turn)}: expected a turn with a role and its content")
    role, content = ("from", "value") if "from" in turn else ("role", "content")
    found = {name: _string(_field(turn, name, where), f"{where}.{name}") for name in (role, content)}
    return {"role": ROLES.get(found[role], found[role]), "content": found[content]}
