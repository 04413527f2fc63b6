"""TOVA: the token with the lowest attention from the newest query is evicted (Oren et al. 2024, arXiv 2401.06104).

As in the authors' code the weights are averaged over all heads of a layer, so its heads keep the same tokens. The
weights of one step decide what is evicted at the next, so that a head never holds more than its budget while it is
read; the authors read budget + 1 tokens and evict afterwards, which is the same with a budget larger by one.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from dms_jax.config import require
from dms_jax.policies.scored import ScoredPolicy


@dataclass(frozen=True)
class TOVA(ScoredPolicy):
    """Keeps the `budget` tokens with the largest weights of the last query; a layer's heads have the same budget."""

    name: ClassVar[str] = "tova"
    attention_from: ClassVar[int] = 1

    def __post_init__(self):
        super().__post_init__()
        same = isinstance(self.budget, int) or all(len(set(row)) == 1 for row in self.budget)
        require(same, "budget", self.budget, "the heads of a layer keep the same tokens, and so the same number")

    def update_score(self, score, attention):
        # All heads of a layer hold the same tokens in the same slots, so their weights can be averaged slot by slot.
        return jnp.broadcast_to(attention.mean(axis=1, keepdims=True), attention.shape)
