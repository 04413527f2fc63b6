"""AIME 2024 and 2025 and data of their form, and the problems of the miniature reasoning model.

Fields: `problem`; `expected_answer` or `answer`; `id` if there is one (the row number otherwise).
"""

import dataclasses
import itertools
from typing import Any

from experiments.tasks import base, math500, mini
from experiments.tasks.base import Record

HUB = {"aime24": "HuggingFaceH4/aime_2024", "aime25": "math-ai/aime25"}
MINI_SEED = "experiments.aime"  # no training or validation script draws from this stream


def load(source: str) -> math500.MathTask:
    """The problems of a file, a hub data set, or `aime24` or `aime25`.

    Raises:
      DataError: data that is missing, or not of this form.
    """
    return math500.load(HUB.get(source, source))


@dataclasses.dataclass(frozen=True)
class MiniTask(base.Task):
    """Chained arithmetic, as the mini model was trained on it."""

    def prompt(self, record: Record, tokenizer: Any) -> str:
        """The problem itself."""
        return record.problem

    def stops(self, tokenizer: Any) -> tuple[str, ...]:
        """None: the mini model ends its chains."""
        return ()


def mini_problems(count: int) -> list[mini.Problem]:
    """The first `count` held-out problems of the miniature reasoning task, no prompt twice."""
    seen: set[str] = set()
    drawn = mini.problems("test", MINI_SEED)
    fresh = (p for p in drawn if not (p.problem in seen or seen.add(p.problem)))
    return list(itertools.islice(fresh, count))


def mini_task(count: int) -> MiniTask:
    """`mini_problems` as a task."""
    return MiniTask("mini", tuple(Record(f"mini-{n}", p.problem, p.answer) for n, p in enumerate(mini_problems(count))))
