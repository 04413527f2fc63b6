"""What tasks share whose answers are programs: the code in a chain's text, and how its tests are run.

Every program that a model wrote runs in `experiments.sandbox`, and nowhere else.
"""

import dataclasses
import re
from pathlib import Path
from typing import ClassVar

from experiments import sandbox
from experiments.judge import Verdict
from experiments.judge_text import Span, last_answer
from experiments.tasks import base
from experiments.tasks.base import Record

FENCE = re.compile(r"^[ \t]*```([^\n`]*)(?:\n|\Z)", re.MULTILINE)
RUNNERS = Path(__file__).resolve().parent / "sandboxed"
PASSED = "passed"


@dataclasses.dataclass(frozen=True)
class ProgramTask(base.Task):
    """Problems that a program solves; it passes all tests or it fails."""

    metric: ClassVar = "pass"
    form: ClassVar = "the code of the last fenced block, run in a sandbox; a program passes all tests or fails"

    def program(self, record: Record, text: str) -> str | None:
        """The program in a chain's text; None if there is none."""
        return last_block(text)

    def outcome(self, record: Record, program: str) -> str:
        """`passed`, or how the tests failed."""
        raise NotImplementedError

    def verdict(self, record: Record, text: str) -> Verdict:
        """How the program's tests ended, and whether all passed; None for a text without a program.

        Raises:
          SandboxError: programs cannot be run safely here.
        """
        program = self.program(record, text)
        if program is None:
            return Verdict(None, False)
        outcome = self.outcome(record, program)
        return Verdict(outcome, outcome == PASSED)

    def check(self) -> None:
        """Raises SandboxError where programs cannot be run safely."""
        sandbox.check()


def last_block(text: str) -> str | None:
    """The content of the last fenced block that is closed and not blank; None if there is none.

    What comes after the beginning of another problem does not count.
    """
    blocks, opened = [], None
    for fence in FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif not fence[1].strip():
            span, opened = Span(text[opened.end() : fence.start()], opened.start(), fence.end()), None
            blocks += [span] if span.content.strip() else []
    block = last_answer(text, blocks)
    return block and block.content


def runner(name: str) -> str:
    """The source of a program of ours that runs in the sandbox, and there runs a model's."""
    return (RUNNERS / f"{name}.py").read_text()


def last_line(errors: str) -> str:
    """What a traceback ends with: the name of the exception."""
    lines = errors.strip().splitlines()
    return lines[-1].split(":")[0][:100] if lines else ""


def failure(outcome: sandbox.Outcome) -> str:
    """How a program failed, in a few words."""
    if outcome.status is None:
        return "timeout"
    return last_line(outcome.errors) or f"exit status {outcome.status}"
