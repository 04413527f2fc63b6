"""H2O: heavy hitters and recent tokens (Zhang et al. 2023, arXiv 2306.14048).

A token's score is the attention that it got from all queries so far. Half of the budget is for the most recent
tokens, as in the paper; of the others the one with the lowest score is evicted. For grouped-query attention, which
the paper does not treat, the weights of a KV head's query heads are summed, and every KV head decides for itself.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dms_jax.policies.scored import ScoredPolicy


@dataclass(frozen=True)
class H2O(ScoredPolicy):
    """`budget // 2` recent tokens (of budgets that differ, half of the smallest), the rest heavy hitters."""

    name: ClassVar[str] = "h2o"
    attention_from: ClassVar[str] = "all"

    @property
    def num_protected(self) -> int:
        return int(np.min(self.budget)) // 2

    def update_score(self, score, attention):
        return score + attention

    def protected(self, pos, newest):
        return pos > (newest - self.num_protected)[:, None, None]
