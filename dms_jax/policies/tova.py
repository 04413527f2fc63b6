"""TOVA: the token with the lowest attention from the newest query is evicted (Oren et al. 2024, arXiv 2401.06104).

As in the authors' code the weights are averaged over all heads of a layer, so its heads keep the same tokens. The
weights of one step decide what is evicted at the next, so that a head never holds more than its budget while it is
read; the authors read budget + 1 tokens and evict afterwards, which is the same with a budget larger by one.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from dms_jax.policies.scored import ScoredPolicy


@dataclass(frozen=True)
class TOVA(ScoredPolicy):
    """Keeps the `budget` tokens with the largest weights of the last query."""

    name: ClassVar[str] = "tova"
    attention_from: ClassVar[int] = 1

    def update_score(self, score, attention):
        # All heads of a layer hold the same tokens in the same slots, so their weights can be averaged slot by slot.
        return jnp.broadcast_to(attention.mean(axis=1, keepdims=True), attention.shape)
