"""VaSE: tokens with large values stay, and chance decides among the others (Chang et al. 2026, arXiv 2606.03928).

Two variants, both evicting every 64 steps. Deviations: the paper's figures of what is protected and drawn are taken
from its text (a quarter of the budget, 4 sinks, pooling 5, rank 20); one Gaussian matrix serves keys and values of
all KV heads of a layer; and for AttnV see `observing`.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from dms_jax.config import Size
from dms_jax.policies.observing import Observing, distribution, pooled
from dms_jax.policies.random import uniform
from dms_jax.policies.scored import ScoredPolicy, largest


@dataclass(frozen=True)
class VaSEAttnV(Observing):
    """Keeps 4 sinks, the quarter of the budget with the widest values, and draws the rest by attention.

    The width of a value is its largest less its smallest number. Drawing without replacement, each token with the
    probability of its pooled attention, is taking the largest of log p + Gumbel noise. An eviction reads no keys, and
    of values the width alone, which could be kept beside them. In the first layer, values of a token that comes again
    are as wide but for rounding (see knorm.py).
    """

    queries: Size = 64
    pooling: Size = 5
    name: ClassVar[str] = "vase_attnv"
    max_protected: ClassVar[int] = 4

    def rank(self, tokens):
        live, v = tokens.pos >= 0, tokens.v.astype(jnp.float32)
        width = jnp.where(live, v.max(axis=-1) - v.min(axis=-1), -jnp.inf)
        widest = largest(width, -jnp.broadcast_to(jnp.arange(width.shape[-1]), width.shape), tokens.limit // 4)
        probability = pooled(distribution(tokens), tokens.pos, self.pooling, "mean")
        drawn = jnp.log(probability) - jnp.log(-jnp.log(uniform(tokens.pos, tokens.keys)))
        return jnp.where(widest, jnp.finfo(jnp.float32).max, drawn)

    def protected(self, pos, newest):
        return (pos >= 0) & (pos < self.max_protected)


@dataclass(frozen=True)
class VaSEDKV(ScoredPolicy):
    """Keeps the tokens with the largest |k G|^2 |v G|^2, G a Gaussian matrix drawn anew at each eviction.

    It needs no attention; an eviction reads all keys and values again.
    """

    evict_every: Size = 64
    rank_of_projection: Size = 20
    name: ClassVar[str] = "vase_dkv"
    ranks_stored: ClassVar[bool] = True
    rereads: ClassVar[float] = 1.0

    def rank(self, tokens):
        shape = (tokens.k.shape[-1], self.rank_of_projection)
        gaussian = jax.vmap(lambda key: jax.random.normal(key, shape))(tokens.keys)

        def projected(x):  # values may be narrower than keys
            return jnp.einsum("BKSD,BDR->BKSR", x.astype(jnp.float32), gaussian[:, : x.shape[-1]])

        k, v = projected(tokens.k), projected(tokens.v)
        return (k * k).sum(axis=-1) * (v * v).sum(axis=-1)
