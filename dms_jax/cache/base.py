"""Level 3. What a storage of keys and values is, in the vocabulary of slots. Knows no policy.

A token takes a slot in each KV head; a slot's `pos` is its token's position, -1 where the slot is empty. A policy
names the slot that a newcomer drives out (the victim, -1 for none); the storage decides what becomes of it. Keys
are stored after RoPE, so the order of slots never matters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dms_jax.types import Counts, NewKV, Positions, SlotFlags, Slots, StoredKV


class View(NamedTuple):
    """A dense copy of the first W slots of a layer; `pos` -1 where there is nothing to read."""

    k: StoredKV  # [B, K, W, D]
    v: StoredKV
    pos: Slots  # [B, K, W]


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
    pool: free pages and all pages of each device's pool, `[parts]` and a number; None for storage without a pool.
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
    pool: Callable[[Any], tuple[Int[np.ndarray, "parts"], int]] | None = None
    grow: Callable[[Any, int], Any] | None = None
    parts: int = 1
