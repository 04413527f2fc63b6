"""Random eviction, the control: a method that is not clearly better than this one knows nothing."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dms_jax.policies.scored import ScoredPolicy
from dms_jax.types import Keys, Slots


@dataclass(frozen=True)
class Random(ScoredPolicy):
    """Every token draws a number when it is stored, the same in every layer; the lowest is evicted. The same seed keeps
    the same tokens."""

    name: ClassVar[str] = "random"

    def initial_score(self, k, v, pos, keys):
        return uniform(pos, keys)


def uniform(pos: Slots, keys: Keys) -> Float[Array, "B K T"]:
    """A number in [0, 1) for each token and head that depends on the sequence's key and the position alone."""
    heads = jnp.arange(pos.shape[1])

    def one(key, head, position):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, head), position))

    over_tokens = jax.vmap(one, (None, None, 0))
    return jax.vmap(jax.vmap(over_tokens, (None, 0, 0)), (0, None, 0))(keys, heads, pos)
