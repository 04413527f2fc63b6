"""Tasks whose answers are programs: which code is taken, how it is run, how hidden tests stay hidden."""

import base64
import json
import pickle
import zlib
from pathlib import Path

import pytest

from experiments import sandbox
from experiments.tasks import humaneval, livecodebench, programs
from experiments.tasks.data import DataError
from tests.helpers.prompts import Chat, asked, write_lines

# ---- programs


@pytest.mark.parametrize(
    "text, block",
    [
        ("a\n```python\nx = 1\n```\nb\n```py\nx = 2\n```\n", "x = 2\n"),
        ("```\nx\n```", "x\n"),
        ("```python\nx = 1\n```\n```python\nx = 2", "x = 1\n"),
        ("```python\nx = '```'\ny\n```", "x = '```'\ny\n"),
        ("  ```python\n  x\n  ```", "  x\n"),
        ("```python\nx\n```\nProblem: more\n```python\ny\n```", "x\n"),
        ("```python\nx\n```\n```python\n```\n```\n \n```", "x\n"),
        ("```python\n```", None),
        ("no code, `x` only", None),
        ("```python\nx = 1\n", None),
    ],
)
def test_the_last_closed_block_is_the_program(text, block):
    assert programs.last_block(text) == block


ADD = '''from typing import List


def helper(n: int) -> int:
    return n


def add(numbers: List[int]) -> int:
    """ Their sum.
    """
'''


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    test = "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n"
    row = {"task_id": "t/0", "prompt": ADD, "entry_point": "add", "test": test, "canonical_solution": "unused"}
    return humaneval.load(write_lines(tmp_path_factory.mktemp("h") / "a.jsonl", row))


WHOLE = "def add(numbers: List[int]) -> int:\n    return sum(helper(n) for n in numbers)\n"


@pytest.mark.parametrize(
    "text, outcome",
    [
        ("    return sum(numbers)\n", "passed"),
        (f"Here:\n```python\n{WHOLE}```\nIt adds.", "passed"),
        ("```python\n    return sum(numbers)\n```", "passed"),
        (f"```python\n{WHOLE}\nif __name__ == '__main__':\n    print(input())\n```", "passed"),
        ("    return 3\n", "AssertionError"),
        ("    return summ(numbers)\n", "NameError"),
        ("    return sum(numbers\n", "SyntaxError"),
        ("    import os\n    os._exit(0)\n", "exit"),
        ("    raise SystemExit\n", "exit"),
        ("    print('passed')\n    raise SystemExit\n", "exit"),
        ("    return open('/etc/passwd').read()\n", "FileNotFoundError"),
        (f"```python\n{WHOLE}", None),
    ],
)
def test_functions_are_run_against_their_test(functions, text, outcome):
    (record,) = functions.records
    assert functions.verdict(record, text) == (outcome, outcome == "passed")


def test_prompts_of_functions(functions):
    (record,) = functions.records
    assert functions.prompt(record, None) == ADD and "\ndef " in functions.stops(None)
    assert ADD.strip() in asked(functions, record) and functions.stops(Chat()) == ()


def test_programs_need_the_sandbox(functions, monkeypatch):
    functions.check()
    monkeypatch.setattr(sandbox, "check", lambda: (_ for _ in ()).throw(sandbox.SandboxError("none here")))
    with pytest.raises(sandbox.SandboxError):
        functions.check()
    with pytest.raises(sandbox.SandboxError):
        functions.verdict(functions.records[0], "    return sum(numbers)\n")


# ---- contest problems


def packed(value) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def case(given: str, right: str) -> dict:
    return {"input": given, "output": right, "testtype": "stdin"}


