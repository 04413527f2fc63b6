"""What every task is: problems, how one becomes a prompt, which strings end a chain, and how its text is scored."""

import dataclasses
from typing import Any, ClassVar, Literal

from dms_jax.weights.text import encode_turn, has_chat
from experiments.judge import Verdict, judge, shared
from experiments.tasks.data import DataError, Record, Row

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclasses.dataclass(frozen=True)
class Task:
    """Problems in a fixed order whose answers stand in a box. A subclass says what is different in it.

    name: of the data, for titles. shots: worked examples (a problem and its solution) for a model without a chat
    template, under these two headings. metric: whether chains vote for an answer, or each is a program that passes
    its tests or does not. form: how problems are asked and answers read, for the record.
    """

    name: str
    records: tuple[Record, ...]

    metric: ClassVar[Literal["vote", "pass"]] = "vote"
    form: ClassVar[str] = "zero-shot in a chat, else worked examples; the answer is the last \\boxed{...}"
    headings: ClassVar[tuple[str, str]] = ("Problem", "Solution")
    shots: ClassVar[tuple[tuple[str, str], ...]] = ()

    def request(self, record: Record) -> str:
        """What is asked in a chat."""
        return f"{record.problem.strip()}\n{INSTRUCTION}"

    def few_shot(self, record: Record) -> str:
        """The worked examples, and the problem after them, for a model that goes on writing a text."""
        question, answer = self.headings
        shown = [f"{question}: {asked}\n{answer}: {given}\n\n" for asked, given in self.shots]
        return f"{''.join(shown)}{question}: {record.problem.strip()}\n{answer}:"

    def prompt(self, record: Record, tokenizer: Any) -> str | list[int]:
        """A chat turn where the tokenizer knows how to write one, the worked examples otherwise."""
        if not has_chat(tokenizer):
            return self.few_shot(record)
        return encode_turn(tokenizer, self.request(record))

    def stops(self, tokenizer: Any) -> tuple[str, ...]:
        """Strings that end a chain: a model without a chat template goes on with a problem of its own."""
        return () if has_chat(tokenizer) else (f"\n{self.headings[0]}:",)

    def check(self) -> None:
        """Raises an error where no chain could be judged: better before a run than after its first chain."""

    def verdict(self, record: Record, text: str) -> Verdict:
        """What a chain answered, and whether it is right. Threads call it at the same time."""
        return judge(text, record.answer)


def gold(row: Row, answer: Any) -> str:
    """A right answer as text.

    Raises:
      DataError: an answer that nobody can read, so that every chain would be wrong.
    """
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise DataError(f"{row.where}: the answer must be text or a number, got {answer!r}")
    text = str(answer).strip()
    if not shared().readable(text):
        raise DataError(f"{row.where}: the answer {text!r} cannot be read")
    return text
