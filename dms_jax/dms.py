"""Dynamic Memory Sparsification on one page: a function for each equation (arXiv 2506.05345, section 3).

The delayed-eviction mask, which every attention path is tested against:

    key `j` is visible to query `i` iff `j <= i` and (`i - j <= w` or not `alpha_j`)

A decision is read off the token `o` places later (`decision_offset`), so `alpha_j` is known once token `j + o` has
been seen, and `o <= w + 1` makes sure that this is no later than when it is needed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from dms_jax.config import DMSConfig
from dms_jax.types import (
    MASK_VALUE,
    Counts,
    GateLogits,
    Lengths,
    Logits,
    Queries,
    ScoreBias,
    SlotFlags,
    Slots,
    Visible,
    Window,
)


def scale_neuron(q: Queries, factor: float | Array, neuron: int, num_kv_heads: int) -> Queries:
    """Scales the borrowed neuron of the first query head of each group; factor 0 hides it from attention.

    Applied before and after RoPE, which rotates the neuron with a partner dim: the first time removes the neuron's
    own value, the second the partner's share in the neuron's place. With a q-norm the neuron still counts in the
    norm of its head.
    """
    group = q.shape[2] // num_kv_heads
    return q.at[:, :, ::group, neuron].multiply(jnp.asarray(factor, q.dtype))


def query_gate(q: Queries, num_kv_heads: int, dms: DMSConfig) -> GateLogits:
    """Eviction logits `[B, K, T]` from the borrowed neuron, `scale * q[neuron] - logit_bias`; q before RoPE."""
    group = q.shape[2] // num_kv_heads
    return affine(q[:, :, ::group, dms.neuron], dms)


def affine(x: Float[Array, "B T K"], dms: DMSConfig) -> GateLogits:
    """`scale * x - logit_bias` in float32, as `[B, K, T]`; with per="layer" every head follows head 0.

    With gate_dtype="model" both operations round to x's dtype: in bfloat16 a logit just above 0 may become 0.
    """
    x32 = x.astype(jnp.float32).swapaxes(1, 2)
    if dms.gate_dtype == "model":
        digits = jnp.finfo(x.dtype)  # a cast there and back is not enough: XLA may leave it out
        product = jax.lax.reduce_precision(dms.scale * x32, digits.nexp, digits.nmant)
        logit = jax.lax.reduce_precision(product - dms.logit_bias, digits.nexp, digits.nmant)
    else:
        logit = dms.scale * x32 - dms.logit_bias
    return jnp.broadcast_to(logit[:, :1], logit.shape) if dms.per == "layer" else logit


def hard_decisions(logit: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Inference: alpha = (logit > 0), True means evict."""
    return logit > 0


def gumbel_sigmoid(logit: Float[Array, "..."], key: Array, tau: float) -> Float[Array, "..."]:
    """Training: the noisy logit `(logit + g1 - g2) / tau`, g1, g2 ~ Gumbel(0, 1); p is its sigmoid."""
    # The difference of two Gumbel variables is a logistic one.
    return (logit + jax.random.logistic(key, logit.shape, logit.dtype)) / tau


def straight_through(noisy: Float[Array, "..."]) -> Float[Array, "..."]:
    """The hard value of p = sigmoid(noisy) with p's gradient: what is counted in the compression loss."""
    p = jax.nn.sigmoid(noisy)
    return p + jax.lax.stop_gradient((noisy > 0).astype(p.dtype) - p)


def log_keep_prob(noisy: Float[Array, "..."]) -> Float[Array, "..."]:
    """`log(1 - p) = log_sigmoid(-noisy)`, the score bias of a key beyond the window (section 3.2)."""
    return jax.nn.log_sigmoid(-noisy)


def hard_log_keep_prob(evicted: Bool[Array, "..."]) -> Float[Array, "..."]:
    """`log_keep_prob` for hard decisions: 0 for kept, MASK_VALUE for evicted."""
    return jnp.where(evicted, MASK_VALUE, 0.0)


def visible(
    query_pos: Int[Array, "B T"], key_pos: Int[Array, "B K S"], evicted: Shaped[Array, "B K S"], window: Window
) -> Visible:
    """`[B, K, T, S]` bool, True where the key may be read; a key with position -1 is an empty slot."""
    i = query_pos[:, None, :, None]
    j = key_pos[:, :, None, :]
    return (j >= 0) & (j <= i) & ((i - j <= window) | ~evicted[:, :, None, :])


