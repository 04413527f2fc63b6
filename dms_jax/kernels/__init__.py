"""The two GPU kernels behind one entry: `implementation=None` takes Triton on a GPU and jnp elsewhere.

A named implementation ("triton" or "reference") works or raises. On Hopper None takes Pallas for flash attention where
the shapes fit. Where it takes no kernel, paged decoding runs `blocked`, a loop in plain XLA that keeps up with long
caches. docs/kernels.md explains the kernels.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dms_jax.config import MAX_GROUP, MAX_LATENT_GROUP, require
from dms_jax.kernels import attention, blocked, reference
from dms_jax.kernels.attention import EvictionMask, OrderedKeys, OrderedValues
from dms_jax.kernels.launch import choose
from dms_jax.kernels.reference import DecodeAttention, Pages
from dms_jax.types import Attended, PerHeadKeys, PerHeadValues, Queries

__all__ = [
    "DecodeAttention",
    "EvictionMask",
    "Pages",
    "flash_attention",
    "paged_decode_attention",
    "paged_decode_attention_update",
]

QUERY_DTYPES = ("float32", "bfloat16", "float16")


def paged_decode_attention(
    q: Float[Array, "B H D"],
    pages: Pages,
    *,
    readable: Bool[Array, "B K P"] | None = None,
    weights: bool = False,
    implementation: str | None = None,
) -> DecodeAttention:
    """Attention of one query token a sequence over keys and values in pages; scores are scaled by D ** -0.5.

    Args:
      q: after RoPE; query head h belongs to KV head h // (H // K), at most 16 query heads to one, or 128 where values
        are a part of the keys.
      pages: of one layer, with a table `[B, K, P]`.
      readable: pages that may be read (Quest); None reads all.
      weights: also return the attention weight of each slot (for TOVA and H2O).

    Returns: DecodeAttention(out, lse, weights). Sums are float32; two runs agree bit for bit.

    Raises ConfigError for shapes or dtypes that do not fit, and for a named implementation that cannot run.
    """
    pages.check(q.shape)
    _check_queries(q, pages.table.shape[1], pages.latent)
    shape = None if readable is None else readable.shape
    require(shape in {None, pages.table.shape}, "readable", shape, f"expected {pages.table.shape}")
    if choose(implementation) == "reference":
        attend = blocked.paged_attention if implementation is None else reference.paged_decode_attention
        return attend(q, pages, readable=readable, weights=weights)
    from dms_jax.kernels import triton_decode

    return triton_decode.decode(q, pages, readable=readable, weights=weights)[0]


def paged_decode_attention_update(
    q: Float[Array, "B H D"],
    k_new: PerHeadKeys,
    v_new: PerHeadValues,
    pages: Pages,
    slots: Int[Array, "M B K"],
    layer: int = 0,
    *,
    weights: bool = False,
    implementation: str | None = None,
) -> tuple[DecodeAttention, Pages]:
    """`paged_decode_attention` of one of L layers after writing each head's new key and value, in one launch.

    Tables `[L, B, K, P]`, lengths and slots are taken whole, since a kernel could read one layer's part only from a
    copy; with M = 1 the slots are this layer's own. The lengths count the new token. A slot that is negative or no less
    than its length is not written. The pools are updated in place where the caller gives them away (donates them, or
    carries them through a scan); pages must not be quantized.

    Returns: DecodeAttention, and the pages with what was written.
    """
    pages.check(q.shape, layer)
    require(pages.k_scale is None, "pages.k", str(pages.k.dtype), "quantized pages are not updated here")
    L, B, K, _ = pages.table.shape
    _check_queries(q, K, pages.latent)
    for name, x, pool in (("k_new", k_new, pages.k), ("v_new", v_new, pages.v)):
        shape = (B, K, pool.shape[2])
        require(x.shape == shape, name, x.shape, f"expected {shape}")
    require(slots.shape in {(L, B, K), (1, B, K)}, "slots", slots.shape, f"expected {(L, B, K)} or {(1, B, K)}")
    if choose(implementation) == "reference":
        own, slots = pages.of_layer(layer), slots[layer % len(slots)]
        slots = jnp.where(slots < own.lengths, slots, -1)
        k = reference.write_token(pages.k, k_new, own.table, slots)
        v = pages.v if pages.latent else reference.write_token(pages.v, v_new, own.table, slots)
        own = own._replace(k=k, v=v)
        out = paged_decode_attention(q, own, weights=weights, implementation=implementation)
        return out, pages._replace(k=k, v=v)
    from dms_jax.kernels import triton_decode

    return triton_decode.decode(q, pages, layer, weights=weights, new=(k_new, v_new, slots))


def flash_attention(
    q: Queries,
    k: OrderedKeys,
    v: OrderedValues,
    mask: EvictionMask,
    *,
    hard: bool = False,
    implementation: str | None = None,
) -> Attended:
    """Attention under the delayed-eviction mask, `attention.dense` in O(T) memory; differentiable.

    Args:
      q: `[B, T, H, D]` after RoPE; k, v: `[B, S, K, D]` in q's dtype. Values may be narrower than keys, with up to
        128 query heads to a KV head; for this there is no kernel, and None takes the reference.
      hard: says that log_keep_prob holds only 0 and MASK_VALUE, so that tiles in which no key is visible are skipped.

    Returns: `[B, T, H, U]` in q's dtype; 0 for a query that sees no key, unless None falls back without segments,
    where such a row is arbitrary. Gradients reach q, k, v and log_keep_prob.

    Raises ConfigError for shapes that do not fit, and for a named implementation that cannot run.
    """
    require(q.ndim == 4, "q", q.shape, "expected [B, T, H, D]")
    (B, T, _, D), (S, K) = q.shape, k.shape[1:3]
    latent = v.shape[-1] < D
    fits = k.shape == (B, S, K, D) and v.shape == (B, S, K, min(v.shape[-1], D))
    require(fits, "k, v", (k.shape, v.shape), f"expected [B, S, K, D] and no wider values with q {q.shape}")
    _check_queries(q, K, latent)
    named = implementation == "triton" and latent
    require(not named, "v", v.shape, f"the kernel needs values as wide as keys, {D}")
    require(q.dtype == k.dtype == v.dtype, "k, v", (str(k.dtype), str(v.dtype)), f"expected q's dtype, {q.dtype}")
    mask.check(B, T, K, S)
    mask = mask.per_head()
    if latent or choose(implementation) == "reference":
        # With segments a query that sees nothing gives 0, as in the kernel.
        named = implementation is not None and mask.query_segments is None
        return attention.blockwise(q, k, v, mask.one_segment() if named else mask)
    from dms_jax.kernels import mosaic_flash, triton_flash

    faster = implementation is None and mosaic_flash.fits(q, k)
    return (mosaic_flash if faster else triton_flash).flash(q, k, v, mask, hard=hard)


def _check_queries(q, K: int, latent: bool) -> None:
    H, most = q.shape[-2], MAX_LATENT_GROUP if latent else MAX_GROUP
    require(H % K == 0, "q", H, f"its heads must be a multiple of the {K} KV heads")
    require(H // K <= most, "q", H, f"at most {most} query heads for each of the {K} KV heads")
    require(str(q.dtype) in QUERY_DTYPES, "q", str(q.dtype), f"expected one of {QUERY_DTYPES}")
