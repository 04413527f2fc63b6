"""A paged cache: live slots of a head are always [0, length), in pages from one pool. Memory falls by CR.

A new token is stored in its victim's slot, or in the next fresh one; a head takes a page when its length crosses a
page's edge. With page_size = 2, a head of 3 tokens, pages 7 and 4 of the pool, and free pages 0, 5 (the stack's top
last):

    table   [7 4 - -]   length 3   slots: page 7: 0 1, page 4: 2 .     free [0 5 ...] top 2
    + 1     [7 4 - -]   length 4   slots: page 7: 0 1, page 4: 2 3     free [0 5 ...] top 2
    + 1     [7 4 5 -]   length 5   slots: ..., page 5: 4 .             free [0 ...]   top 1

The pool is shared by all layers, sequences and KV heads. Nothing here fails for want of a page: `can_append` says
beforehand which sequences surely have room for a step, and a caller of `write_prefill` or `fork` must see to it that
`pages_needed` of them are to be had.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from dms_jax import kernels
from dms_jax.cache.base import DecodeQuery, KVCache, Pool, View, compacted
from dms_jax.config import CacheConfig, ModelConfig, require
from dms_jax.kernels import quant
from dms_jax.types import Counts, Layer, NewKeys, NewValues, Positions, SlotFlags, Slots


class PagedArrays(NamedTuple):
    """The pool (N pages), and for each layer, sequence and head its pages and its length.

    Where a value is the first U numbers of its key, the pages of v have no slots, `[N, 0, U]`.
    """

    k: Num[Array, "N page D"]
    v: Num[Array, "N page U"]
    pos: Int[Array, "N page"]
    k_scale: Float[Array, "N page"] | None  # only where keys and values are quantized
    v_scale: Float[Array, "N page"] | None
    k_offset: Float[Array, "L K D"] | None  # subtracted from keys before they are quantized
    table: Int[Array, "L B K P"]  # page ids; arbitrary past the head's pages
    length: Int[Array, "L B K"]
    free: Int[Array, "N"]  # a stack of page ids, of which free[:top] are free
    top: Int[Array, ""]


@dataclass(frozen=True)
class PagedCache(KVCache):
    """A cache of at most `capacity` slots a head, in a pool of as many pages as `allocate` is given."""

    @property
    def table_width(self) -> int:
        """P, pages that a head may have."""
        return pages_of(self.config.capacity, self.config.page_size)

    @property
    def slots(self) -> int:
        return self.table_width * self.config.page_size

    def allocate(self, model: ModelConfig, batch: int, dtype, pages: int = 0) -> PagedArrays:
        require(pages > 0, "pages", pages, "a paged cache needs a pool")
        L, K, D, N, page = model.num_layers, model.num_kv_heads, model.head_dim, pages, self.config.page_size
        own = 0 if model.latent else page
        quantized = self.config.quant != "none"
        stored = quant.STORED[self.config.quant] if quantized else dtype
        return PagedArrays(
            k=jnp.zeros((N, page, D), stored),
            v=jnp.zeros((N, own, model.value_dim), stored),
            pos=jnp.full((N, page), -1, jnp.int32),
            k_scale=jnp.zeros((N, page)) if quantized else None,
            v_scale=jnp.zeros((N, page)) if quantized else None,
            k_offset=jnp.zeros((L, K, D)) if quantized else None,
            table=jnp.zeros((L, batch, K, self.table_width), jnp.int32),
            length=jnp.zeros((L, batch, K), jnp.int32),
            free=jnp.arange(N, dtype=jnp.int32),
            top=jnp.asarray(N, jnp.int32),
        )

    def center(self, cache: PagedArrays, offset: Float[Array, "L K D"]) -> PagedArrays:
        return cache if cache.k_offset is None else cache._replace(k_offset=offset.astype(jnp.float32))

    def can_append(self, cache: PagedArrays, active: Bool[Array, "B"]) -> Bool[Array, "B"]:
        """Those, from the first, whose heads all find a fresh page if they need one; the others wait.

        What a step may need is known from the lengths: a page for each head that stands at a page's edge.
        """
        page, P = page_size(cache), cache.table.shape[-1]
        active &= (cache.length < P * page).all(axis=(0, 2))
        need = jnp.sum(cache.length % page == 0, axis=(0, 2)) * active
        return active & (jnp.cumsum(need) <= cache.top)

    def append(
        self, cache: PagedArrays, layer: int, position: Counts, victim: Int[Array, "M B K"], active: Bool[Array, "B"]
    ) -> tuple[PagedArrays, Int[Array, "M B K"]]:
        page, layers = page_size(cache), slice(layer, layer + len(victim))
        length, P = cache.length[layers], cache.table.shape[-1]
        grows = active[:, None] & (victim < 0)
        cache, fresh = _take_pages(cache, grows & (length % page == 0))
        n, b, h = jnp.ogrid[tuple(slice(size) for size in length.shape)]
        # Where no page was taken `fresh` is N; an index of P is out of range, so nothing is written there.
        edge = jnp.where(fresh < len(cache.free), length // page, P)
        table = cache.table.at[n + layer, b, h, edge].set(fresh, mode="drop")
        slot = jnp.where(active[:, None], jnp.where(grows, length, victim), P * page)
        at = _page_of(cache, table[layers], slot), slot % page
        pos = cache.pos.at[at].set(jnp.broadcast_to(position[:, None], slot.shape), mode="drop")
        # Not `.at[layers].add`: in all layers that is a scatter at an empty array of indices, see sharding.per_device.
        length = jax.lax.dynamic_update_slice_in_dim(cache.length, length + grows, layer, axis=0)
        return cache._replace(table=table, pos=pos, length=length), slot

    def attend(self, cache: PagedArrays, layer: int, query: DecodeQuery, weights: bool):
        q, k, v, slots, readable = query
        if self.config.quant == "none" and readable is None:  # in one launch on a GPU
            pages = kernels.Pages(cache.k, cache.v, cache.table, cache.length)
            attended, pages = kernels.paged_decode_attention_update(q, k, v, pages, slots, layer, weights=weights)
            return cache._replace(k=pages.k, v=pages.v), attended.out, attended.weights
        table, length, slot = cache.table[layer], cache.length[layer], slots[layer % len(slots)]
        cache = self._write(cache, layer, (_page_of(cache, table, slot), slot % page_size(cache)), k, v)
        pages = kernels.Pages(cache.k, cache.v, table, length, cache.k_scale, cache.v_scale)
        attended = kernels.paged_decode_attention(q, pages, readable=readable, weights=weights)
        return cache, attended.out, attended.weights

    def view(self, cache: PagedArrays, layer: Layer, width: int) -> View:
        page, (_, B, K, _) = page_size(cache), cache.table.shape
        P = pages_of(width, page)
        ids, live = cache.table[layer, :, :, :P], jnp.arange(width) < cache.length[layer][..., None]

        def read(pool, fill=0):
            x = jnp.take(pool, ids, axis=0, mode="clip").reshape(B, K, P * page, *pool.shape[2:])[:, :, :width]
            return jnp.where(jnp.expand_dims(live, range(3, x.ndim)), x, jnp.asarray(fill, x.dtype))

        k_scale, v_scale = (None if x is None else read(x) for x in (cache.k_scale, cache.v_scale))
        U, D, latent = cache.v.shape[2], cache.k.shape[2], not cache.v.shape[1]
        if latent and k_scale is not None:
            k_scale = quant.joined(v_scale, k_scale, U, D)
        dtype = cache.k.dtype if cache.k_scale is None else jnp.float32
        k = quant.decode(read(cache.k), k_scale, dtype)
        k = k if cache.k_offset is None else k + cache.k_offset[layer][:, None]
        v = k[..., :U] if latent else quant.decode(read(cache.v), v_scale, dtype)
        return View(k, v, read(cache.pos, -1))

    def write_prefill(
        self,
        cache: PagedArrays,
        layer: Layer,
        k: NewKeys,
        v: NewValues,
        position: Positions,
        keep: SlotFlags,
        old: View | None = None,
    ) -> tuple[PagedArrays, Slots]:
        page, P = page_size(cache), cache.table.shape[-1]
        before, after = cache.length[layer], keep.sum(axis=-1, dtype=jnp.int32)
        slots, new = compacted(k, v, position, keep, old)
        held, kept = pages_of(before, page)[..., None], pages_of(after, page)[..., None]
        column = jnp.arange(P)
        cache, fresh = _take_pages(cache, (column >= held) & (column < kept))
        table = jnp.where(fresh < len(cache.free), fresh, cache.table[layer])
        cache = _give_pages(cache, table, (column >= kept) & (column < held))
        cache = cache._replace(table=cache.table.at[layer].set(table), length=cache.length.at[layer].set(after))
        target = jnp.take_along_axis(table, jnp.clip(new.slot // page, 0, P - 1), axis=-1)
        target = jnp.where(new.slot >= 0, target, len(cache.free))
        cache = cache._replace(pos=cache.pos.at[target, new.slot % page].set(new.pos, mode="drop"))
        return self._write(cache, layer, (target, new.slot % page), new.k, new.v), slots

    def live(self, cache: PagedArrays) -> Int[Array, "L B K"]:
        return cache.length

    def take_rows(self, cache: PagedArrays, rows: Counts) -> PagedArrays:
        """The pool is handed on whole: a part writes into its own pages only."""
        table = cache.table.at[:, rows].get(mode="fill", fill_value=0)
        return cache._replace(table=table, length=cache.length.at[:, rows].get(mode="fill", fill_value=0))

    def put_rows(self, cache: PagedArrays, rows: Counts, part: PagedArrays) -> PagedArrays:
        table = cache.table.at[:, rows].set(part.table, mode="drop")
        return part._replace(table=table, length=cache.length.at[:, rows].set(part.length, mode="drop"))

    def fork(
        self, cache: PagedArrays, source: Counts, target: Counts, moved: Bool[Array, "A"], width: int
    ) -> PagedArrays:
        """Copies pages layer by layer, which bounds what is in flight; a row that moves hands over its pages."""
        L, B = cache.table.shape[:2]
        page, P = page_size(cache), pages_of(width, page_size(cache))
        length = cache.length.at[:, source].get(mode="fill", fill_value=0)
        length = jnp.where((target < B)[None, :, None], length, 0)

        def copy_layer(layer, cache):
            wanted = (jnp.arange(P) < pages_of(length[layer], page)[..., None]) & ~moved[:, None, None]
            cache, new = _take_pages(cache, wanted)
            old = cache.table.at[layer, source, :, :P].get(mode="clip")

            def copy(pool):
                return None if pool is None else pool.at[new].set(pool.at[old].get(mode="clip"), mode="drop")

            pools = {name: copy(getattr(cache, name)) for name in ("k", "v", "pos", "k_scale", "v_scale")}
            ids = jnp.where(moved[:, None, None], old, jnp.where(wanted, new, 0))
            return cache._replace(**pools, table=cache.table.at[layer, target, :, :P].set(ids, mode="drop"))

        # A loop, and not L copies of it: compiling those takes several times as long.
        cache = jax.lax.fori_loop(0, L, copy_layer, cache)
        length = cache.length.at[:, target].set(length, mode="drop")
        return cache._replace(length=length.at[:, jnp.where(moved, source, B)].set(0, mode="drop"))

    def free(self, cache: PagedArrays, rows: Bool[Array, "B"]) -> PagedArrays:
        rows = rows[None, :, None]
        held = jnp.arange(cache.table.shape[-1]) < pages_of(cache.length, page_size(cache))[..., None]
        cache = _give_pages(cache, cache.table, held & rows[..., None])
        return cache._replace(length=jnp.where(rows, 0, cache.length))

    def pages_needed(self, tokens: Int[np.ndarray, "... L K"]) -> Int[np.ndarray, "parts"]:
        return pages_of(tokens, self.config.page_size).sum().reshape(1)

    def pool_size(self, cache: PagedArrays) -> int:
        return len(cache.free)

    def pool(self, cache: PagedArrays) -> Pool:
        arrays = (cache.k, cache.v, cache.pos, cache.k_scale, cache.v_scale)
        page_bytes = sum(x.nbytes // len(x) for x in arrays if x is not None)
        return Pool(np.asarray(cache.top).reshape(-1), len(cache.free), page_bytes)

    def grow(self, cache: PagedArrays, pages: int) -> PagedArrays:
        """The same cache with a pool of `pages` pages; the new ones are free."""
        N = len(cache.free)
        more = pages - N

        def longer(pool, fill):
            if pool is None:
                return None
            return jnp.pad(pool, ((0, more),) + ((0, 0),) * (pool.ndim - 1), constant_values=fill)

        cache = cache._replace(
            k=longer(cache.k, 0),
            v=longer(cache.v, 0),
            pos=longer(cache.pos, -1),
            k_scale=longer(cache.k_scale, 0),
            v_scale=longer(cache.v_scale, 0),
            free=longer(cache.free, 0),
        )
        new = jnp.arange(N, pages, dtype=jnp.int32)
        return _give_pages(cache, new, jnp.ones(more, bool))

    def _write(self, cache: PagedArrays, layer: Layer, at, k, v) -> PagedArrays:
        """Writes keys and values `[B, K, ..., D]` at (page, place in it); page N is out of range and dropped."""

        def put(target, value):
            return target.at[at].set(value.astype(target.dtype), mode="drop")

        kind, offset, latent = self.config.quant, cache.k_offset, not cache.v.shape[1]
        if offset is not None:
            k -= jnp.expand_dims(offset[layer], range(1, k.ndim - 2))
            k = k[..., v.shape[-1] :] if latent else k
            (k, k_scale), (v, v_scale) = quant.encode(k, kind), quant.encode(v, kind)
            k = jnp.concatenate([v, k], axis=-1) if latent else k
            cache = cache._replace(k_scale=put(cache.k_scale, k_scale), v_scale=put(cache.v_scale, v_scale))
        return cache._replace(k=put(cache.k, k), v=cache.v if latent else put(cache.v, v))


def pages_of(tokens, page: int):
    """How many pages hold `tokens` slots; works on numbers and arrays."""
    return -(-tokens // page)


def page_size(cache: PagedArrays) -> int:
    return cache.k.shape[1]


def bytes_per_page(model: ModelConfig, config: CacheConfig, dtype) -> int:
    """Keys, values, scales and positions of one page."""
    itemsize = 1 if config.quant != "none" else jnp.dtype(dtype).itemsize
    scales = 8 if config.quant != "none" else 0
    return config.page_size * (model.entry_numbers * itemsize + scales + 4)


def _take_pages(cache: PagedArrays, wanted: Bool[Array, "..."]) -> tuple[PagedArrays, Int[Array, "..."]]:
    """A free page for each True, and N, which is no page, elsewhere."""
    N = len(cache.free)
    rank = jnp.cumsum(wanted.reshape(-1), dtype=jnp.int32).reshape(wanted.shape)  # 1, 2, ... at the True ones
    page = cache.free[jnp.clip(cache.top - rank, 0, N - 1)]
    return cache._replace(top=cache.top - rank.reshape(-1)[-1]), jnp.where(wanted, page, N)


def _give_pages(cache: PagedArrays, pages: Int[Array, "..."], given: Bool[Array, "..."]) -> PagedArrays:
    """Puts the pages marked back on the stack."""
    rank = jnp.cumsum(given.reshape(-1), dtype=jnp.int32)
    index = jnp.where(given.reshape(-1), cache.top + rank - 1, len(cache.free))
    free = cache.free.at[index].set(pages.reshape(-1), mode="drop")
    return cache._replace(free=free, top=cache.top + given.sum(dtype=jnp.int32))


def _page_of(cache: PagedArrays, table: Int[Array, "... P"], slot: Int[Array, "..."]) -> Int[Array, "..."]:
    """The page that a slot lies in; N, which is no page, for a slot past the table."""
    page, P = page_size(cache), table.shape[-1]
    ids = jnp.take_along_axis(table, jnp.clip(slot // page, 0, P - 1)[..., None], axis=-1)[..., 0]
    return jnp.where(slot < P * page, ids, len(cache.free))
