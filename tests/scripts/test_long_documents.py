"""Long documents out of short ones: what is in them, what is left out, and which files are refused by name."""

import json
import re

import pytest

from dms_jax.config import ConfigError
from experiments.tasks.data import DataError
from scripts.long_documents import Settings, main


def documents(tmp_path, **options) -> list[dict]:
    main(Settings(out=tmp_path / "long.jsonl", **options))
    return [json.loads(line) for line in (tmp_path / "long.jsonl").read_text().split("\n")[:-1]]


def test_chats_and_passages(tmp_path):
    """A problem with a line separator in it is one row; the last fifth of a text is left out."""
    file, text = tmp_path / "rows.jsonl", tmp_path / "text.txt"
    math = [{"problem": f"p\u2028{n}" + "x" * 20, "solution": f"s{n}", "answer": "0"} for n in range(4)]
    grade = [{"question": f"q{n}" + "x" * 20, "answer": f"a{n}"} for n in range(4)]
    lines = [json.dumps(row, ensure_ascii=False) for row in math + grade]
    file.write_text("\n\n".join(lines), encoding="utf-8")
    text.write_text("0123456789" * 10)
    made = documents(tmp_path, problems=(file,), texts=(text,), characters=72, bare=True)
    assert sorted(row["text"] for row in made if "text" in row) == ["0123456789" * 7 + "01", "23456789"]
    turns = [turn["content"] for row in made if "messages" in row for turn in row["messages"]]
    pairs = {(row.get("problem", row.get("question")), row.get("solution", row["answer"])) for row in math + grade}
    assert set(zip(turns[::2], turns[1::2], strict=True)) <= pairs
    assert all(len(row["messages"]) == 6 for row in made if "messages" in row) and len(turns) == 12


@pytest.mark.parametrize(
    "content, option, error, message",
    [
        ("no JSON", "problems", DataError, "rows.jsonl:1: not a line of JSON"),
        ('{"problem": "p", "answer": "a"}', "problems", DataError, "rows.jsonl:1: 'solution' must be text"),
        ('{"problem": "p", "solution": 1}', "problems", DataError, "rows.jsonl:1: 'solution' must be text"),
        ('{"problem": "p", "solution": "s"}', "problems", ConfigError, "characters=4000: more than"),
        ("", "texts", ConfigError, "texts=.*the file is empty"),
    ],
)
def test_what_is_refused(tmp_path, content, option, error, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)

    with pytest.raises(error, match=message):
        documents(tmp_path, **{option: (file,)})


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'no.jsonl'}: no such file")):
        documents(tmp_path, problems=(tmp_path / "no.jsonl",))
