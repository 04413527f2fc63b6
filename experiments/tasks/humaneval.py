"""HumanEval: a Python function to be completed from its signature and docstring, and a test that checks it.

A chat model answers with the whole function in a fenced block; any other goes on where the prompt ends.
"""

import dataclasses
import json
import re
import secrets
from typing import Any, ClassVar

from dms_jax.weights.text import has_chat
from experiments import sandbox
from experiments.tasks import programs
from experiments.tasks.base import Record, Row
from experiments.tasks.data import records

HUB = "openai/openai_humaneval"
# What a model writes after a function that it has completed.
STOPS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint(", "\nassert ", "\n```", "\n\"\"\"")  # fmt: skip
LIMITS = sandbox.Limits(seconds=15, cpu_seconds=10)


@dataclasses.dataclass(frozen=True)
class HumanEvalTask(programs.ProgramTask):
    """Functions to be completed; `more` of a record holds its test and the function's name."""

    form: ClassVar = (
        "in a chat the function of the last fenced block, else the completion of the prompt, zero-shot; "
        "run in a sandbox against the data set's own test"
    )

    def request(self, record: Record) -> str:
        """What is asked in a chat."""
        return (
            "Complete this Python function. Answer with the whole function and its imports in one fenced block that "
            f"begins with ```python.\n\n```python\n{record.problem.rstrip()}\n```"
        )

    def few_shot(self, record: Record) -> str:
        """The prompt itself: it says all that a model needs to go on."""
        return record.problem

    def stops(self, tokenizer: Any) -> tuple[str, ...]:
        """The next thing at the margin ends a function."""
        return () if has_chat(tokenizer) else STOPS

    def program(self, record: Record, text: str) -> str | None:
        """The prompt with what completes it: imports and helpers of the prompt serve a whole function too."""
        block = programs.last_block(text)
        if block is None:
            return None if "```" in text else record.problem + text
        whole = re.search(rf"^(?:async )?def {re.escape(record.more['entry_point'])}\b", block, re.MULTILINE)
        return f"{record.problem}\n\n{block}" if whole else record.problem + block

    def outcome(self, record: Record, program: str) -> str:
        """`passed`, or how the test ended."""
        token = secrets.token_hex(16)
        given = json.dumps({"code": program, "token": token, **record.more})
        ended = sandbox.run(programs.runner("human_eval"), given.encode(), LIMITS)
        if ended.status == 0 and ended.output.endswith(f"\n{token}"):
            return programs.PASSED
        return "exit" if ended.status == 0 else programs.failure(ended)


def record(row: Row, number: int) -> Record:
    """A function to be completed.

    Raises:
      DataError: a field that is missing.
    """
    more = {"test": row.text("test"), "entry_point": row.text("entry_point")}
    return Record(row.identity(number, "task_id"), row.text("prompt"), "", more)


def load(source: str) -> HumanEvalTask:
    """The functions of a file or a hub data set.

    Raises:
      DataError: data that is missing, or not of HumanEval's form.
    """
    return HumanEvalTask(source, records(source, record))
