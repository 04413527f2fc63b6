"""What the kernels compute, in jnp: the fallback without a GPU, and what they are tested against."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from dms_jax.config import require
from dms_jax.kernels import quant
from dms_jax.types import PerHead

PAGE_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
QUANTIZED = ("int8", "float8_e4m3fn")


class Pages(NamedTuple):
    """Keys and values in pages, and where those of each head lie: of one layer, or stacked for L layers.

    Attributes:
      k, v: the pool of all layers; float32, bfloat16, float16, or int8 and float8_e4m3fn with scales. A v whose pages
        have no slots, `[N, 0, U]`, says that a value is the first U numbers of its key (latent attention).
      table: page ids of each head; slot s lies in page `table[b, k, s // page]` at `s % page`. Entries past the pages
        in use are not followed.
      lengths: live slots of each head, always the slots [0, length).
      k_scale, v_scale: float32 factor of each stored token, for quantized pages; of latent entries v_scale is that of
        the first U numbers and k_scale that of the others.
    """

    k: Shaped[Array, "N page D"]
    v: Shaped[Array, "N vpage U"]
    table: Int[Array, "*L B K P"]
    lengths: Int[Array, "*L B K"]
    k_scale: Float[Array, "N page"] | None = None
    v_scale: Float[Array, "N page"] | None = None

    @property
    def latent(self) -> bool:
        """Whether values are a part of the keys."""
        return self.v.shape[1] == 0

    def of_layer(self, layer: int) -> "Pages":
        """Those of one of L layers."""
        return self._replace(table=self.table[layer], lengths=self.lengths[layer])

    def check(self, queries: tuple[int, ...], layer: int | None = None) -> None:
        """ConfigError for shapes or dtypes that do not fit queries `[B, H, D]`; layer: of tables of all layers."""
        require(len(queries) == 3, "q", queries, "expected [B, H, D]")
        batch, _, head_dim = queries
        for name, x in (("pages.table", self.table), ("pages.lengths", self.lengths)):
            require(x.dtype == jnp.int32, name, str(x.dtype), "expected int32")
        table, letters = self.table, "B, K, P" if layer is None else f"L > {layer}, B, K, P"
        fits = table.ndim == 3 if layer is None else table.ndim == 4 and len(table) > layer >= 0
        fits = fits and table.shape[-3] == batch
        require(fits, "pages.table", table.shape, f"expected [{letters}] with B = {batch}")
        heads = table.shape[:-1]
        require(self.lengths.shape == heads, "pages.lengths", self.lengths.shape, f"expected {heads}")
        shapes, dtypes = (self.k.shape, self.v.shape), (str(self.k.dtype), str(self.v.dtype))
        same = self.k.ndim == self.v.ndim == 3 and shapes[0][2] == head_dim
        own = shapes[1] in (shapes[0], (shapes[0][0], 0, min(shapes[1][-1], head_dim)))
        expected = (
            f"expected [N, page, D] twice with D = {head_dim}, or [N, 0, U] for values that are a part of the keys"
        )
        require(same and own, "pages.k, pages.v", shapes, expected)
        known = dtypes[0] == dtypes[1] and dtypes[0] in PAGE_DTYPES
        require(known, "pages.k, pages.v", dtypes, f"expected one dtype of {PAGE_DTYPES}")
        quantized = dtypes[0] in QUANTIZED
        even = not quantized or shapes[0][2] % 2 == shapes[1][2] % 2 == 0
        require(even, "pages.k, pages.v", shapes, "D and U must be even: quantized numbers are read in pairs")
        wanted = shapes[0][:2] if quantized else None
        for name, scale in (("pages.k_scale", self.k_scale), ("pages.v_scale", self.v_scale)):
            shape = None if scale is None else scale.shape
            require(shape == wanted, name, shape, f"expected {wanted} for pages of {dtypes[0]}")


class DecodeAttention(NamedTuple):
    """Attention of one query token a sequence.

    Attributes:
      out: `[B, H, U]` in q's dtype; 0 where a head has no live slot.
      lse: `[B, H]` float32, natural log of the sum of exp(score); -inf where a head has no live slot.
      weights: `[B, K, P * page]` float32, the softmax weight of each slot summed over the G query heads of its KV
        head, 0 for slots not read; None unless asked for.
    """

    out: Float[Array, "B H U"]
    lse: Float[Array, "B H"]
    weights: Float[Array, "B K S"] | None


def gather_pages(
    pages: Shaped[Array, "N page D"], table: Int[Array, "B K P"], live: Bool[Array, "B K S"], scale=None
) -> Float[Array, "B K S D"]:
    """The stored keys or values of each head in slot order, float32, 0 in dead slots (their pages hold anything)."""
    B, K, P = table.shape
    _, page, D = pages.shape
    rows = jnp.take(pages, table, axis=0, mode="clip")
    rows = quant.decode(rows, None if scale is None else jnp.take(scale, table, axis=0, mode="clip"), jnp.float32)
    return jnp.where(live[..., None], rows.reshape(B, K, P * page, D), 0.0)


def paged_decode_attention(
    q: Float[Array, "B H D"], pages: Pages, *, readable: Bool[Array, "B K P"] | None = None, weights: bool = False
) -> DecodeAttention:
    """`kernels.paged_decode_attention` by gathering every page: `[B, K, P * page, D]` float32 copies."""
    B, H, D = q.shape
    K, P, page = *pages.table.shape[1:], pages.k.shape[1]
    live = jnp.arange(P * page)[None, None, :] < pages.lengths[..., None]
    if readable is not None:
        live &= jnp.repeat(readable, page, axis=2)
    U, k_scale = pages.v.shape[2], pages.k_scale
    if pages.latent and k_scale is not None:
        k_scale = quant.joined(pages.v_scale, k_scale, U, D)
    k = gather_pages(pages.k, pages.table, live, k_scale)
    v = k[..., :U] if pages.latent else gather_pages(pages.v, pages.table, live, pages.v_scale)
    queries = q.reshape(B, K, H // K, D).astype(jnp.float32)
    scores = jnp.einsum("BKGD,BKSD->BKGS", queries, k, precision="highest") * D**-0.5
    scores = jnp.where(live[:, :, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    p = jnp.where(live[:, :, None], jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), 0.0)
    out = jnp.einsum("BKGS,BKSU->BKGU", p, v, precision="highest").reshape(B, H, -1)
    return DecodeAttention(out.astype(q.dtype), lse.reshape(B, H), p.sum(axis=2) if weights else None)


def write_token(
    pages: Shaped[Array, "N page D"], new: Shaped[Array, "B K D"], table: Int[Array, "B K P"], slots: PerHead
) -> Shaped[Array, "N page D"]:
    """The pool with each head's new key or value in its slot; a negative slot writes nothing."""
    N, page, _ = pages.shape
    ids = jnp.take_along_axis(table, (jnp.maximum(slots, 0) // page)[..., None], axis=2)[..., 0]
    ids = jnp.where(slots < 0, N, ids)  # past the pool: dropped
    return pages.at[ids, slots % page].set(new.astype(pages.dtype), mode="drop")
