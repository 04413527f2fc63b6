"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1), always in its absorbed form.

A head's key is `[c W_UK, r]` and its value `c W_UV`: c is the token's latent vector, the same for all heads, and r its
key turned by RoPE. The map of the keys is moved to the queries, and that of the values to the output,

    q . k = (q_nope W_UK) . c + q_rope . r          sum p v = (sum p c) W_UV

so that attention is that of H query heads on one KV head, with key [c, r] and value c. Only these are ever stored, and
one decision evicts a token's entry for all heads. Training and prefill run the same form: for T queries on S keys it
costs about 3.4 times the products of the expanded form at DeepSeek's dims, and no expanded keys in memory.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dms_jax import sharding
from dms_jax.config import DMSConfig, LatentConfig, ModelConfig, RopeConfig
from dms_jax.models import layers
from dms_jax.models.attend import Attend, Scale
from dms_jax.models.gates import gate_of
from dms_jax.types import Positions, Queries, Residual, State

INNER_EPS = 1e-6  # of the norms of latent vectors, in every family and whatever the model's own


class UpProjection(nn.Module):
    """The kernel that makes keys and values of each head from the latent vector: W_UK and W_UV side by side."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Float[Array, "..."]:
        return self.param("kernel", layers.normal, self.shape)


class LatentAttention(nn.Module):
    """What `transformer.Attention` is, for models with a LatentConfig."""

    config: ModelConfig
    dms: DMSConfig | None
    layer: int

    @property
    def latent(self) -> LatentConfig:
        """The model's, which has one."""
        assert self.config.latent is not None
        return self.config.latent

    @nn.compact
    def __call__(
        self, x: Residual, residual: Residual, positions: Positions, attend: Attend, state: State, neuron_scale: Scale
    ) -> tuple[Residual, State]:
        c, latent = self.config, self.latent
        q = self._queries(x)
        gate = gate_of(self.dms)
        logit = None if gate is None else gate.logits(q, residual, c)
        entry = layers.Linear((1, c.head_dim), c.qkv_bias, name="kv_a")(x)
        vector = layers.RMSNorm(INNER_EPS, name="kv_a_norm")(entry[..., : latent.kv_rank])
        turned = layers.apply_rope(entry[..., latent.kv_rank :], positions, c.rope, latent.interleaved)
        k = jnp.concatenate([vector, turned], axis=-1)
        up = UpProjection((latent.kv_rank, c.num_heads, latent.nope_dim + latent.value_dim), name="kv_b")()
        to_keys, to_values = jnp.split(up.astype(x.dtype), [latent.nope_dim], axis=-1)
        q_rope = layers.apply_rope(q[..., latent.nope_dim :], positions, c.rope, latent.interleaved)
        q_latent = jnp.einsum("BTHn,cHn->BTHc", q[..., : latent.nope_dim], to_keys)
        # Attention divides scores by the root of the key's width; these have a scale of their own.
        q = jnp.concatenate([q_latent, q_rope], axis=-1) * (score_scale(latent, c.rope) * c.head_dim**0.5)
        q, k = sharding.constrain(q, "B T H D"), sharding.constrain(k, "B T K D")
        out, state = attend(self.layer, q, k, k[..., : c.value_dim], logit, state)
        out = jnp.einsum("BTHc,cHv->BTHv", sharding.constrain(out, "B T H U"), to_values)
        return layers.Linear((c.model_dim,), c.out_bias, contract=2, name="o")(out), state

    def _queries(self, x: Residual) -> Queries:
        """`[nope, rope]` of each head, before RoPE; by way of a vector of `query_rank` numbers where there is one."""
        c, latent = self.config, self.latent
        heads = (c.num_heads, latent.nope_dim + latent.rope_dim)
        if latent.query_rank is None:
            return layers.Linear(heads, name="q")(x)
        x = layers.Linear((latent.query_rank,), c.qkv_bias, name="q_a")(x)
        return layers.Linear(heads, name="q_b")(layers.RMSNorm(INNER_EPS, name="q_a_norm")(x))


def score_scale(latent: LatentConfig, rope: RopeConfig) -> float:
    """What q . k is multiplied by: the width of an expanded key to the power -1/2, times yarn's factor squared."""
    sharpened = layers.yarn_mscale(rope, rope.mscale_all_dim) if rope.mscale_all_dim else 1.0
    return (latent.nope_dim + latent.rope_dim) ** -0.5 * sharpened**2
