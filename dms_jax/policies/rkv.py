"""R-KV: attention against redundancy (Cai et al. 2025, arXiv 2505.24133).

`mix * attention - (1 - mix) * redundancy`: attention as in SnapKV; redundancy is the softmax over a head's tokens of
a key's mean cosine with the others, of which the newest that is more similar than `similar` is left out, so that of
near duplicates the newest stays. Deviations: attention is divided among all live tokens, the last `queries` included,
and averaged over the query heads of a KV head, where the authors' code takes the largest score of these before the
softmax; and see `observing`.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dms_jax.config import Share, Size
from dms_jax.policies.keydiff import normalised
from dms_jax.policies.scored import Candidates
from dms_jax.policies.snapkv import SnapKV

TOKENS_AT_ONCE = 128  # rows of the S x S cosines that are alive together


@dataclass(frozen=True)
class RKV(SnapKV):
    """Keeps the last `queries` tokens, and those attended to and unlike others; an eviction reads all keys again."""

    evict_every: Size = 128
    mix: Share = 0.1
    similar: Share = 0.5
    name: ClassVar[str] = "rkv"
    rereads: ClassVar[float] = 0.5

    def rank(self, tokens):
        return self.mix * super().rank(tokens) - (1 - self.mix) * self.redundancy(tokens)

    def redundancy(self, tokens: Candidates) -> Float[Array, "B K S"]:
        unit, slots = normalised(tokens.k, tokens.pos), jnp.arange(tokens.pos.shape[-1])

        def mean_cosine(slot):
            """Of one slot's key, `[B, K]`."""
            cosine = jnp.einsum("BKD,BKSD->BKS", unit[:, :, slot], unit)
            cosine = jnp.where(slots == slot, 0.0, cosine)
            newest = jnp.max(jnp.where(cosine > self.similar, tokens.pos, -1), axis=-1, keepdims=True)
            cosine = jnp.where((tokens.pos == newest) & (newest >= 0), 0.0, cosine)
            return cosine.sum(axis=-1)

        live = tokens.pos >= 0
        total = jnp.moveaxis(jax.lax.map(mean_cosine, slots, batch_size=TOKENS_AT_ONCE), 0, -1)
        mean = total / jnp.maximum(live.sum(axis=-1, keepdims=True), 1)
        return jax.nn.softmax(jnp.where(live, mean, -jnp.inf), axis=-1, where=live)
