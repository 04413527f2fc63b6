"""AIME 2024 and data sets of its form: from a JSONL file or from the Hugging Face hub.

Fields: `problem`; `expected_answer` or `answer`; `id` if there is one (the row number otherwise).
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.tasks import mini
from experiments.tasks.base import Record, Task

AIME_2024 = "HuggingFaceH4/aime_2024"
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
ANSWER_FIELDS = ("expected_answer", "answer")
MINI_SEED = "experiments.aime"  # no training or validation script draws from this stream


class DataError(ValueError):
    """Data that is missing or not of AIME's form; the message names the file and the line."""


def load(source: str) -> list[Record]:
    """Records of a JSONL file, or of a hub data set (`org/name`, or `org/name:split`).

    Raises:
      DataError: a file or data set that is missing, empty, or has a bad row.
    """
    if Path(source).suffix in (".jsonl", ".json") or Path(source).is_file():
        rows = _read_jsonl(Path(source))
    else:
        rows = _read_hub(source)
    records, seen = [], {}
    for where, row in rows:
        record = _record(where, row, len(records))
        if record.id in seen:
            raise DataError(f"{where}: id {record.id!r} was already used by {seen[record.id]}")
        seen[record.id] = where
        records.append(record)
    if not records:
        raise DataError(f"{source}: no problems in it")
    return records


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as lines:  # decoded line by line, so that a bad byte is reported with its line
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            if line.strip():
                try:
                    yield where, json.loads(line.decode("utf-8"))
                except ValueError as error:  # JSONDecodeError and UnicodeDecodeError alike
                    raise DataError(f"{where}: not a line of JSON ({error})") from None


def _read_hub(source: str) -> Iterator[tuple[str, Any]]:
    import datasets

    name, _, split = source.partition(":")
    try:
        data = datasets.load_dataset(name)
    except Exception as error:  # datasets raises many kinds; the message is what helps
        raise DataError(f"{name}: no such file, and no data set that can be loaded: {error}") from error
    splits = list(data)
    split = split or (splits[0] if len(splits) == 1 else "test")
    if split not in splits:
        raise DataError(f"{name}: choose a split, as in {name}:{splits[0]} (it has {', '.join(splits)})")
    for number, row in enumerate(data[split]):
        yield f"{name}:{split}[{number}]", row


def _record(where: str, row: Any, number: int) -> Record:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with 'problem' and 'answer', got {type(row).__name__}")
    problem = row.get("problem")
    if not isinstance(problem, str) or not problem.strip():
        raise DataError(f"{where}: 'problem' must be text, got {problem!r} (fields: {', '.join(row)})")
    answers = [row[field] for field in ANSWER_FIELDS if row.get(field) is not None]
    if not answers or isinstance(answers[0], bool) or not str(answers[0]).strip():
        raise DataError(f"{where}: no answer in {' or '.join(map(repr, ANSWER_FIELDS))}")
    if not isinstance(answers[0], str | int | float):
        raise DataError(f"{where}: the answer must be text or a number, got {answers[0]!r}")
    identity = row.get("id")
    return Record(str(number if identity is None else identity), problem, str(answers[0]).strip())


def prompt(record: Record, tokenizer) -> str | list[int]:
    """The problem with the instruction: a chat turn where the tokenizer knows how, plain text otherwise."""
    request = f"{record.problem.strip()}\n{INSTRUCTION}"
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": request}]
        return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"])
    return f"Problem: {request}\nSolution:"


def task(source: str) -> Task:
    """The problems of a file or a hub data set."""
    return Task(source, load(source), prompt)


def mini_problems(count: int) -> list[mini.Problem]:
    """The first `count` held-out problems of the miniature reasoning task, no prompt twice."""
    seen: set[str] = set()
    drawn = mini.problems("test", MINI_SEED)
    fresh = (p for p in drawn if not (p.problem in seen or seen.add(p.problem)))
    return list(itertools.islice(fresh, count))


def mini_task(count: int) -> Task:
    """`mini_problems` as a task."""
    records = [Record(f"mini-{n}", p.problem, p.answer) for n, p in enumerate(mini_problems(count))]
    return Task("mini", records, lambda record, tokenizer: record.problem)
