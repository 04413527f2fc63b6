"""Level 1. The method, one function per equation (arXiv 2506.05345, section 3)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dms_jax.config import DMSConfig
from dms_jax.types import NEGATIVE, Decisions, GateLogits, Logits, Queries


def scale_neuron(q: Queries, factor: float | Array, neuron: int, num_kv_heads: int) -> Queries:
    """Scales the borrowed neuron of the first query head of each group; factor 0 hides it from attention.

    Applied before and after RoPE, which rotates the neuron with a partner dim: the first time removes the neuron's
    own value, the second the partner's share in the neuron's place. With a q-norm the neuron still counts in the
    norm of its head.
    """
    group = q.shape[2] // num_kv_heads
    return q.at[:, :, ::group, neuron].multiply(jnp.asarray(factor, q.dtype))


def query_gate(q: Queries, num_kv_heads: int, dms: DMSConfig) -> GateLogits:
    """Eviction logits `[B, K, T]` from the borrowed neuron, `scale * q[neuron] - offset`; q before RoPE."""
    group = q.shape[2] // num_kv_heads
    return affine(q[:, :, ::group, dms.neuron], dms)


def affine(x: Float[Array, "B T K"], dms: DMSConfig) -> GateLogits:
    """`scale * x - offset` in float32, as `[B, K, T]`; with per="layer" every head follows head 0."""
    logit = dms.scale * x.astype(jnp.float32).swapaxes(1, 2) - dms.offset
    return jnp.broadcast_to(logit[:, :1], logit.shape) if dms.per == "layer" else logit


def hard_decisions(logit: GateLogits) -> Decisions:
    """Inference: alpha = (logit > 0), True means evict."""
    return logit > 0


def gumbel_sigmoid(logit: GateLogits, key: Array, tau: float) -> GateLogits:
    """Training: the noisy logit `(logit + g1 - g2) / tau`, g1, g2 ~ Gumbel(0, 1); p is its sigmoid."""
    # The difference of two Gumbel variables is a logistic one.
    return (logit + jax.random.logistic(key, logit.shape, logit.dtype)) / tau


def straight_through(noisy: GateLogits) -> GateLogits:
    """The hard value of p = sigmoid(noisy) with p's gradient: what is counted in the compression loss."""
    p = jax.nn.sigmoid(noisy)
    return p + jax.lax.stop_gradient((noisy > 0).astype(p.dtype) - p)


def keep_log(noisy: GateLogits) -> GateLogits:
    """`log(1 - p) = log_sigmoid(-noisy)`, the score bias of a key beyond the window (section 3.2)."""
    return jax.nn.log_sigmoid(-noisy)


def hard_keep_log(evicted: Decisions) -> GateLogits:
    """`keep_log` for hard decisions: 0 for kept, NEGATIVE for evicted."""
    return jnp.where(evicted, NEGATIVE, 0.0)


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
