"""What the kernels compute, in jnp: the fallback without a GPU, and what they are tested against."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from dms_jax.types import PerHead


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
