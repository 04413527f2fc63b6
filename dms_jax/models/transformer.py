"""The decoder of every family, a linen module driven by ModelConfig; grouped-query attention, and latent from mla.py.

The decoder knows no cache, no mask and no policy. Each layer hands its queries, keys, values and eviction logits
to an `attend` function, which returns the attention output and the next state; training, prefill, decoding and
every eviction policy are such functions.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Shaped

from dms_jax import dms, kernels, sharding
from dms_jax.config import DMSConfig, ModelConfig, one_of
from dms_jax.models import layers
from dms_jax.models.attend import Attend, Scale
from dms_jax.models.gates import Gate, gate_of
from dms_jax.models.mla import LatentAttention
from dms_jax.types import (
    Attended,
    GateLogits,
    Lengths,
    Logits,
    LogKeepProb,
    NewKeys,
    NewValues,
    Params,
    Positions,
    Queries,
    Residual,
    Segments,
    State,
    Tokens,
)

# What the backward pass may keep of a block, by RetrofitConfig.remat.
POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "block": None}


class Attention(nn.Module):
    config: ModelConfig
    dms: DMSConfig | None
    layer: int

    @nn.compact
    def __call__(
        self, x: Residual, residual: Residual, positions: Positions, attend: Attend, state: State, neuron_scale: Scale
    ) -> tuple[Residual, State]:
        c = self.config
        q = layers.Linear((c.num_heads, c.head_dim), c.qkv_bias, name="q")(x)
        k = layers.Linear((c.num_kv_heads, c.head_dim), c.qkv_bias, name="k")(x)
        v = layers.Linear((c.num_kv_heads, c.head_dim), c.qkv_bias, name="v")(x)
        if c.qk_norm:
            q = layers.RMSNorm(c.norm_eps, name="q_norm")(q)
            k = layers.RMSNorm(c.norm_eps, name="k_norm")(k)
        gate, logit = gate_of(self.dms), None
        if gate is not None:
            logit = gate.logits(q, residual, c)
            q = gate.hidden(q, neuron_scale, c)
        q = layers.apply_rope(q, positions, c.rope)
        k = layers.apply_rope(k, positions, c.rope)
        if gate is not None:
            q = gate.hidden(q, neuron_scale, c)
        q, k, v = sharding.constrain(q, "B T H D"), sharding.constrain(k, "B T K D"), sharding.constrain(v, "B T K D")
        out, state = attend(self.layer, q, k, v, logit, state)
        out = sharding.constrain(out, "B T H D")
        return layers.Linear((c.model_dim,), c.out_bias, contract=2, name="o")(out), state


class Block(nn.Module):
    config: ModelConfig
    dms: DMSConfig | None
    layer: int

    @nn.compact
    def __call__(
        self, x: Residual, positions: Positions, attend: Attend, state: State, neuron_scale: Scale
    ) -> tuple[Residual, State]:
        c = self.config
        added = 1.0 if c.depth_scale is None else c.depth_scale / math.sqrt(c.num_layers)
        kind = Attention if c.latent is None else LatentAttention
        h = layers.RMSNorm(c.norm_eps, name="attn_norm")(x)
        out, state = kind(c, self.dms, self.layer, name="attn")(h, x, positions, attend, state, neuron_scale)
        x = sharding.constrain(x + added * out, "B T E")
        h = layers.RMSNorm(c.norm_eps, name="mlp_norm")(x)
        out = layers.MLP(c.mlp_dim, c.mlp_bias, name="mlp")(h)
        return sharding.constrain(x + added * out, "B T E"), state


class Decoder(nn.Module):
    """`[B, T]` tokens -> `[B, T, E]` hidden states; `unembed` turns those into logits.

    dms: the gate that the parameters carry, or None for an original model. With the query gate the borrowed
    neuron takes no part in attention (neuron_scale 0) whether or not anything is evicted.
    remat: what the backward pass recomputes: "none", or a key of POLICIES.
    """

    config: ModelConfig
    dms: DMSConfig | None = None
    remat: str = "none"

    def setup(self):
        c = self.config
        one_of("remat", self.remat, ("none", *POLICIES))
        if self.gate is not None:
            self.gate.check(c)
        self.embed = nn.Embed(c.vocab_size, c.model_dim, embedding_init=layers.normal)
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=POLICIES[self.remat], static_argnums=(3,))  # 3: attend, a function
        self.layers = [block(c, self.dms, n) for n in range(c.num_layers)]
        self.final_norm = layers.RMSNorm(c.norm_eps)
        if not c.tie_embeddings:
            self.unembedding = layers.Linear((c.vocab_size,))

    def __call__(
        self, tokens: Tokens, positions: Positions, attend: Attend, state: State = (), neuron_scale: Scale = 0.0
    ) -> tuple[Residual, State]:
        """Hidden states after the final norm, and the state that `attend` threaded through the layers."""
        return self.with_residuals(tokens, positions, attend, state, neuron_scale)[:2]

    def with_residuals(
        self, tokens: Tokens, positions: Positions, attend: Attend, state: State = (), neuron_scale: Scale = 0.0
    ) -> tuple[Residual, State, list[Residual]]:
        """`__call__`, and the residual stream that entered each layer, `[B, T, E]` L times."""
        c, entered = self.config, []
        x = sharding.constrain(c.embed_scale * self.embed(tokens), "B T E")
        for block in self.layers:
            entered.append(x)
            x, state = block(x, positions, attend, state, neuron_scale)
        return self.final_norm(x) * (1.0 if c.logit_dim is None else c.logit_dim / c.model_dim), state, entered

    @property
    def gate(self) -> Gate | None:
        """The gate that the parameters carry."""
        return gate_of(self.dms)

    def unembed(self, hidden: Residual) -> Logits:
        """`[..., E]` -> `[..., V]` float32."""
        logits = self.embed.attend(hidden) if self.config.tie_embeddings else self.unembedding(hidden)
        return logits.astype(jnp.float32)

    def logits(
        self, tokens: Tokens, positions: Positions, attend: Attend, state: State = (), neuron_scale: Scale = 0.0
    ) -> tuple[Logits, State]:
        """`__call__` and `unembed` at once; also what `init` runs."""
        hidden, state = self(tokens, positions, attend, state, neuron_scale)
        return self.unembed(hidden), state


def arange_positions(tokens: Shaped[Array, "B T"] | Shaped[np.ndarray, "B T"]) -> Positions:
    """0 .. T-1 for each sequence."""
    B, T = tokens.shape
    return jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))


def unembedding(params: Params, config: ModelConfig) -> Float[Array, "E V"]:
    """The matrix that `Decoder.unembed` multiplies by."""
    return params["embed"]["embedding"].T if config.tie_embeddings else params["unembedding"]["kernel"]


def self_attention(
    q: Queries,
    k: NewKeys,
    v: NewValues,
    positions: Positions,
    log_keep_prob: LogKeepProb,
    window: int | Array,
    segments: Segments | None = None,
    hard: bool = False,
) -> Attended:
    """Attention of whole rows to themselves: what every forward pass over given tokens goes through.

    positions, segments: `[B, T]`; of packed documents each is a segment, with positions from 0. hard: log_keep_prob
    holds only 0 and MASK_VALUE, so that a kernel may skip what nobody sees.
    """
    letters = ("B T H D", "B T K D", "B T K U", "B T", "B K T", *(() if segments is None else ("B T",)))

    def local(q, k, v, positions, log_keep_prob, segments=None):
        mask = kernels.EvictionMask(positions, positions, log_keep_prob, window, segments, segments)
        return kernels.flash_attention(q, k, v, mask, hard=hard)

    given = (q, k, v, positions, log_keep_prob, *(() if segments is None else (segments,)))
    return sharding.by_heads(local, letters)(*given)


def causal(
    layer: int, q: Queries, k: NewKeys, v: NewValues, logit: GateLogits | None, state: State
) -> tuple[Attended, State]:
    """An `Attend`: plain causal attention over the tokens given, nothing evicted."""
    return packed_causal(arange_positions(q[..., 0, 0]), None)(layer, q, k, v, logit, state)


def packed_causal(positions: Positions, segments: Segments | None) -> Attend:
    """`causal` for rows of packed documents."""

    def attend(layer, q, k, v, logit, state):
        nothing = jnp.zeros((k.shape[0], k.shape[2], k.shape[1]))
        return self_attention(q, k, v, positions, nothing, 0, segments, hard=True), state

    return attend


def hard_eviction(config: DMSConfig, lengths: Lengths) -> Attend:
    """An `Attend`: the hard delayed-eviction mask over whole sequences; state collects alpha `[B, K, T]` a layer."""

    def attend(layer, q, k, v, logit, state):
        positions = arange_positions(q[..., 0, 0])
        alpha = dms.shift(dms.hard_decisions(logit), config.decision_offset, lengths, False)
        alpha = dms.protect_sinks(alpha, positions, config.sinks, False)
        out = self_attention(q, k, v, positions, dms.hard_log_keep_prob(alpha), config.window, hard=True)
        return out, (*state, alpha)

    return attend


def init(key: Array, config: ModelConfig, dms_config: DMSConfig | None = None) -> Params:
    """Fresh float32 parameters (normal 0.02, norms one, gates zero)."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    model = Decoder(config, dms_config)
    variables: Any = model.init(key, tokens, tokens, causal, method="logits")
    return variables["params"]


def mean_key_bias(params: Params, config: ModelConfig, length: int) -> Float[Array, "L K D"] | None:
    """What the biases add to the keys after RoPE, averaged over `length` positions; None where they add nothing fixed.

    Qwen2's key biases are large (145 where keys are around 10) in the dims that RoPE hardly turns.
    """
    if not config.qkv_bias or config.qk_norm or config.latent:
        return None
    inverse, scale = layers.rope_frequencies(config.rope, config.head_dim)
    angles = np.arange(length)[:, None] * inverse
    cos, sin = (jnp.asarray(scale * turned.mean(axis=0), jnp.float32) for turned in (np.cos(angles), np.sin(angles)))
    biases = jnp.stack([params[f"layers_{n}"]["attn"]["k"]["bias"] for n in range(config.num_layers)])
    first, second = jnp.split(biases.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
