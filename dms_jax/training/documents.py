"""Documents to train on: JSONL and parquet files, or a data set of the Hugging Face hub, as token ids.

Only what a batch needs is read: of a JSONL file the offsets of its lines are kept, parquet and hub data sets are
memory-mapped.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dms_jax.config import ConfigError, require
from dms_jax.training.config import SourceConfig

# Fields by which a data set is understood if the config names none; the first that are there count.
FIELDS = (("messages",), ("conversations",), ("problem", "solution"), ("question", "answer"))
FIELDS += (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("text",))
PROMPTS = ("problem", "question", "prompt", "instruction")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


class Documents(NamedTuple):
    """A data set as token ids. `encode(rows)` gives an int32 array for each row, none of them empty."""

    name: str
    count: int
    encode: Callable[[Sequence[int]], list[np.ndarray]]

    def __len__(self) -> int:
        return self.count


def open_documents(source: SourceConfig, tokenizer: Any) -> Documents:
    """The documents of a source, rendered by the tokenizer's chat template where they are chats and it has one.

    Raises:
      ConfigError: no such data, no field that is understood, or a row that cannot be rendered; names file and row.
    """
    require(tokenizer is not None, "tokenizer", None, f"{source.path} is text, and this model has no tokenizer")
    count, read = open_rows(source)
    require(count > 0, "data.path", source.path, "holds no documents")
    fields = _fields(source, read(0))

    def encode(rows: Sequence[int]) -> list[np.ndarray]:
        if not rows:
            return []
        texts = [_render(read(row), fields, tokenizer, f"{source.path}, row {row}") for row in rows]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for row, one in zip(rows, ids, strict=True):
            if not one:
                raise ConfigError(f"{source.path}, row {row}: is empty")
        return [np.asarray(one, np.int32) for one in ids]

    return Documents(source.path, count, encode)


def open_rows(source: SourceConfig) -> tuple[int, Callable[[int], Mapping[str, Any]]]:
    """How many rows a source has, and a function that reads one.

    Raises:
      ConfigError: no such data.
    """
    path = Path(source.path).expanduser()
    if path.suffix in (".jsonl", ".json") and path.is_file():
        return _open_jsonl(path)
    if path.suffix == ".parquet" and path.is_file():
        return _open_parquet(path)
    if path.suffix or path.exists() or source.path.count("/") != 1:
        raise ConfigError(f"data.path={source.path!r}: neither a .jsonl or .parquet file, nor a hub name")
    try:
        import datasets
    except ImportError:
        reason = "data sets of the hub need the datasets package: pip install 'dms_jax[experiments]'"
        raise ConfigError(f"data.path={source.path!r}: {reason}") from None
    try:
        rows = datasets.load_dataset(source.path, source.subset, split=source.split)
    except Exception as error:  # offline, gated, misspelt: the library raises many kinds
        reason = f"not to be had from the Hugging Face hub ({type(error).__name__}: {error})"
        raise ConfigError(f"data.path={source.path!r}: {reason}") from error
    return len(rows), rows.__getitem__


def _open_parquet(path: Path) -> tuple[int, Callable[[int], Mapping[str, Any]]]:
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, memory_map=True)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise ConfigError(f"{path}: cannot be read as parquet ({error})") from error
    return table.num_rows, lambda row: table.slice(row, 1).to_pylist()[0]


def _open_jsonl(path: Path) -> tuple[int, Callable[[int], Mapping[str, Any]]]:
    """Offsets of the lines that are not blank."""
    offsets, position = [], 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                offsets.append(position)
            position += len(line)
    starts = np.asarray(offsets, np.int64)

    def read(row: int) -> Mapping[str, Any]:
        with open(path, "rb") as file:
            file.seek(starts[row])
            try:
                value = json.loads(file.readline())
            except ValueError as error:
                raise ConfigError(f"{path}, row {row}: cannot be read as JSON ({error})") from error
        require(isinstance(value, dict), f"{path}, row {row}", type(value).__name__, "expected a JSON object")
        return value

    return len(starts), read


def prompt_of(row: Mapping[str, Any], field: str, where: str) -> str:
    """A row's prompt: the text of `field`, or of the first usual field where that is empty."""
    names = (field,) if field else PROMPTS
    found = next((row[name] for name in names if isinstance(row.get(name), str) and row[name]), None)
    if found is None:
        raise ConfigError(f"{where}: no text in {' or '.join(names)} (it has {', '.join(row)})")
    return found


def _fields(source: SourceConfig, row: Mapping[str, Any]) -> tuple[str, ...]:
    """One field (a chat or a text) or two (a prompt and its response)."""
    named = tuple(filter(None, (source.messages, source.text, source.prompt, source.response)))
    if named:
        missing = [name for name in named if name not in row]
        require(not missing, "data.path", source.path, f"has no field {', '.join(missing)} (but {', '.join(row)})")
        return named
    for names in FIELDS:
        if all(row.get(name) for name in names):
            return names
    raise ConfigError(f"data.path={source.path!r}: name its fields, none of {', '.join(row)} is understood")


def _render(row: Mapping[str, Any], fields: tuple[str, ...], tokenizer: Any, where: str) -> str:
    try:
        values = [row[name] for name in fields]
        if len(values) == 2:
            chat = [{"role": "user", "content": values[0]}, {"role": "assistant", "content": values[1]}]
        elif isinstance(values[0], str):
            return values[0] + (tokenizer.eos_token or "")
        else:
            chat = [_turn(turn) for turn in values[0]]
        if getattr(tokenizer, "chat_template", None):
            return tokenizer.apply_chat_template(chat, tokenize=False)
        return "\n".join(turn["content"] for turn in chat) + (tokenizer.eos_token or "")
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{where}: cannot be rendered ({type(error).__name__}: {error})") from error


def _turn(turn: Mapping[str, str]) -> dict[str, str]:
    if "from" in turn:
        return {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
    return {"role": turn["role"], "content": turn["content"]}
