"""Tasks: how data is read and refused, how prompts are written, how letters are read."""

import json
import sys

import pytest

from experiments.tasks import aime, base, gpqa, gsm8k, math500, mini
from experiments.tasks.data import DataError, Record, Row
from tests.helpers.prompts import Chat, asked, write_lines

# ---- data


def test_jsonl_is_read(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        {"id": "x-1", "problem": "One?", "expected_answer": "1", "answer": "ignored"},
        "",
        {"problem": "Two?", "answer": 204},
    )
    assert aime.load(path).records == (Record("x-1", "One?", "1"), Record("1", "Two?", "204"))


def test_other_files_hold_the_same(tmp_path):
    rows = [
        {"id": "x", "problem": "One, or two?", "answer": "1"},
        {"id": "y", "problem": "Two\nlines", "answer": r"\frac12"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.csv").write_text('id,problem,answer\nx,"One, or two?",1\ny,"Two\nlines",\\frac12\n')
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    wanted = (Record("x", "One, or two?", "1"), Record("y", "Two\nlines", r"\frac12"))
    for suffix in ("json", "csv", "parquet"):
        assert math500.load(str(tmp_path / f"a.{suffix}")).records == wanted
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes())
    assert math500.load(str(tmp_path / "a.csv")).records == wanted
    (tmp_path / "a.csv").write_text("id,problem,answer\nx,One, or two?,1\n")
    with pytest.raises(DataError, match="a.csv:2: has more cells than the table has columns"):
        math500.load(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    "bad, message",
    [
        ("{not json", "not a line of JSON"),
        ("[" * 100_000, "not a line of JSON"),
        ("[1]", "expected an object"),
        ({"answer": "1"}, "'problem' or 'question' must be text"),
        ({"problem": " ", "answer": "1"}, "'problem' or 'question' must be text"),
        ({"problem": "p"}, "no answer in 'expected_answer' or 'answer'"),
        ({"problem": "p", "answer": " "}, "no answer"),
        ({"problem": "p", "answer": [1]}, "must be text or a number"),
        ({"problem": "p", "answer": True}, "must be text or a number"),
        ('{"problem": "p", "answer": NaN}', "the answer 'nan' cannot be read"),
        ({"problem": "p", "answer": "None"}, "the answer 'None' cannot be read"),
        ({"problem": "p", "answer": "#### 7"}, "the answer '#### 7' cannot be read"),
        ({"problem": "p", "answer": "1", "id": "same"}, "already used"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, bad, message):
    path = write_lines(tmp_path / "bad.jsonl", {"problem": "p", "answer": "1", "id": "same"}, "", bad)
    with pytest.raises(DataError, match=message) as error:
        aime.load(path)
    assert str(error.value).startswith(f"{path}:3: ")


def test_missing_empty_and_damaged_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        aime.load(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="no problems"):
        aime.load(str(tmp_path / "empty.jsonl"))
    for name in ("a.parquet", "a.json", "a.csv"):
        (tmp_path / name).write_bytes(b"[\xff\x00")
        with pytest.raises(DataError, match=name):
            aime.load(str(tmp_path / name))


class Hub:
    """A stand-in for the datasets library."""

    def __init__(self, splits):
        self.splits, self.asked = splits, []

    def load_dataset(self, name, subset):
        self.asked.append((name, subset))
        if name.startswith("no/"):
            raise RuntimeError("offline")
        return self.splits


def test_hub_data_sets(monkeypatch):
    rows = [{"problem": "One?", "answer": "1"}]
    hub = Hub({"train": [], "test": rows})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert len(aime.load("org/name").records) == 1 == len(aime.load("org/name/part:test").records)
    assert hub.asked == [("org/name", None), ("org/name", "part")]
    with pytest.raises(DataError, match="org/name:train: no problems"):
        aime.load("org/name:train")
    with pytest.raises(DataError, match="choose a split, as in org/name:train"):
        aime.load("org/name:other")
    with pytest.raises(DataError, match="no/thing: no such file, and no data set .*offline"):
        aime.load("no/thing")
    for name, source in aime.HUB.items():
        aime.load(name)
        assert hub.asked[-1] == (source, None)
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    with pytest.raises(DataError, match=r"dms_jax\[experiments\]"):
        aime.load("org/name")


def test_gsm8k_answers_stand_behind_the_mark(tmp_path):
    row = {"question": "How many?", "answer": "6 * 3 = <<6*3=18>>18\n#### 1,018"}
    (record,) = gsm8k.load(write_lines(tmp_path / "a.jsonl", row)).records
    assert record == ("0", "How many?", "1,018", None)
    for answer, message in (("18", "no '#### number'"), ("#### ", "cannot be read"), ("#### ?", "cannot be read")):
        with pytest.raises(DataError, match=message):
            gsm8k.load(write_lines(tmp_path / "b.jsonl", {**row, "answer": answer}))


def test_mini_problems_are_held_out_distinct_and_a_prefix_of_more():
    few, many = aime.mini_task(5).records, aime.mini_task(20).records
    assert few == many[:5]
    assert len({r.problem for r in many}) == 20
    assert all(mini.split_of(r.problem) == "test" for r in many)


# ---- prompts


def boxed_tasks():
    record = Record("0", "How many?\n", "7")
    return [math500.MathTask("m", (record,)), gsm8k.Gsm8kTask("g", (record,))]


@pytest.mark.parametrize("task", boxed_tasks(), ids=lambda task: type(task).__name__)
def test_a_chat_is_asked_and_a_text_is_continued(task):
    (record,) = task.records
    assert asked(task, record) == f"How many?\n{base.INSTRUCTION}" and task.stops(Chat()) == ()
    plain, (stop,) = task.prompt(record, None), task.stops(None)
    question, answer = task.headings
    assert plain.endswith(f"\n\n{question}: How many?\n{answer}:") and plain.count(stop) == len(task.shots) > 2
    for shown, solution in task.shots:  # each example shows what the judge reads, and stops where it should
        assert stop not in f"\n{solution}" and f"{question}: {shown}\n{answer}: {solution}\n\n" in plain
        assert task.verdict(record, solution).answer is not None


def test_worked_examples_are_right():
    answers = {"rolls": "27", "Nina": "155", "ticket": "28", "tank": "30", "even": "420", "3x": "144", "coin": "3/8"}
    shots = [*gsm8k.SHOTS, *math500.SHOTS]
    for word, answer in answers.items():
        (solution,) = [
            given for question, given in shots if word in question and (word != "pages" or "Nina" in question)
        ]
        assert base.judge(solution, answer).correct, word
    assert base.judge(shots[-1][1], r"2\sqrt{10}").correct


# ---- letters


def diamond(**changes):
    wrong = {f"Incorrect Answer {n}": f"wrong {n}\n" for n in (1, 2, 3)}
    return {"Record ID": "rec1", "Question": "Which?\n", "Correct Answer": "right ", **wrong, **changes}


def test_options_stand_in_an_order_of_their_own(tmp_path):
    rows = [diamond(**{"Record ID": f"rec{n}"}) for n in range(40)]
    task = gpqa.load(write_lines(tmp_path / "a.jsonl", *rows))
    assert task.records == gpqa.load(write_lines(tmp_path / "b.jsonl", *reversed(rows))).records[::-1]
    assert {record.answer for record in task.records} == set("ABCD")
    for record in task.records:
        question, *options = record.problem.splitlines()
        assert question == "Which?" and options["ABCD".index(record.answer)] == f"{record.answer}) right"
        assert sorted(option[3:] for option in options) == ["right", "wrong 1", "wrong 2", "wrong 3"]
    record = task.records[0]
    assert asked(task, record).startswith(record.problem) and "Answer: X" in asked(task, record)
    assert task.prompt(record, None).endswith(f"{record.problem}\nReasoning:")
    assert [gpqa.letter_of(solution) for _, solution in gpqa.SHOTS] == ["B", "D"]
    with pytest.raises(DataError, match="'Incorrect Answer 2' must be text"):
        gpqa.load(write_lines(tmp_path / "c.jsonl", diamond(**{"Incorrect Answer 2": None})))


@pytest.mark.parametrize(
    "text, letter",
    [
        ("so it is B.\nAnswer: C", "C"),
        ("Answer: A? No.\n**Answer: (D)**", "D"),
        ("The answer is $\\boxed{\\text{B}}$.", "B"),
        ("Hence \\boxed{C}.", "C"),
        ("Hence \\boxed{\\textbf{(A)}}", "A"),
        ("answer: d", "D"),
        ("Is the answer (b)? It is.", None),
        ("**Answer:** B", "B"),
        ("The correct answer is: C", "C"),
        ("Answer: $\\mathbf{B}$", "B"),
        ("Answer: A? No.\n\nAnswer: \\boxed{\\text{C}}", "C"),
        ("The answer is a mixture.\nHence \\boxed{C}", "C"),
        ("The answer is (b) here", "B"),
        ("Answer: A\n\nQuestion: another\nAnswer: B", "A"),
        ("Answer: Because it is", None),
        ("Answer: E", None),
        ("I choose B", None),
        ("\\boxed{Carbon}", None),
    ],
)
def test_letters(text, letter):
    assert gpqa.letter_of(text) == letter
    assert gpqa.GpqaTask("g", ()).verdict(Record("0", "", "C"), text) == (letter, letter == "C")


def test_a_row_without_a_name_is_called_by_its_number():
    assert Row("x:1", {}).identity(3, "id") == "3" and Row("x:1", {"id": 0}).identity(3, "id") == "0"
