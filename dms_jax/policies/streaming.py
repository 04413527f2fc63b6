"""StreamingLLM: attention sinks and a window (Xiao et al. 2023, arXiv 2309.17453).

Keeps the first tokens of a sequence and the most recent ones. Deviation: keys keep the RoPE of their own positions,
where the authors renumber positions inside the cache, which only matters beyond the trained context.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from dms_jax.policies.scored import ScoredPolicy


@dataclass(frozen=True)
class StreamingLLM(ScoredPolicy):
    """The 4 first tokens (the paper's number) and the `budget - 4` newest."""

    name: ClassVar[str] = "streaming"
    max_protected: ClassVar[int] = 4

    def initial_score(self, k, v, pos, keys):
        return pos.astype(jnp.float32)  # the oldest is evicted first

    def protected(self, pos, newest):
        return (pos >= 0) & (pos < self.max_protected)
