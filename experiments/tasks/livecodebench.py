"""LiveCodeBench, code generation: contest problems with hidden tests, by release and by date of the contest.

A program passes if its output is right on every public and private test, 6 seconds each. Private tests are pickles:
they are opened in the sandbox only. Rows are read from their file when they are needed, since tests are large.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import ClassVar, NamedTuple

from dms_jax.config import ConfigError
from experiments import sandbox
from experiments.tasks import programs
from experiments.tasks.base import Record, Row
from experiments.tasks.data import DataError, collect, json_lines

HUB = "livecodebench/code_generation_lite"
FILES = ("test.jsonl", "test2.jsonl", "test3.jsonl", "test4.jsonl", "test5.jsonl", "test6.jsonl")
RELEASES = tuple(f"release_v{n}" for n in range(1, len(FILES) + 1))
SECONDS = 6  # a test
AT_ONCE = 8  # tests in one sandbox
LIMITS = sandbox.Limits(
    seconds=AT_ONCE * (SECONDS + 1), cpu_seconds=2 * SECONDS, memory=2 << 30, file_bytes=64 << 20, home_bytes=256 << 20
)
UNPACK = sandbox.Limits(seconds=60, cpu_seconds=60, memory=4 << 30, file_bytes=1 << 30)
HEADINGS = ("Problem", "Program")
SHOT = (
    "Read two integers a and b from one line of the standard input, and print their greatest common divisor.",
    "\n```python\nfrom math import gcd\n\na, b = map(int, input().split())\nprint(gcd(a, b))\n```",
)


class Place(NamedTuple):
    """Where a row stands: the byte of a file at which its line begins. function: what tests call, None for stdin."""

    path: str
    offset: int
    function: str | None
    starter: str


class Test(NamedTuple):
    """What a program is given, and the right output."""

    input: str
    output: str


@dataclasses.dataclass(frozen=True)
class LiveCodeBenchTask(programs.ProgramTask):
    """Contest problems; `more` of a record is its `Place`."""

    form: ClassVar = (
        "zero-shot in a chat, else one worked example; the code of the last fenced block, run in a sandbox on all "
        f"public and private tests, {SECONDS} seconds each; output compared by line, numbers as decimals"
    )
    headings: ClassVar = HEADINGS
    shots: ClassVar = (SHOT,)

    def request(self, record: Record) -> str:
        """What is asked in a chat."""
        if record.more.starter.strip():
            how = f"Complete this code, which the tests call.\n\n```python\n{record.more.starter}\n```"
        else:
            how = "The program reads from the standard input and writes to the standard output."
        return (
            f"Solve this problem with a Python program. Reason first, and end with the whole program in one fenced "
            f"block that begins with ```python.\n\n{record.problem.strip()}\n\n{how}"
        )

    def few_shot(self, record: Record) -> str:
        """A worked example, and the problem with its starter code."""
        starter = record.more.starter.strip()
        asked = record.problem if not starter else f"{record.problem.strip()}\nComplete this code:\n{starter}"
        return super().few_shot(record._replace(problem=asked))

    def outcome(self, record: Record, program: str) -> str:
        """`passed`, or how the first test that failed ended."""
        given = {"code": program, "function": record.more.function, "seconds": SECONDS}
        every = tests(record.more)
        for start in range(0, len(every), AT_ONCE):
            part = every[start : start + AT_ONCE]
            job = json.dumps({**given, "inputs": [test.input for test in part]})
            ended = sandbox.run(programs.runner("livecodebench"), job.encode(), LIMITS, ("numpy",))
            if ended.status != 0:
                return programs.failure(ended)
            failed = first_failure(ended.output, part, record.more.function is not None)
            if failed:
                return failed
        return programs.PASSED


def first_failure(printed: str, part: Sequence[Test], is_value: bool) -> str | None:
    """How the first wrong one of these tests failed; `printed` is what the runner says."""
    try:
        results = json.loads(printed)
        pairs = [(str(status), str(output)) for status, output in results]
    except (ValueError, TypeError):  # the program meddled with its runner
        return "no results"
    for test, (status, output) in zip(part, pairs, strict=False):
        if status != "ok":
            return status
        if not (same_value if is_value else same_output)(output, test.output):
            return "wrong output"
    return None if len(pairs) == len(part) else "no results"


def same_value(output: str, right: str) -> bool:
    """Whether a function returned the right value; both are JSON."""
    try:
        return json.loads(output) == json.loads(right)
    except ValueError:
        return False


def same_output(output: str, right: str) -> bool:
    """Whether printed text is right: line by line, where lines of numbers are compared as decimals."""
    ours, theirs = ([line.strip() for line in text.strip().splitlines()] for text in (output, right))
    return len(ours) == len(theirs) and all(a == b or same_numbers(a, b) for a, b in zip(ours, theirs, strict=True))


def same_numbers(a: str, b: str) -> bool:
    """Whether two lines hold the same decimals: "1.50 2" and "1.5 2.0"."""
    try:
        return [Decimal(word) for word in a.split()] == [Decimal(word) for word in b.split()]
    except InvalidOperation:
        return False


@functools.lru_cache(maxsize=4)
def tests(place: Place) -> tuple[Test, ...]:
    """The public tests of a problem and, opened in the sandbox, its private ones.

    Raises:
      DataError: tests that cannot be read.
    """
    with open(place.path, "rb") as file:
        file.seek(place.offset)
        row = json.loads(file.readline())
    try:
        cases = (*json.loads(row["public_test_cases"]), *private_tests(row["private_test_cases"]))
        return tuple(Test(case["input"], case["output"]) for case in cases)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place.path}, byte {place.offset}: tests that cannot be read ({error})") from None


def private_tests(packed: str) -> list[dict]:
    """Private tests: JSON, or a pickle of it, which is opened in the sandbox.

    Raises:
      ValueError: they cannot be opened.
    """
    try:
        return json.loads(packed)
    except ValueError:
        opened = sandbox.run(programs.runner("unpack"), packed.encode(), UNPACK)
    if opened.status != 0:
        raise ValueError(f"the private tests do not open: {programs.failure(opened)}")
    return json.loads(opened.output)


def record(row: Row, path: Path, offset: int) -> Record:
    """A problem, without its tests.

    Raises:
      DataError: a field that is missing or damaged.
    """
    for field in ("public_test_cases", "private_test_cases"):
        row.text(field)
    try:
        function = json.loads(row.fields.get("metadata") or "{}").get("func_name")
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{row.where}: 'metadata' is no JSON object ({error})") from None
    starter = row.fields.get("starter_code") or ""
    if not isinstance(starter, str):
        raise DataError(f"{row.where}: 'starter_code' must be text, got {starter!r}")
    place = Place(str(path), offset, function if starter.strip() else None, starter)
    return Record(row.text("question_id"), row.text("question_content"), "", place)


def files(source: str, release: str) -> list[Path]:
    """The files of a release, from a folder, a single file, or the hub.

    Raises:
      DataError: a file that is missing.
    """
    wanted, path = FILES[: RELEASES.index(release) + 1], Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        missing = [name for name in wanted if not (path / name).is_file()]
        if missing:
            raise DataError(f"{path}: {release} needs {', '.join(missing)}")
        return [path / name for name in wanted]
    if path.suffix:
        raise DataError(f"{path}: no such file")
    import huggingface_hub

    try:
        return [Path(huggingface_hub.hf_hub_download(source, name, repo_type="dataset")) for name in wanted]
    except Exception as error:  # offline, gated, misspelt: the library raises many kinds
        raise DataError(f"{source}: no such file or folder, and not to be had from the hub: {error}") from error


def load(source: str, release: str, start: str, end: str) -> LiveCodeBenchTask:
    """The problems of a release whose contests took place from `start` to `end`, both included (2024-08-01).

    Raises:
      ConfigError: a date that is none.  DataError: data that is missing, or not of LiveCodeBench's form.
    """
    name = f"{source}, {release}, contests of {start} to {end}"
    days = _date("start", start), _date("end", end)
    held = (pair for path in files(source, release) for pair in _between(path, *days))
    return LiveCodeBenchTask(name, collect(held, name))


def _date(key: str, text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{key}={text!r}: is no date ({error})") from None


def _between(path: Path, first: datetime.date, last: datetime.date) -> Iterator[tuple[str, Record]]:
    for where, offset, fields in json_lines(path):
        if not isinstance(fields, dict):
            raise DataError(f"{where}: expected an object with named fields, got {type(fields).__name__}")
        row = Row(where, fields)
        date = row.text("contest_date")
        try:
            day = datetime.date.fromisoformat(date[:10])
        except ValueError as error:
            raise DataError(f"{where}: 'contest_date' is no date ({error})") from None
        if first <= day <= last:
            yield where, record(row, path, offset)
