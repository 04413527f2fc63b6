"""Level 2. What the kernels compute, in jnp: the fallback without a GPU, and what they are tested against."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from dms_jax import masks
from dms_jax.types import NEGATIVE, KeepLog, NewKV, PerHead, Positions, Queries, Slots


class DecodeAttention(NamedTuple):
    """Attention of one query token a sequence.

    Attributes:
      out: `[B, H, D]` in q's dtype; 0 where a head has no live slot.
      lse: `[B, H]` float32, natural log of the sum of exp(score); -inf where a head has no live slot.
      weights: `[B, K, P * page]` float32, the softmax weight of each slot summed over the G query heads of its KV
        head, 0 for slots not read; None unless asked for.
    """

    out: Float[Array, "B H D"]
    lse: Float[Array, "B H"]
    weights: Float[Array, "B K S"] | None


def gather_pages(
    pages: Shaped[Array, "N page D"], table: Int[Array, "B K P"], live: Bool[Array, "B K S"], scale=None
) -> Float[Array, "B K S D"]:
    """The stored keys or values of each head in slot order, float32, 0 in dead slots (their pages hold anything)."""
    B, K, P = table.shape
    _, page, D = pages.shape
    rows = jnp.take(pages, table, axis=0, mode="clip").astype(jnp.float32)
    if scale is not None:
        rows = rows * jnp.take(scale, table, axis=0, mode="clip")[..., None]
    return jnp.where(live[..., None], rows.reshape(B, K, P * page, D), 0.0)


def paged_decode_attention(
    q: Float[Array, "B H D"],
    k_pages: Shaped[Array, "N page D"],
    v_pages: Shaped[Array, "N page D"],
    table: Int[Array, "B K P"],
    lengths: PerHead,
    *,
    k_scale: Float[Array, "N page"] | None = None,
    v_scale: Float[Array, "N page"] | None = None,
    readable: Bool[Array, "B K P"] | None = None,
    weights: bool = False,
) -> DecodeAttention:
    """`kernels.paged_decode_attention` by gathering every page: `[B, K, P * page, D]` float32 copies."""
    B, H, D = q.shape
    K, P, page = table.shape[1], table.shape[2], k_pages.shape[1]
    live = jnp.arange(P * page)[None, None, :] < lengths[..., None]
    if readable is not None:
        live &= jnp.repeat(readable, page, axis=2)
    k = gather_pages(k_pages, table, live, k_scale)
    v = gather_pages(v_pages, table, live, v_scale)
    queries = q.reshape(B, K, H // K, D).astype(jnp.float32)
    scores = jnp.einsum("BKGD,BKSD->BKGS", queries, k, precision="highest") * D**-0.5
    scores = jnp.where(live[:, :, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    p = jnp.where(live[:, :, None], jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), 0.0)
    out = jnp.einsum("BKGS,BKSD->BKGD", p, v, precision="highest")
    return DecodeAttention(out.reshape(B, H, D).astype(q.dtype), lse.reshape(B, H), p.sum(axis=2) if weights else None)


def write_token(
    pages: Shaped[Array, "N page D"], new: Shaped[Array, "B K D"], table: Int[Array, "B K P"], slots: PerHead
) -> Shaped[Array, "N page D"]:
    """The pool with each head's new key or value in its slot; a negative slot writes nothing."""
    N, page, _ = pages.shape
    ids = jnp.take_along_axis(table, (jnp.maximum(slots, 0) // page)[..., None], axis=2)[..., 0]
    ids = jnp.where(slots < 0, N, ids)  # past the pool: dropped
    return pages.at[ids, slots % page].set(new.astype(pages.dtype), mode="drop")


def flash_attention(
    q: Queries,
    k: NewKV,
    v: NewKV,
    query_pos: Positions,
    key_pos: Slots,
    keep_log: KeepLog,
    window: int,
    *,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B K S"] | None = None,
    block: int = 128,
) -> Queries:
    """`kernels.flash_attention`, one block of queries at a time, recomputed for the gradient."""
    B, T, H, D = q.shape
    if query_segments is None or key_segments is None:
        query_segments, key_segments = jnp.zeros_like(query_pos), jnp.zeros_like(key_pos)
    if T <= block:
        return _dense(q, k, v, query_pos, key_pos, keep_log, window, query_segments, key_segments)
    pad = -T % block

    def blocks(x):  # [B, T, ...] -> [blocks, B, block, ...]; the rows added are cut off below
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2), mode="edge")
        return x.reshape(B, -1, block, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(xs):
        q, query_pos, query_segments = xs
        return _dense(q, k, v, query_pos, key_pos, keep_log, window, query_segments, key_segments)

    out = jax.lax.map(one, (blocks(q), blocks(query_pos), blocks(query_segments)))
    return out.swapaxes(0, 1).reshape(B, T + pad, H, D)[:, :T]


def _dense(q, k, v, query_pos, key_pos, keep_log, window, query_segments, key_segments):
    """All `[B, K, T, S]` scores at once; a query that sees no key gives 0."""
    B, T, H, D = q.shape
    K = k.shape[2]
    bias = masks.bias(query_pos, key_pos, keep_log, window)
    bias = jnp.where(query_segments[:, None, :, None] == key_segments[:, :, None, :], bias, NEGATIVE)
    seen = (bias > NEGATIVE / 2)[:, :, None]
    q = q.reshape(B, T, K, H // K, D)
    scores = jnp.einsum("BTKGD,BSKD->BKGTS", q, k, preferred_element_type=jnp.float32) * D**-0.5
    weights = jnp.where(seen, jax.nn.softmax(scores + bias[:, :, None], axis=-1), 0.0).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKD->BTKGD", weights, v).reshape(B, T, H, D)
