"""MATH-500, and problems with an answer in LaTeX of its form: `problem`, `answer`, and `unique_id` or `id`."""

import dataclasses
from typing import ClassVar

from experiments.tasks import base
from experiments.tasks.base import Record, Row
from experiments.tasks.data import DataError, records

HUB = "HuggingFaceH4/MATH-500"
ANSWERS = ("expected_answer", "answer")
SHOTS = (
    (
        "What is the sum of the first 20 positive even integers?",
        "The integers are 2, 4, ..., 40, which is twice 1 + 2 + ... + 20. The sum of the first 20 positive integers "
        "is $\\frac{20 \\cdot 21}{2} = 210$, so the sum asked for is $2 \\cdot 210 = 420$. "
        "The answer is $\\boxed{420}$.",
    ),
    (
        "If $3x + 5 = 2x - 7$, what is the value of $x^2$?",
        "Subtracting $2x + 5$ from both sides gives $x = -12$. Then $x^2 = 144$. The answer is $\\boxed{144}$.",
    ),
    (
        "A fair coin is tossed four times. What is the probability that it shows heads exactly twice?",
        "Of the $2^4 = 16$ sequences, $\\binom{4}{2} = 6$ have two heads. The probability is "
        "$\\frac{6}{16} = \\frac{3}{8}$. The answer is $\\boxed{\\frac{3}{8}}$.",
    ),
    (
        "Find the distance between the points $(1, -2)$ and $(3, 4)$.",
        "The differences of the coordinates are $2$ and $6$, so the distance is "
        "$\\sqrt{2^2 + 6^2} = \\sqrt{40} = 2\\sqrt{10}$. The answer is $\\boxed{2\\sqrt{10}}$.",
    ),
)


@dataclasses.dataclass(frozen=True)
class MathTask(base.Task):
    """Problems with an answer in LaTeX."""

    shots: ClassVar = SHOTS


def record(row: Row, number: int) -> Record:
    """A problem of MATH or AIME.

    Raises:
      DataError: no problem, or no answer that can be read.
    """
    problem = row.text("problem", "question")
    answers = [row.fields[name] for name in ANSWERS if row.fields.get(name) is not None]
    if not answers or not str(answers[0]).strip():
        raise DataError(f"{row.where}: no answer in {' or '.join(map(repr, ANSWERS))}")
    return Record(row.identity(number, "id", "unique_id"), problem, base.gold(row, answers[0]))


def load(source: str) -> MathTask:
    """The problems of a file or a hub data set.

    Raises:
      DataError: data that is missing, or not of this form.
    """
    return MathTask(source, records(source, record))
