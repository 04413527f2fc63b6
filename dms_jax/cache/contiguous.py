"""Level 3. Contiguous storage: live slots of a head are [0, length) as in pages, but a layer is one array.

For CPUs. There the products of attention cannot read through a page table: they copy every page first, which costs
as much as they do. Here they read whole arrays of S slots a head, as many as the longest head of any row and layer has
ever needed, with the chunk of a prompt that is being read; the shorter ones leave theirs empty. So it pays where heads
compress alike, or under a budget: one head that keeps everything makes all arrays as long as in masked storage.

A page is `page_size` slots of every row, head and layer at once: the arrays grow by pages, when the host says so.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dms_jax.cache import masked
from dms_jax.cache.base import Pool, Storage, View, packed
from dms_jax.cache.masked import ArrayCache, replaced
from dms_jax.config import CacheConfig, ModelConfig
from dms_jax.types import Counts, NewKV, PerHeadKV, Positions, SlotFlags, Slots


def contiguous_storage(config: CacheConfig) -> Storage:
    """Contiguous storage of at most `capacity` slots a head; `init` is told how many pages there are at first."""
    page = config.page_size
    most = -(-config.capacity // page)
    bound = most * page  # whatever the arrays' present length, this is no slot of theirs

    def init(model: ModelConfig, batch: int, dtype, pages: int) -> ArrayCache:
        return masked.empty(model, batch, dtype, min(max(pages, 1), most) * page)

    def attend(cache, layer, q, k: PerHeadKV, v: PerHeadKV, slots, readable, weights: bool):
        cache, out, seen = masked.attend(cache, layer, q, k, v, slots, readable, weights, page)
        if seen is not None:
            seen = jnp.pad(seen, ((0, 0), (0, 0), (0, bound - seen.shape[-1])))
        return cache, out, seen

    def pages(tokens: Int[np.ndarray, "... L K"]) -> Int[np.ndarray, "parts"]:
        return np.minimum(-(-tokens.max(initial=0) // page), most).reshape(1)

    def pool(cache: ArrayCache) -> Pool:
        size = cache.pos.shape[-1] // page
        nbytes = sum(x.nbytes for x in (*cache.k, *cache.v, cache.pos))
        return Pool(size - pages(np.asarray(cache.used)), size, nbytes // size)

    def grow(cache: ArrayCache, pages: int) -> ArrayCache:
        more = min(pages, most) * page - cache.pos.shape[-1]

        def longer(x, axis: int, fill: int = 0):
            return jnp.pad(x, [(0, more * (n == axis)) for n in range(x.ndim)], constant_values=fill)

        k, v = tuple(longer(x, 3) for x in cache.k), tuple(longer(x, 2) for x in cache.v)
        return cache._replace(k=k, v=v, pos=longer(cache.pos, 3, -1))

    return Storage(
        *(bound, init, admit, functools.partial(place, none=bound), attend, view, extend, live),
        *(masked.take, masked.put, masked.fork, masked.release, pages, pool, grow),
    )


def admit(cache: ArrayCache, active: Bool[Array, "B"]) -> Bool[Array, "B"]:
    return active & (cache.used < cache.pos.shape[-1]).all(axis=(0, 2))


def place(
    cache: ArrayCache, layer: int, position: Counts, victim: Int[Array, "M B K"], active: Bool[Array, "B"], none: int
):
    layers = slice(layer, layer + len(victim))
    used, grows = cache.used[layers], active[:, None] & (victim < 0)
    slot = jnp.where(active[:, None], jnp.where(grows, used, victim), none)
    n, b, h = jnp.ogrid[tuple(slice(size) for size in used.shape)]
    pos = cache.pos.at[n + layer, b, h, slot].set(position[:, None], mode="drop")
    return cache._replace(pos=pos, used=cache.used.at[layers].add(grows.astype(jnp.int32))), slot


def view(cache: ArrayCache, layer: int, width: int) -> View:
    """Wider than the arrays where they are short: a view's width follows few steps, theirs follows pages."""
    seen = masked.view(cache, layer, width)
    more = (0, max(0, width - cache.pos.shape[-1]))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), more, (0, 0))) for x in (seen.k, seen.v))
    return View(k, v, jnp.pad(seen.pos, ((0, 0), (0, 0), more), constant_values=-1))


def extend(
    cache: ArrayCache, layer: int, k: NewKV, v: NewKV, position: Positions, stay: SlotFlags, old: View | None = None
) -> tuple[ArrayCache, Slots]:
    S, length = cache.pos.shape[-1], stay.sum(axis=-1, dtype=jnp.int32)
    slots, new = packed(k, v, position, stay, old)
    b, h = (x[..., None] for x in jnp.ogrid[: length.shape[0], : length.shape[1]])
    target = jnp.where(new.slot < 0, S, new.slot)
    pos = jnp.where(jnp.arange(S) < length[..., None], cache.pos[layer], -1).at[b, h, target].set(new.pos, mode="drop")
    return (
        cache._replace(
            k=replaced(cache.k, layer, cache.k[layer].at[b, h, :, target].set(new.k, mode="drop")),
            v=replaced(cache.v, layer, cache.v[layer].at[b, h, target].set(new.v, mode="drop")),
            pos=cache.pos.at[layer].set(pos),
            used=cache.used.at[layer].set(length),
        ),
        slots,
    )


def live(cache: ArrayCache) -> Int[Array, "L B K"]:
    return cache.used
