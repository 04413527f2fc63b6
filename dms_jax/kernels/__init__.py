"""The two GPU kernels behind one entry: `implementation=None` takes Triton on a GPU and jnp elsewhere.

A named implementation ("triton" or "reference") works or raises. Where None does not take Triton, paged decoding takes
`blocked`, a loop in plain XLA that keeps up with long caches. docs/kernels.md explains both kernels.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from dms_jax.config import require
from dms_jax.kernels import attention, blocked, reference
from dms_jax.kernels.attention import KeysOrValues
from dms_jax.kernels.launch import choose
from dms_jax.kernels.reference import DecodeAttention
from dms_jax.types import LogKeepProb, PerHead, Positions, Queries, Slots, Window

__all__ = ["DecodeAttention", "flash_attention", "paged_decode_attention", "paged_decode_attention_update"]

PAGE_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
QUANTIZED = ("int8", "float8_e4m3fn")
QUERY_DTYPES = ("float32", "bfloat16", "float16")
MAX_GROUP = 16


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
    implementation: str | None = None,
) -> DecodeAttention:
    """Attention of one query token a sequence over keys and values in pages; scores are scaled by D ** -0.5.

    Args:
      q: after RoPE; query head h belongs to KV head h // (H // K), at most 16 query heads to one.
      k_pages, v_pages: the pool; float32, bfloat16, float16, or int8 and float8_e4m3fn with scales.
      table: page ids of each head; slot s lies in page `table[b, k, s // page]` at `s % page`. Entries past the pages
        in use are not followed.
      lengths: live slots of each head, always the slots [0, length).
      k_scale, v_scale: float32 factor of each stored token, for quantized pages.
      readable: pages that may be read (Quest); None reads all.
      weights: also return the attention weight of each slot (for TOVA and H2O).

    Returns: DecodeAttention(out, lse, weights). Sums are float32; two runs agree bit for bit.

    Raises ConfigError for shapes or dtypes that do not fit, and for a named implementation that cannot run.
    """
    _check_decode(q, k_pages, v_pages, table, lengths, k_scale, v_scale)
    require(readable is None or readable.shape == table.shape, "readable", _shape(readable), f"expected {table.shape}")
    options: dict[str, Any] = {"k_scale": k_scale, "v_scale": v_scale, "readable": readable, "weights": weights}
    if choose(implementation) == "reference":
        if implementation is None:
            return DecodeAttention(*blocked.paged_attention(q, k_pages, v_pages, table, lengths, **options))
        return reference.paged_decode_attention(q, k_pages, v_pages, table, lengths, **options)
    from dms_jax.kernels import triton_decode

    out, lse, by_slot, _ = triton_decode.decode(q, k_pages, v_pages, table[None], lengths[None], 0, **options)
    return DecodeAttention(out, lse, by_slot)


def paged_decode_attention_update(
    q: Float[Array, "B H D"],
    k_new: Float[Array, "B K D"],
    v_new: Float[Array, "B K D"],
    k_pages: Float[Array, "N page D"],
    v_pages: Float[Array, "N page D"],
    table: Int[Array, "L B K P"],
    lengths: Int[Array, "L B K"],
    slots: Int[Array, "M B K"],
    layer: int = 0,
    *,
    weights: bool = False,
    implementation: str | None = None,
) -> tuple[DecodeAttention, Float[Array, "N page D"], Float[Array, "N page D"]]:
    """`paged_decode_attention` of one of L layers after writing each head's new key and value, in one launch.

    Table, lengths and slots are taken whole, since a kernel could read one layer's part only from a copy; with M = 1
    the slots are this layer's own. `lengths` counts the new token. A slot that is negative or no less than its length
    is not written. The pools are updated in place where the caller gives them away (donates them, or carries them
    through a scan); pages must not be quantized.

    Returns: DecodeAttention, and the pools.
    """
    require(table.ndim == 4 and len(table) > layer >= 0, "table", table.shape, f"expected [L, B, K, P], L > {layer}")
    require(lengths.shape == table.shape[:3], "lengths", lengths.shape, f"expected [L, B, K], {table.shape[:3]}")
    _check_decode(q, k_pages, v_pages, table[layer], lengths[layer], None, None)
    L, B, K, _ = table.shape
    for name, x in (("k_new", k_new), ("v_new", v_new)):
        require(x.shape == (B, K, q.shape[2]), name, x.shape, f"expected [B, K, D], {(B, K, q.shape[2])}")
    require(slots.shape in {(L, B, K), (1, B, K)}, "slots", slots.shape, f"expected {(L, B, K)} or {(1, B, K)}")
    if choose(implementation) == "reference":
        table, lengths, slots = table[layer], lengths[layer], slots[layer % len(slots)]
        slots = jnp.where(slots < lengths, slots, -1)
        k_pages = reference.write_token(k_pages, k_new, table, slots)
        v_pages = reference.write_token(v_pages, v_new, table, slots)
        out = paged_decode_attention(
            q, k_pages, v_pages, table, lengths, weights=weights, implementation=implementation
        )
        return out, k_pages, v_pages
    from dms_jax.kernels import triton_decode

    out, lse, by_slot, pools = triton_decode.decode(
        *(q, k_pages, v_pages, table, lengths, layer),
        **{"k_scale": None, "v_scale": None, "readable": None, "weights": weights, "new": (k_new, v_new, slots)},
    )
    return DecodeAttention(out, lse, by_slot), *pools


def flash_attention(
    q: Queries,
    k: KeysOrValues,
    v: KeysOrValues,
    query_pos: Positions,
    key_pos: Slots,
    log_keep_prob: LogKeepProb,
    window: Window,
    *,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B K S"] | Int[Array, "B S"] | None = None,
    hard: bool = False,
    implementation: str | None = None,
) -> Queries:
    """Attention under the delayed-eviction mask, `attention.dense` in O(T) memory; differentiable.

    Args:
      q: `[B, T, H, D]` after RoPE; k, v: `[B, S, K, D]` in q's dtype.
      query_pos: `[B, T]`; key_pos: `[B, K, S]`, -1 for an empty slot; heads may hold different positions, in any order.
      log_keep_prob: `[B, K, S]` float32, log(1 - p) of each key, added where i - j > window; MASK_VALUE evicts.
      query_segments, key_segments: no attention across different values; both or neither.
      hard: says that log_keep_prob holds only 0 and MASK_VALUE, so that tiles in which no key is visible are skipped.

    Returns: `[B, T, H, D]` in q's dtype; 0 for a query that sees no key, unless None falls back without segments,
    where such a row is arbitrary. Gradients reach q, k, v and log_keep_prob.

    Raises ConfigError for shapes that do not fit, and for a named implementation that cannot run.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    require(k.shape == (B, S, K, D) == v.shape, "k, v", (k.shape, v.shape), f"expected [B, S, K, D] with q {q.shape}")
    _check_heads(H, K)
    require(str(q.dtype) in QUERY_DTYPES, "q", str(q.dtype), f"expected one of {QUERY_DTYPES}")
    require(q.dtype == k.dtype == v.dtype, "k, v", (str(k.dtype), str(v.dtype)), f"expected q's dtype, {q.dtype}")
    require(query_pos.shape == (B, T), "query_pos", query_pos.shape, f"expected [B, T], {(B, T)}")
    for name, x in (("key_pos", key_pos), ("log_keep_prob", log_keep_prob)):
        require(x.shape == (B, K, S), name, x.shape, f"expected [B, K, S], {(B, K, S)}")
    # A window may be traced, which the reference takes.
    require(not isinstance(window, int) or window >= 0, "window", window, "must not be negative")
    given = (query_segments is not None, key_segments is not None)
    require(given[0] == given[1], "query_segments, key_segments", given, "give both or neither")
    if query_segments is not None and key_segments is not None:
        require(query_segments.shape == (B, T), "query_segments", query_segments.shape, f"expected [B, T], {(B, T)}")
        if key_segments.ndim == 2:
            key_segments = key_segments[:, None]
        key_segments = jnp.broadcast_to(key_segments, (B, K, S))
    segments: dict[str, Any] = {"query_segments": query_segments, "key_segments": key_segments}
    if choose(implementation) == "reference":
        if implementation and query_segments is None:  # so that a query that sees nothing gives 0, as in the kernel
            segments: dict[str, Any] = {
                "query_segments": jnp.zeros_like(query_pos),
                "key_segments": jnp.zeros_like(key_pos),
            }
        return attention.blockwise(q, k, v, query_pos, key_pos, log_keep_prob, window, **segments)
    from dms_jax.kernels import triton_flash

    return triton_flash.flash(q, k, v, query_pos, key_pos, log_keep_prob, window, hard=hard, **segments)


