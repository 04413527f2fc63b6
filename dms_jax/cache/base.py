"""What a storage of keys and values is, in the vocabulary of slots. Knows no policy.

A token takes a slot in each KV head; a slot's `pos` is its token's position, -1 where the slot is empty. A policy
names the slot that a newcomer drives out (the victim, -1 for none); the storage decides what becomes of it. Keys
are stored after RoPE, so the order of slots never matters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dms_jax.types import Counts, NewKV, Positions, SlotFlags, Slots, StoredKV


class View(NamedTuple):
    """A dense copy of the first W slots of a layer; `pos` -1 where there is nothing to read."""

    k: StoredKV  # [B, K, W, D]
    v: StoredKV
    pos: Slots  # [B, K, W]


class Pool(NamedTuple):
    """The pages that a storage has; a page is whatever it grows by."""

    free: Int[np.ndarray, "parts"]  # of each device's pool
    size: int  # free or not, of each
    page_bytes: int


class Storage(NamedTuple):
    """One kind of storage as a record of pure functions; `cache` is whatever `init` returns.

    slots: addressable slots a head.
    init: an empty cache for a batch, with so many pages in all; masked storage has none.
    admit: which of the active sequences have room for one more token in every head.
    place: the slot of one new token a sequence, for M layers from `layer`; inactive sequences get slot `slots`.
    attend: writes the new token's key and value in its slot; then one query a sequence over its live slots, or those
      of them in `readable` pages; on request also the softmax weight of each slot, summed over the G query heads of
      its KV head. `slots` is what `place` returned: of all layers, or of this one.
    view: the first `width` slots, for a prompt to be read beside them.
    extend: writes the tokens of a prompt that stay and drops the old slots that do not; `stay` covers the W slots of
      the view, then the tokens. Returns the new slot of each, -1 for those that are gone. Slots that stay are moved
      only if the cache shrinks, and only where `old` hands over what they hold.
    live: live tokens of each layer and head.
    take, put: the part of a cache that belongs to some sequences, and its return; a row beyond the batch is empty.
    fork: copies whole sequences into empty rows, or moves them there; no head may hold more than `width` tokens.
    release: empties the sequences marked.
    pages: how many pages of each device's pool all rows take together, for so many tokens in each of their heads.
    pool: what the pool is now; None for storage without one.
    grow: the same cache with so many pages in each pool.
    parts: devices that hold a part of the heads, each with a pool of its own.
    """

    slots: int
    init: Callable[..., Any]  # (model config, batch, dtype, pages) -> cache
    admit: Callable[[Any, Bool[Array, "B"]], Bool[Array, "B"]]
    place: Callable[
        ..., tuple[Any, Int[Array, "M B K"]]
    ]  # (cache, layer, position [B], victim [M, B, K], active [B]) -> cache, slots
    attend: Callable[
        ..., tuple[Any, Float[Array, "B H D"], Float[Array, "B K S"] | None]
    ]  # (cache, layer, q, k [B, K, D], v, slots [M, B, K], readable, weights) -> cache, out, weights
    view: Callable[[Any, int, int], View]  # (cache, layer, width)
    extend: Callable[[Any, int, NewKV, NewKV, Positions, SlotFlags, View | None], tuple[Any, Slots]]
    live: Callable[[Any], Int[Array, "L B K"]]
    take: Callable[[Any, Counts], Any]
    put: Callable[[Any, Counts, Any], Any]
    fork: Callable[..., Any]  # (cache, source rows [A], target rows [A], moved [A], width)
    release: Callable[[Any, Bool[Array, "B"]], Any]
    pages: Callable[[Int[np.ndarray, "... L K"]], Int[np.ndarray, "parts"]]
    pool: Callable[[Any], Pool] | None = None
    grow: Callable[[Any, int], Any] | None = None
    parts: int = 1


def fitted(storage: Storage, cache: Any, live: Int[np.ndarray, "rows L K"], limit: int | None = None) -> Any | None:
    """`cache`, grown if so many live tokens need it; None where they need more than `limit` pages."""
    if storage.pool is None:
        return cache
    size, needed = storage.pool(cache).size, int(storage.pages(live).max())
    if needed <= size:
        return cache
    wanted = max(needed, size + size // 2)
    wanted = wanted if limit is None else min(wanted, limit)
    return storage.grow(cache, wanted) if needed <= wanted else None


class Written(NamedTuple):
    """N tokens to write in each head, `slot` -1 where there is nothing to write."""

    slot: Slots  # [B, K, N]
    k: StoredKV  # [B, K, N, D]
    v: StoredKV
    pos: Slots


def packed(k: NewKV, v: NewKV, position: Positions, stay: SlotFlags, old: View | None) -> tuple[Slots, Written]:
    """`extend` of a storage whose live slots are always [0, length): the new slots, and what is to be written."""
    width = stay.shape[-1] - position.shape[1]
    slots, written = _new_slots(stay, width)
    target = jnp.where(written, slots, -1)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    pos = jnp.broadcast_to(position[:, None], k.shape[:3])
    if old is None:  # nothing moves: without a View the caller knows that the cache does not shrink
        return slots, Written(target[..., width:], k, v, pos)
    k = jnp.concatenate([old.k.astype(k.dtype), k], axis=2)
    v = jnp.concatenate([old.v.astype(v.dtype), v], axis=2)
    return slots, Written(target, k, v, jnp.concatenate([old.pos, pos], axis=2))


def _new_slots(stay: SlotFlags, width: int) -> tuple[Slots, SlotFlags]:
    """The slot of everything that stays, -1 for the rest, and what has to be written there.

    The new length n is the number of those that stay. Old slots under n that stay remain; the newcomers, after the
    old ones at n and beyond, take the holes under n in order. With three old slots and two tokens:

        stay   [1 0 1 | 1 1]   n = 4, holes 1 3   slots [0 -1 2 | 1 3]   written [0 0 0 | 1 1]
        stay   [0 0 1 | 1 0]   n = 2, holes 0 1   slots [-1 -1 0 | 1 -1] written [0 0 1 | 1 0]
    """
    all_slots = jnp.arange(stay.shape[-1])
    n = stay.sum(axis=-1, keepdims=True)
    in_place = stay & (all_slots < n) & (all_slots < width)
    hole = (all_slots < n) & ~in_place
    written = stay & ~in_place

    def rank(flags):
        return jnp.cumsum(flags, axis=-1) - 1

    b, h = jnp.arange(stay.shape[0])[:, None, None], jnp.arange(stay.shape[1])[None, :, None]
    index = jnp.where(hole, rank(hole), stay.shape[-1])
    holes = jnp.zeros(stay.shape, jnp.int32).at[b, h, index].set(all_slots.astype(jnp.int32), mode="drop")
    taken = jnp.take_along_axis(holes, jnp.maximum(rank(written), 0), axis=-1)
    return jnp.where(written, taken, jnp.where(in_place, all_slots, -1)), written
