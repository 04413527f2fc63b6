"""Paged decode attention in plain XLA: a loop over blocks of pages with an online softmax.

The fallback where no GPU kernel runs. Time and temporary memory follow the longest head, not the page table's
width, and a sequence's result does not depend on its company: blocks past its own length change nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dms_jax.kernels import quant
from dms_jax.kernels.reference import DecodeAttention, Pages
from dms_jax.types import MASK_VALUE

BLOCK = 64  # slots a step of the loop: heads are short once they are compressed, and temporaries stay in a cache


class _Sums(NamedTuple):
    """Running maximum, sum and weighted values of the online softmax; the raw scores only where asked for."""

    top: Float[Array, "B K G"]
    total: Float[Array, "B K G"]
    out: Float[Array, "B K G U"]
    scores: Float[Array, "B K G S"] | None


def paged_attention(
    q: Float[Array, "B H D"], pages: Pages, *, readable: Bool[Array, "B K P"] | None = None, weights: bool = False
) -> DecodeAttention:
    """Attention of one query a sequence over slots `[0, length)` of each head; see `kernels.paged_decode_attention`."""
    B, H, D = q.shape
    _, K, P = pages.table.shape
    G, page, U = H // K, pages.k.shape[1], pages.v.shape[2]
    n = min(max(1, BLOCK // page), P)  # pages a block
    pad = -P % n
    table = jnp.pad(pages.table, ((0, 0), (0, 0), (0, pad)))
    S = (P + pad) * page
    grouped = q.reshape(B, K, G, D)

    def read(pool, scales, ids):
        x, *scales = (jnp.take(x, ids, axis=0, mode="clip") for x in (pool, *scales) if x is not None)
        scale = None if not scales else scales[0] if len(scales) == 1 else quant.joined(*scales, U, D)
        return quant.decode(x, scale, q.dtype).reshape(B, K, n * page, pool.shape[2])

    def block(i, sums: _Sums) -> _Sums:
        ids = jax.lax.dynamic_slice_in_dim(table, i * n, n, axis=2)
        slot = i * n * page + jnp.arange(n * page)
        valid = slot < pages.lengths[..., None]
        if readable is not None:
            flags = jnp.take(readable, slot // page, axis=2, mode="fill", fill_value=False)
            valid &= flags
        k = read(pages.k, (pages.v_scale, pages.k_scale) if pages.latent else (pages.k_scale,), ids)
        scores = jnp.einsum("BKGD,BKSD->BKGS", grouped, k, preferred_element_type=jnp.float32) * D**-0.5
        scores = jnp.where(valid[:, :, None], scores, MASK_VALUE)
        top = jnp.maximum(sums.top, scores.max(axis=-1))
        p = jnp.where(valid[:, :, None], jnp.exp(scores - top[..., None]), 0.0)
        shrink = jnp.exp(sums.top - top)
        v = k[..., :U] if pages.latent else read(pages.v, (pages.v_scale,), ids)
        v = jnp.where(valid[..., None], v, 0)  # a dead slot holds anything, and 0 times NaN is NaN
        added = jnp.einsum("BKGS,BKSU->BKGU", p.astype(q.dtype), v, preferred_element_type=jnp.float32)
        kept = sums.scores
        if kept is not None:
            kept = jax.lax.dynamic_update_slice_in_dim(kept, scores, i * n * page, axis=3)
        return _Sums(top, sums.total * shrink + p.sum(axis=-1), sums.out * shrink[..., None] + added, kept)

    empty = _Sums(
        top=jnp.full((B, K, G), MASK_VALUE),
        total=jnp.zeros((B, K, G)),
        out=jnp.zeros((B, K, G, U)),
        scores=jnp.full((B, K, G, S), MASK_VALUE) if weights else None,
    )
    blocks = -(-jnp.max(pages.lengths) // (n * page))
    sums = jax.lax.fori_loop(0, blocks, block, empty)
    total = jnp.where(sums.total == 0, 1.0, sums.total)  # nothing read: the output is 0
    out = (sums.out / total[..., None]).astype(q.dtype).reshape(B, H, U)
    lse = jnp.where(sums.total == 0, -jnp.inf, sums.top + jnp.log(total)).reshape(B, H)
    if not weights:
        return DecodeAttention(out, lse, None)
    probs = jnp.exp(sums.scores - sums.top[..., None]) / total[..., None]
    by_slot = jnp.where(sums.scores > MASK_VALUE, probs, 0.0).sum(axis=2)[..., : P * page]
    return DecodeAttention(out, lse, by_slot)