def bias(
    query_pos: Int[Array, "B T"],
    key_pos: Int[Array, "B K S"],
    log_keep_prob: Float[Array, "B K S"],
    window: Window,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B K S"] | None = None,
) -> ScoreBias:
    """The soft form of `visible`, `[B, K, T, S]` float: what is added to the attention scores.

    0 inside the window, `log_keep_prob = log(1 - p_j)` beyond it, MASK_VALUE where `visible` is False for every p.
    With `log_keep_prob` in {0, MASK_VALUE} it is the hard mask. Where documents are packed into a row, each is a
    segment with positions of its own, and nothing is visible across segments.
    """
    i = query_pos[:, None, :, None]
    j = key_pos[:, :, None, :]
    delayed = jnp.where(i - j <= window, 0.0, log_keep_prob[:, :, None, :])
    seen = (j >= 0) & (j <= i)
    if query_segments is not None and key_segments is not None:
        seen &= query_segments[:, None, :, None] == key_segments[:, :, None, :]
    return jnp.where(seen, delayed, MASK_VALUE)


def shift(values: Shaped[Array, "B K T"], offset: Window, lengths: Lengths, kept) -> Shaped[Array, "B K T"]:
    """Gives token j what was predicted at token j + offset; `kept` where that token has not been seen.

    With offset 1 and three real tokens of four: [a b c -] -> [b c kept kept].
    """
    real = jnp.arange(values.shape[-1]) < lengths[:, None]
    return shift_segments(values, offset, real.astype(jnp.int32), kept)


def shift_segments(
    values: Shaped[Array, "B K T"], offset: Window, segments: Int[Array, "B T"], kept
) -> Shaped[Array, "B K T"]:
    """`shift` in rows of packed documents: `kept` where token j + offset is of another document, or padding.

    With offset 1, two documents and padding, segments [1 1 1 2 2 0]: [a b c d e -] -> [b c kept e kept kept].
    """
    T = values.shape[-1]
    source = jnp.arange(T) + offset
    index = jnp.minimum(source, T - 1)
    same = (source < T) & (jnp.take(segments, index, axis=1) == segments) & (segments > 0)
    return jnp.where(same[:, None], jnp.take(values, index, axis=-1), kept)


def protect_sinks(
    values: Shaped[Array, "B K T"], positions: Int[Array, "B T"], sinks: int, kept
) -> Shaped[Array, "B K T"]:
    """Decisions or logits with `kept` for the first `sinks` tokens of each sequence (or packed document).

    With sinks 1, positions [0 1 2 0 1]: [a b c d e] -> [kept b c kept e].
    """
    return jnp.where((positions < sinks)[:, None], kept, values) if sinks else values


def live_counts(key_pos: Slots, evicted: SlotFlags, start: Counts, T: int, window: Window) -> Int[Array, "B K T"]:
    """How many keys each of the queries at `start + 0 .. start + T - 1` sees, `[B, K, T]`, in O(S + T).

    A key comes in at its position and, if marked, leaves w + 1 later. With w = 1, start = 0 and evicted = [1 0 0 1]:
    come 1 1 1 1, leave 0 0 1 0, live 1 2 2 3.
    """
    first = start[:, None, None]
    come = jnp.where(key_pos >= 0, jnp.clip(key_pos - first, 0, T), T)
    leave = jnp.where(evicted & (key_pos >= 0), jnp.clip(key_pos + window + 1 - first, 0, T), T)
    B, K, _ = key_pos.shape
    b, h = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    change = jnp.zeros((B, K, T + 1), jnp.int32).at[b, h, come].add(1).at[b, h, leave].add(-1)
    return jnp.cumsum(change[..., :T], axis=-1)


def target_cr(step: float | Array, steps_per_cr: float, max_cr: float) -> float | Array:
    """The schedule `CR(t) = 1 + t / steps_per_cr` (paper: 100), held at `max_cr`."""
    return jnp.minimum(1.0 + step / steps_per_cr, max_cr)


def target_alpha(cr: float | Array) -> float | Array:
    """`alpha* = 1 - 1 / CR`, the share of tokens to be evicted."""
    return 1.0 - 1.0 / cr


def compression_loss(alpha_target: float | Array, alpha_mean: float | Array) -> Array:
    """`max(alpha* - mean(alpha), 0)`: one-sided, evicting more than asked costs nothing."""
    return jnp.maximum(alpha_target - alpha_mean, 0.0)


def kl(teacher: Logits, student: Logits, direction: str = "forward") -> Float[Array, "B T"]:
    """KL per token in nats. "forward" is KL(teacher, student); "reverse" is KL(student, teacher)."""
    log_p = jax.nn.log_softmax(teacher.astype(jnp.float32))
    log_q = jax.nn.log_softmax(student.astype(jnp.float32))
    if direction == "reverse":
        log_p, log_q = log_q, log_p
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