class Trap:
    """Runs a command where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contest")
    hidden = [case(f"{n} 2\n", f"{n + 2}.0\n") for n in range(10)]
    row = {
        "question_id": "sum", "question_content": "Add two numbers.", "contest_date": "2024-09-01T00:00:00",
        "starter_code": "", "metadata": "{}", "public_test_cases": json.dumps([case("1 2\n", "3\n")]),
        "private_test_cases": packed(json.dumps(hidden)),
    }  # fmt: skip
    starter = "class Solution:\n    def total(self, a: List[int], b: int) -> int:\n        "
    method = {
        "question_id": "total", "starter_code": starter, "metadata": json.dumps({"func_name": "total"}),
        "public_test_cases": json.dumps([case("[1, 2]\n3", "[6]")]), "private_test_cases": "[]",
    }  # fmt: skip
    trap = {"question_id": "trap", "private_test_cases": packed(Trap(folder / "sprung"))}
    old = {"question_id": "old", "contest_date": "2023-09-01T00:00:00"}
    write_lines(folder / "test.jsonl", row, {**row, **method})
    write_lines(folder / "test2.jsonl", {**row, **trap}, {**row, **old})
    return folder


def load_contest(source, release="release_v2", start="2024-08-01", end="2025-01-31"):
    return livecodebench.load(str(source), release, start, end)


def test_releases_and_dates(contest):
    assert [r.id for r in load_contest(contest).records] == ["sum", "total", "trap"]
    assert [r.id for r in load_contest(contest, "release_v1").records] == ["sum", "total"]
    assert [r.id for r in load_contest(contest, start="2023-01-01").records] == ["sum", "total", "trap", "old"]
    assert [r.id for r in load_contest(contest / "test2.jsonl").records] == ["trap"]
    assert "release_v2, contests of 2024-08-01 to 2025-01-31" in load_contest(contest).name
    with pytest.raises(DataError, match="no problems"):
        load_contest(contest, end="2024-08-31")
    with pytest.raises(DataError, match="release_v3 needs test3.jsonl"):
        load_contest(contest, "release_v3")
    with pytest.raises(DataError, match="no such file"):
        load_contest("none.jsonl")


@pytest.mark.parametrize(
    "number, program, outcome",
    [
        (0, "a, b = map(int, input().split())\nprint(a + b)", "passed"),
        (0, "import numpy as np\na, b = map(int, input().split())\nprint(np.add(a, b))", "passed"),
        (0, "a, b = map(int, input().split())\nprint(a + b if a < 9 else 0)", "wrong output"),
        (0, "print(3)", "wrong output"),
        (0, "raise KeyError(1)", "KeyError"),
        (0, "print(open('/etc/passwd').read())", "FileNotFoundError"),
        (1, "class Solution:\n    def total(self, a: List, b):\n        return [sum(a, b)]", "passed"),
        (1, "class Solution:\n    def total(self, a, b):\n        print(a)\n        return (sum(a) + b,)", "passed"),
        (1, "class Solution:\n    def total(self, a, b):\n        return sum(a) + b", "wrong output"),
        (1, "class Solution:\n    def other(self, a, b):\n        return 6", "AttributeError"),
    ],
)  # fmt: skip
def test_programs_are_run_on_hidden_tests(contest, number, program, outcome):
    task = load_contest(contest)
    verdict = task.verdict(task.records[number], f"So:\n```python\n{program}\n```\n")
    assert verdict == (outcome, outcome == "passed")


def test_a_program_that_hangs_fails(contest, monkeypatch):
    monkeypatch.setattr(livecodebench, "SECONDS", 1)
    task = load_contest(contest)
    assert task.verdict(task.records[0], "```\nwhile True: pass\n```").answer == "timeout"


def test_a_program_does_not_forge_its_results(contest):
    task = load_contest(contest)
    forged = 'import os, sys\nos.write(1, b\'[["ok", "3"]]\')\nos.kill(os.getppid(), 9)\n'
    assert not task.verdict(task.records[0], f"```\n{forged}```").correct


def test_private_tests_are_opened_in_the_sandbox_only(contest):
    task = load_contest(contest)
    with pytest.raises(DataError, match="test2.jsonl, byte 0: .*do not open"):
        task.verdict(task.records[2], "```\nprint(3)\n```")
    assert not (contest / "sprung").exists()
    pickle.loads(zlib.decompress(base64.b64decode(packed(Trap(contest / "sprung")))))
    assert (contest / "sprung").exists(), "the trap works where it is opened"
    (contest / "sprung").unlink()


def test_prompts_of_contests(contest):
    task = load_contest(contest)
    stdin, method = task.records[:2]
    assert "standard input" in asked(task, stdin) and "def total" in asked(task, method)
    assert "def total" in task.prompt(method, None) and task.prompt(stdin, None).endswith(
        "Problem: Add two numbers.\nProgram:"
    )
    assert programs.last_block(livecodebench.SHOT[1]).startswith("from math import gcd")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"contest_date": "soon"}, "no date"),
        ({"metadata": "["}, "'metadata'"),
        ({"starter_code": [1]}, "'starter_code' must be text"),
        ({"public_test_cases": None}, "public_test"),
    ],
)
def test_damaged_rows(contest, tmp_path, change, message):
    row = json.loads((contest / "test.jsonl").read_text().splitlines()[0])
    with pytest.raises(DataError, match=message):
        load_contest(write_lines(tmp_path / "a.jsonl", {**row, **change}))


@pytest.mark.parametrize(
    "output, right, same",
    [
        ("3\n", "3", True), ("3 \n4", " 3\n4\n", True), ("3.0", "3", True), ("1.50 2", "1.5 2.0", True),
        ("3 4", "3\n4", False), ("3.0001", "3", False), ("a", "A", False), ("", "3", False), ("3 a", "3 a ", True),
        ("1e400", "1e401", False), ("nan", "nan", True),
    ],
)  # fmt: skip
def test_outputs_are_compared_by_line_and_as_decimals(output, right, same):
    assert livecodebench.same_output(output, right) is same


def test_results_that_are_none():
    tests = [livecodebench.Test("1", "2")]
    for printed in ("", "7", "[[1]]", "[]", "null", "{}"):
        assert livecodebench.first_failure(printed, tests, False) == "no results"
    assert livecodebench.first_failure('[["ok", "2"]]', tests, False) is None


def test_data_is_not_held_in_memory(contest):
    assert all(len(json.dumps(record)) < 600 for record in load_contest(contest).records)
