"""Level 1. Attention over given keys as pure functions: a dense oracle and a blockwise form with O(T) memory.

Both take what `masks.bias` takes, so one rule decides visibility on every path.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dms_jax import masks
from dms_jax.types import KeepLog, NewKV, Positions, Queries, ScoreBias


def attend(q: Queries, k: NewKV, v: NewKV, bias: ScoreBias) -> Queries:
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
    k: NewKV,
    v: NewKV,
    query_pos: Positions,
    key_pos: Int[Array, "B S"],
    keep_log: KeepLog,
    window: int,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
) -> Queries:
    """The readable oracle: the whole `[B, K, T, S]` bias at once.

    Args:
      q: `[B, T, H, D]` after RoPE; k, v: `[B, S, K, D]`.
      query_pos: `[B, T]`; key_pos: `[B, S]`, -1 for padding.
      keep_log: `[B, K, S]`, log(1 - p) of each key; 0 keeps, NEGATIVE evicts beyond the window.
      query_segments, key_segments: which of the documents packed into a row a token is of; None if a row is one.
    """
    K = k.shape[2]
    key_pos = jnp.broadcast_to(key_pos[:, None], (key_pos.shape[0], K, key_pos.shape[1]))
    return attend(q, k, v, masks.bias(query_pos, key_pos, keep_log, window, query_segments, key_segments))


def blockwise(
    q: Queries,
    k: NewKV,
    v: NewKV,
    query_pos: Positions,
    key_pos: Int[Array, "B S"],
    keep_log: Float[Array, "B K S"],
    window: int,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    block: int = 128,
) -> Queries:
    """`dense` in O(T) memory, forward and backward: one block of queries at a time, recomputed for the gradient.

    Only `[B, H, block, S]` scores are alive at once; `jax.checkpoint` keeps them from being saved.
    """
    B, T, H, D = q.shape
    if T <= block:
        return dense(q, k, v, query_pos, key_pos, keep_log, window, query_segments, key_segments)
    pad = -T % block
    blocks = (T + pad) // block
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(B, blocks, block, H, D)

    def split(x):
        # A padded query repeats a real one: it must see some key, and its row is cut off below.
        return jnp.pad(x, ((0, 0), (0, pad)), mode="edge").reshape(B, blocks, block).swapaxes(0, 1)

    segments = None if query_segments is None else split(query_segments)

    @jax.checkpoint
    def one(q_block, pos_block, segment_block):
        return dense(q_block, k, v, pos_block, key_pos, keep_log, window, segment_block, key_segments)

    out = jax.lax.map(lambda x: one(*x), (q.swapaxes(0, 1), split(query_pos), segments))
    return out.swapaxes(0, 1).reshape(B, T + pad, H, D)[:, :T]
