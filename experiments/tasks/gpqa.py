"""GPQA Diamond: a question with four options, of which `Correct Answer` is right.

The options of a question stand in an order that its name alone decides, so that all models and seeds see the same.
"""

import dataclasses
import random
import re
from typing import ClassVar

from experiments.judge import Verdict
from experiments.judge_text import Span, answer_box, last_answer
from experiments.tasks import base
from experiments.tasks.base import Record, Row
from experiments.tasks.data import records

HUB = "Idavidrein/gpqa/gpqa_diamond"
WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
LETTERS = "ABCD"
INSTRUCTION = (
    "Choose one of the four options. Reason step by step, and end with a line of the form 'Answer: X', where X is the "
    "letter A, B, C or D of your choice."
)
# "answer is a mixture" names no option: a small letter is one only in brackets or at the end of its line.
ANSWER = re.compile(
    r"(?i:answer)[\s*]*(?:is\s*:?|:)(?:[\s*$`({\[\\]|(?i:option)|boxed|text(?:bf)?|math(?:rm|bf))*"
    r"([A-D](?![A-Za-z])|[a-d](?=[^\w\n]*$|[)}\]]))",
    re.MULTILINE,
)
SHOTS = (
    (
        "Which quantity is conserved in every collision of an isolated system, elastic or not?\n"
        "A) Kinetic energy\nB) Total momentum\nC) The speed of each body\nD) Temperature",
        "Without external forces the total momentum cannot change. Kinetic energy turns into heat where a collision is "
        "inelastic, and then speeds and temperatures change too.\nAnswer: B",
    ),
    (
        "An enzyme's maximal rate stays the same and its apparent Michaelis constant rises when an inhibitor is added. "
        "Of which kind is the inhibitor?\nA) Noncompetitive\nB) Uncompetitive\nC) Irreversible\nD) Competitive",
        "Enough substrate still gives the maximal rate, so substrate and inhibitor compete for one site. That is "
        "competitive inhibition.\nAnswer: D",
    ),
)


@dataclasses.dataclass(frozen=True)
class GpqaTask(base.Task):
    """Questions that are answered with a letter."""

    form: ClassVar = (
        "options A to D in an order fixed for each question; zero-shot chain of thought in a chat, else two worked "
        "examples; the answer is the letter of the last 'Answer: X' (as in simple-evals), else of the last \\boxed{X}"
    )
    headings: ClassVar = ("Question", "Reasoning")
    shots: ClassVar = SHOTS

    def request(self, record: Record) -> str:
        """The question with its options, and the form of the answer."""
        return f"{record.problem}\n\n{INSTRUCTION}"

    def verdict(self, record: Record, text: str) -> Verdict:
        """The letter of the last answer, and whether it is the right one."""
        letter = letter_of(text)
        return Verdict(letter, letter == record.answer)


def letter_of(text: str) -> str | None:
    """The letter that a chain answers with; None if there is none.

    "Answer: A? No.\nAnswer: (C)" -> "C"    "so \\boxed{\\text{B}}" -> "B"
    """
    given = last_answer(text, [Span(match[1].upper(), *match.span()) for match in ANSWER.finditer(text)])
    if given:
        return given.content
    boxed = re.fullmatch(r"[^A-Za-z]*(?:\\text(?:bf)?|\\mathrm)?[{( ]*([A-D])[^A-Za-z]*", answer_box(text) or "")
    return boxed and boxed[1]


def record(row: Row, number: int) -> Record:
    """A question with its options in their order, and the letter of the right one.

    Raises:
      DataError: a field that is missing.
    """
    name = row.identity(number, "Record ID", "id")
    right = row.text("Correct Answer").strip()
    options = [right, *(row.text(field).strip() for field in WRONG)]
    random.Random(f"gpqa/{name}").shuffle(options)
    listed = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    return Record(name, f"{row.text('Question').strip()}\n{listed}", LETTERS[options.index(right)])


def load(source: str) -> GpqaTask:
    """The questions of a file or a hub data set.

    Raises:
      DataError: data that is missing, or not of GPQA's form.
    """
    return GpqaTask(source, records(source, record, "train"))