def _shape(x):
    return None if x is None else x.shape


def _check_heads(H: int, K: int) -> None:
    require(H % K == 0, "q", H, f"its heads must be a multiple of the {K} KV heads")
    require(H // K <= MAX_GROUP, "q", H, f"at most {MAX_GROUP} query heads for each of the {K} KV heads")


def _check_decode(q, k_pages, v_pages, table, lengths, k_scale, v_scale) -> None:
    B, H, D = q.shape
    require(table.ndim == 3 and table.shape[0] == B, "table", table.shape, f"expected [B, K, P] with B = {B}")
    _check_heads(H, table.shape[1])
    require(str(q.dtype) in QUERY_DTYPES, "q", str(q.dtype), f"expected one of {QUERY_DTYPES}")
    require(lengths.shape == table.shape[:2], "lengths", lengths.shape, f"expected [B, K], {table.shape[:2]}")
    same = k_pages.shape == v_pages.shape and k_pages.ndim == 3 and k_pages.shape[2] == D
    require(same, "k_pages, v_pages", (k_pages.shape, v_pages.shape), f"expected [N, page, D] twice with D = {D}")
    require(
        k_pages.dtype == v_pages.dtype and str(k_pages.dtype) in PAGE_DTYPES,
        "k_pages, v_pages",
        (str(k_pages.dtype), str(v_pages.dtype)),
        f"expected one dtype of {PAGE_DTYPES}",
    )
    quantized = str(k_pages.dtype) in QUANTIZED
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        wanted = k_pages.shape[:2] if quantized else None
        require(_shape(scale) == wanted, name, _shape(scale), f"expected {wanted} for pages of {k_pages.dtype}")
