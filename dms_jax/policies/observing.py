"""Policies that go by the attention of the last few queries before an eviction.

As a head evicts only every `evict_every` steps, it is known beforehand which queries are the last ones. So one number
a slot is enough: it is 0 until `queries` steps before the next eviction, and sums the weights from there. Nothing is
evicted while they are summed, so they are the weights that a method would compute at the eviction from stored queries
and keys. Deviations: no query before the last eviction counts, where `evict_every` is less than `queries`; and where a
prompt ended within those steps, the last `queries` queries of the prompt count as well.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dms_jax.config import Size, require
from dms_jax.policies.scored import Candidates, ScoredPolicy
from dms_jax.types import Slots


@dataclass(frozen=True)
class Observing(ScoredPolicy):
    """A token's score is the attention from the last `queries` queries, of those since the last eviction.

    pooling: how many neighbours `pooled` takes together, an odd number.
    """

    evict_every: Size = 64
    queries: Size = 8
    pooling: Size = 7
    ranks_stored: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        require(self.pooling % 2 == 1, "pooling", self.pooling, "must be odd: a token and as many on either side")

    @property
    def attention_from(self) -> int:
        return self.queries

    def update_score(self, score, attention):
        return score + attention

    def prune(self, state, step, stored):
        keep, state = super().prune(state, step, stored)
        return keep, state._replace(score=jnp.where(self.due(state, step)[..., None], 0.0, state.score))

    def update(self, state, step, new):
        state, live = super().update(state, step, new), step.live + 1
        # Steps to go before the next eviction; at 0 it comes before the next token is stored.
        left = self._limit(step.layer, state.prompt & (state.pos >= 0)) + self.evict_every - 1 - live
        unobserved = (left >= self.queries) & step.active[:, None]
        return state._replace(score=jnp.where(unobserved[..., None], 0.0, state.score))


def distribution(tokens: Candidates) -> Float[Array, "B K S"]:
    """The observed weights, averaged over queries and the query heads of a KV head: they sum to 1 over a head."""
    score = jnp.where(tokens.pos >= 0, tokens.score, 0.0)
    return score / jnp.maximum(score.sum(axis=-1, keepdims=True), jnp.finfo(score.dtype).tiny)


def pooled(x: Float[Array, "B K S"], pos: Slots, width: int, how: str) -> Float[Array, "B K S"]:
    """The "max" or "mean" over each token and its neighbours in the order of positions, `width` (odd) in all.

    Beyond the first and the last token there is nothing (as much as 0); slots lie in any order:

        pos [4 -1 0 7]   x [3 . 1 2]   width 3   max [3 . 3 3]
    """
    order = jnp.argsort(jnp.where(pos < 0, jnp.iinfo(jnp.int32).max, pos), axis=-1)
    sorted_x = jnp.take_along_axis(jnp.where(pos < 0, 0.0, x), order, axis=-1)
    window, edges = (1, 1, width), ((0, 0), (0, 0), (width // 2, width // 2))
    start, combine = (-jnp.inf, jax.lax.max) if how == "max" else (0.0, jax.lax.add)
    out = jax.lax.reduce_window(sorted_x, start, combine, window, (1, 1, 1), edges)
    out = out if how == "max" else out / width
    return jnp.take_along_axis(out, jnp.argsort(order, axis=-1), axis=-1)
