"""Attention over given keys as pure functions: a dense oracle and a blockwise form with O(T) memory.

Both take what `dms.bias` takes, so one rule decides visibility on every path.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dms_jax import dms
from dms_jax.types import MASK_VALUE, LogKeepProb, Positions, Queries, ScoreBias, Slots, Window

KeysOrValues = Float[Array, "B S K D"]  # of S keys, in the order of the tokens


def attend(q: Queries, k: KeysOrValues, v: KeysOrValues, bias: ScoreBias) -> Queries:
    """Softmax attention with an additive bias; `[B, T, H, D]`. Scores and softmax are float32.

    Grouped-query: the G query heads of a KV head are folded into one axis, keys are never repeated.
    """
    B, T, H, D = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, H // K, D)
    scores = jnp.einsum("BTKGD,BSKD->BKGTS", q, k, preferred_element_type=jnp.float32) * D**-0.5
    weights = jax.nn.softmax(scores + bias[:, :, None], axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKD->BTKGD", weights, v).reshape(B, T, H, D)


def dense(
    q: Queries,
    k: KeysOrValues,
    v: KeysOrValues,
    query_pos: Positions,
    key_pos: Int[Array, "B *K S"],
    log_keep_prob: LogKeepProb,
    window: Window,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B *K S"] | None = None,
) -> Queries:
    """The readable oracle: the whole `[B, K, T, S]` bias at once.

    Args:
      q: `[B, T, H, D]` after RoPE; k, v: `[B, S, K, D]`.
      query_pos: `[B, T]`; key_pos: `[B, S]`, or `[B, K, S]` where heads hold different tokens; -1 for padding.
      log_keep_prob: `[B, K, S]`, log(1 - p) of each key; 0 keeps, MASK_VALUE evicts beyond the window.
      query_segments, key_segments: which of the documents packed into a row a token is of; None if a row is one.
        With segments a query that sees no key gives 0.
    """
    K = k.shape[2]
    key_segments = None if key_segments is None else per_head(key_segments, K)
    bias = dms.bias(query_pos, per_head(key_pos, K), log_keep_prob, window, query_segments, key_segments)
    out = attend(q, k, v, bias)
    if query_segments is None:
        return out
    # With segments a row may hold padding that sees nothing at all, where a softmax would read everything alike.
    seen = jnp.any(bias > MASK_VALUE / 2, axis=-1).swapaxes(1, 2)  # [B, T, K]
    return jnp.where(jnp.repeat(seen, q.shape[2] // K, axis=2)[..., None], out, 0)


def per_head(key_pos: Int[Array, "B *K S"], heads: int) -> Slots:
    """`[B, S]` positions for every head, `[B, K, S]`; what has that shape already stays as it is."""
    if key_pos.ndim == 3:
        return key_pos
    return jnp.broadcast_to(key_pos[:, None], (key_pos.shape[0], heads, key_pos.shape[1]))


def blockwise(
    q: Queries,
    k: KeysOrValues,
    v: KeysOrValues,
    query_pos: Positions,
    key_pos: Int[Array, "B *K S"],
    log_keep_prob: Float[Array, "B K S"],
    window: Window,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B *K S"] | None = None,
    block: int = 128,
) -> Queries:
    """`dense` in O(T) memory, forward and backward: one block of queries at a time, recomputed for the gradient.

    Only `[B, H, block, S]` scores are alive at once; `jax.checkpoint` keeps them from being saved.
    """
    B, T, H, D = q.shape
    if T <= block:
        return dense(q, k, v, query_pos, key_pos, log_keep_prob, window, query_segments, key_segments)
    pad = -T % block
    blocks = (T + pad) // block
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(B, blocks, block, H, D)

    def split(x):
        # A padded query repeats a real one: it must see some key, and its row is cut off below.
        return jnp.pad(x, ((0, 0), (0, pad)), mode="edge").reshape(B, blocks, block).swapaxes(0, 1)

    segments = None if query_segments is None else split(query_segments)

    @jax.checkpoint
    def one(q_block, pos_block, segment_block):
        return dense(q_block, k, v, pos_block, key_pos, log_keep_prob, window, segment_block, key_segments)

    out = jax.lax.map(lambda x: one(*x), (q.swapaxes(0, 1), split(query_pos), segments))
    return out.swapaxes(0, 1).reshape(B, T + pad, H, D)[:, :T]


def key_weights(
    q: Queries,
    k: KeysOrValues,
    query_pos: Positions,
    key_pos: Slots,
    counted: Float[Array, "B T"],
    block: int = 128,
) -> Float[Array, "B K S"]:
    """Causal attention weight that each key gets, summed over the G query heads and over the queries counted.

    What H2O and TOVA see of a prompt. One block of queries at a time, as in `blockwise`.
    """
    B, T, H, D = q.shape
    K = k.shape[2]
    pad = -T % block
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(B, -1, block, K, H // K, D)
    query_pos = jnp.pad(query_pos, ((0, 0), (0, pad)), mode="edge").reshape(B, -1, block)
    counted = jnp.pad(counted, ((0, 0), (0, pad))).reshape(B, -1, block)
    keep = jnp.zeros(key_pos.shape)

    def add(total, piece):
        q_block, pos_block, counted_block = piece
        scores = jnp.einsum("BTKGD,BSKD->BKGTS", q_block, k, preferred_element_type=jnp.float32) * D**-0.5
        weights = jax.nn.softmax(scores + dms.bias(pos_block, key_pos, keep, 0)[:, :, None], axis=-1)
        return total + jnp.einsum("BKGTS,BT->BKS", weights, counted_block), None

    pieces = (q.swapaxes(0, 1), query_pos.swapaxes(0, 1), counted.swapaxes(0, 1))
    return jax.lax.scan(add, jnp.zeros(key_pos.shape), pieces)[0]
