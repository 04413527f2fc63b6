"""KeyDiff: keys that resemble the others are evicted first (Park et al. 2025, arXiv 2504.15364).

A key is compared, by cosine, with the mean of the normalised keys that the head holds; no attention weights are
needed. Deviations: a prompt is pruned once, at its end, where the authors prune it block by block; and for grouped
queries nothing changes, since every KV head decides for itself.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from dms_jax.policies.scored import ScoredPolicy
from dms_jax.types import Slots, StoredKeys


@dataclass(frozen=True)
class KeyDiff(ScoredPolicy):
    """Keeps the `budget` tokens whose keys point least where the mean does; an eviction reads all keys again."""

    name: ClassVar[str] = "keydiff"
    ranks_stored: ClassVar[bool] = True
    rereads: ClassVar[float] = 0.5

    def rank(self, tokens):
        unit = normalised(tokens.k, tokens.pos)
        anchor = unit.sum(axis=2, keepdims=True)  # in the direction of the mean, and a cosine knows no length
        return -(unit * _unit(anchor)).sum(axis=-1)


def normalised(k: StoredKeys, pos: Slots) -> StoredKeys:
    """Keys of length 1 in float32, 0 in empty slots and where a key is 0."""
    return _unit(jnp.where((pos >= 0)[..., None], k.astype(jnp.float32), 0.0))


def _unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
