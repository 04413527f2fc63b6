"""Random Attention: the prompt, the newest tokens, and a random choice of the others (2026, arXiv 2609.03430).

What makes the choice strong is what it leaves alone: the prompt is the fragile part. Every KV head of every layer
draws for itself, and all anew at each eviction, so that no token is bound to stay. Deviation: a budget below 128
halves the 64 newest that are protected, down to half of the budget, so that there is something to draw from; of
budgets that differ, the smallest counts.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dms_jax.config import Count
from dms_jax.policies.random import uniform
from dms_jax.policies.scored import ScoredPolicy


@dataclass(frozen=True)
class RandomAttention(ScoredPolicy):
    """Keeps the prompt, the `newest` tokens, and of the others as many as the budget leaves, uniformly at random."""

    protect_prompt: bool = True
    newest: Count = 64
    name: ClassVar[str] = "random_attention"
    ranks_stored: ClassVar[bool] = True

    @property
    def num_protected(self) -> int:
        return min(self.newest, int(np.min(self.budget)) // 2)

    def rank(self, tokens):
        return uniform(tokens.pos, tokens.keys)

    def protected(self, pos, newest):
        return pos > (newest - self.num_protected)[:, None, None]
