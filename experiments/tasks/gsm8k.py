"""GSM8K: `question`, and an `answer` whose last line is `#### 18`."""

import dataclasses
from typing import ClassVar

from experiments.tasks import base
from experiments.tasks.base import Record, Row
from experiments.tasks.data import DataError, records

HUB = "openai/gsm8k/main"
MARK = "####"
SHOTS = (
    (
        "A baker fills 6 trays with 12 rolls each and sells 45 of the rolls in the morning. How many rolls are left "
        "for the afternoon?",
        "The trays hold 6 * 12 = 72 rolls. After the morning 72 - 45 = 27 rolls are left. The answer is \\boxed{27}.",
    ),
    (
        "Nina reads 15 pages on each of the five weekdays and 40 pages on each day of the weekend. Her book has 310 "
        "pages. How many pages remain after one week?",
        "On weekdays she reads 5 * 15 = 75 pages, at the weekend 2 * 40 = 80 pages, 75 + 80 = 155 pages in all. So "
        "310 - 155 = 155 pages remain. The answer is \\boxed{155}.",
    ),
    (
        "A ticket costs $8, and children pay half of that. How many dollars do two adults and three children pay?",
        "The adults pay 2 * 8 = 16 dollars. A child pays 8 / 2 = 4 dollars, three children 3 * 4 = 12 dollars. "
        "Together they pay 16 + 12 = 28 dollars. The answer is \\boxed{28}.",
    ),
    (
        "A tank of 240 liters is filled with 12 liters a minute, but a leak loses 4 liters a minute. After how many "
        "minutes is the tank full?",
        "Each minute the tank gains 12 - 4 = 8 liters. It is full after 240 / 8 = 30 minutes. "
        "The answer is \\boxed{30}.",
    ),
)


@dataclasses.dataclass(frozen=True)
class Gsm8kTask(base.Task):
    """Problems of a few steps of arithmetic, with a number as their answer."""

    headings: ClassVar = ("Question", "Answer")
    shots: ClassVar = SHOTS


def record(row: Row, number: int) -> Record:
    """A problem; only what stands behind the mark is the answer.

    Raises:
      DataError: no question, no mark, or no number behind it.
    """
    question, solution = row.text("question", "problem"), row.text("answer")
    _, mark, answer = solution.rpartition(MARK)
    if not mark:
        raise DataError(f"{row.where}: no '{MARK} number' at the end of the answer")
    return Record(row.identity(number, "id"), question, base.gold(row, answer.strip()))


def load(source: str) -> Gsm8kTask:
    """The problems of a file or a hub data set.

    Raises:
      DataError: data that is missing, or not of GSM8K's form.
    """
    return Gsm8kTask(source, records(source, record))
