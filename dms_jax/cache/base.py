"""What a KV cache is, in the vocabulary of slots. It knows no policy.

A token has a slot in each KV head; a slot's `pos` is its token's position, -1 where the slot is empty. A policy names
the slot that a new token overwrites (the victim, -1 for none); the cache decides what becomes of the victim. Keys are
stored after RoPE, so the order of slots never matters.
"""

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dms_jax.config import CacheConfig, ModelConfig
from dms_jax.types import (
    Counts,
    Layer,
    NewKeys,
    NewValues,
    PerHeadKeys,
    PerHeadValues,
    Positions,
    SlotFlags,
    Slots,
    StoredKeys,
    StoredValues,
)

Arrays = Any  # what a cache's `allocate` returns: a NamedTuple of arrays


class View(NamedTuple):
    """A dense copy of the first W slots of a layer; `pos` -1 where there is nothing to read."""

    k: StoredKeys  # [B, K, W, D]
    v: StoredValues
    pos: Slots  # [B, K, W]


class Pool(NamedTuple):
    """The pages of a paged cache."""

    free: Int[np.ndarray, "parts"]  # of each device's pool
    size: int  # free or not, of each
    page_bytes: int


class DecodeQuery(NamedTuple):
    """One query a sequence, with the key and value that are to be stored before it attends.

    slots: what `append` returned, of M layers: all of them, or this one.
    readable: pages that may be read; None for all.
    """

    q: Float[Array, "B H D"]
    k: PerHeadKeys
    v: PerHeadValues
    slots: Int[Array, "M B K"]
    readable: Bool[Array, "B K P"] | None = None


@dataclass(frozen=True)
class KVCache(abc.ABC):
    """The functions of one kind of cache; `cache` is the arrays that `allocate` returns."""

    config: CacheConfig

    @property
    @abc.abstractmethod
    def slots(self) -> int:
        """Addressable slots a head."""

    @property
    def parts(self) -> int:
        """Devices that hold a part of the heads, each with a pool of its own."""
        return 1

    @abc.abstractmethod
    def allocate(self, model: ModelConfig, batch: int, dtype, pages: int = 0) -> Arrays:
        """An empty cache of `batch` rows; a paged one has `pages` pages, at least one, in each device's pool."""

    def center(self, cache: Arrays, offset: Float[Array, "L K D"]) -> Arrays:
        """The empty cache, whose quantized keys will be stored less this offset; of no meaning for others.

        An offset common to all keys of a head changes no softmax, so attention never adds it back.
        """
        return cache

    @abc.abstractmethod
    def can_append(self, cache: Arrays, active: Bool[Array, "B"]) -> Bool[Array, "B"]:
        """Which of the active sequences have room for one more token in every head."""

    @abc.abstractmethod
    def append(
        self, cache: Arrays, layer: int, position: Counts, victim: Int[Array, "M B K"], active: Bool[Array, "B"]
    ) -> tuple[Arrays, Int[Array, "M B K"]]:
        """The slot of one new token a sequence, for M layers from `layer`; `slots` for inactive sequences."""

    @abc.abstractmethod
    def attend(
        self, cache: Arrays, layer: int, query: DecodeQuery, weights: bool
    ) -> tuple[Arrays, Float[Array, "B H U"], Float[Array, "B K S"] | None]:
        """Stores the new key and value, then attends to the live slots of each head.

        weights: also return the softmax weight of each slot, summed over the G query heads of its KV head.
        """

    @abc.abstractmethod
    def view(self, cache: Arrays, layer: Layer, width: int) -> View:
        """The first W slots, for the tokens of a prompt to attend to; no head holds more live tokens than `width`.

        W is at least `width`, and what is live lies in these slots; 0 of a width of 0.
        """

    @abc.abstractmethod
    def write_prefill(
        self,
        cache: Arrays,
        layer: Layer,
        k: NewKeys,
        v: NewValues,
        position: Positions,
        keep: SlotFlags,
        old: View | None = None,
    ) -> tuple[Arrays, Slots]:
        """Stores the tokens of a prompt that are kept and drops the old slots that are not.

        keep: of the W slots of the view, then of the tokens. old: the view, where the cache may shrink: only then are
        slots moved. Returns the new slot of each, -1 for what is not stored.
        """

    def over_layers(self, function, cache: Arrays, layers: int) -> tuple[Arrays, Any]:
        """`function(cache, layer)` for one layer after another: the cache, and what else it returns, stacked.

        One loop, as a program with the same for each layer takes minutes to compile for a GPU.
        """
        return jax.lax.scan(function, cache, jnp.arange(layers))

    @abc.abstractmethod
    def live(self, cache: Arrays) -> Int[Array, "L B K"]:
        """Live tokens of each layer, row and head."""

    @abc.abstractmethod
    def take_rows(self, cache: Arrays, rows: Counts) -> Arrays:
        """The part of a cache that belongs to some rows; a row beyond the batch is empty."""

    @abc.abstractmethod
    def put_rows(self, cache: Arrays, rows: Counts, part: Arrays) -> Arrays:
        """The cache with a part from `take_rows` put back."""

    @abc.abstractmethod
    def fork(self, cache: Arrays, source: Counts, target: Counts, moved: Bool[Array, "A"], width: int) -> Arrays:
        """Copies whole sequences into empty rows, or moves them there; no head may hold more than `width` tokens."""

    @abc.abstractmethod
    def free(self, cache: Arrays, rows: Bool[Array, "B"]) -> Arrays:
        """Empties the rows marked."""

    def pages_needed(self, tokens: Int[np.ndarray, "... L K"]) -> Int[np.ndarray, "parts"]:
        """How many pages of each pool all rows need together, for so many tokens in each of their heads."""
        return np.zeros(self.parts, int)

    def pool_size(self, cache: Arrays) -> int:
        """Pages of each pool, free or not; 0 for a cache without one. Never waits for the device."""
        return 0

    def pool(self, cache: Arrays) -> Pool | None:
        """What the pool is now; None for a cache without one. Waits for the device."""
        return None

    def grow(self, cache: Arrays, pages: int) -> Arrays:
        """The same cache with `pages` pages in each pool."""
        return cache

    def fitted(self, cache: Arrays, live: Int[np.ndarray, "rows L K"], limit: int | None = None) -> Arrays | None:
        """`cache`, grown if so many live tokens need it; None where they need more than `limit` pages."""
        size, needed = self.pool_size(cache), int(self.pages_needed(live).max())
        if needed <= size:
            return cache
        wanted = max(needed, size + size // 2)
        wanted = wanted if limit is None else min(wanted, limit)
        return self.grow(cache, wanted) if needed <= wanted else None


class Written(NamedTuple):
    """N tokens to write in each head, `slot` -1 where there is nothing to write."""

    slot: Slots  # [B, K, N]
    k: StoredKeys  # [B, K, N, D]
    v: StoredValues
    pos: Slots


def compacted(
    k: NewKeys, v: NewValues, position: Positions, keep: SlotFlags, old: View | None
) -> tuple[Slots, Written]:
    """`write_prefill` where live slots are always [0, length): the new slots, and what is to be written."""
    width = keep.shape[-1] - position.shape[1]
    slots, written = _new_slots(keep, width)
    target = jnp.where(written, slots, -1)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    pos = jnp.broadcast_to(position[:, None], k.shape[:3])
    if old is None:  # nothing moves: without a View the caller knows that the cache does not shrink
        return slots, Written(target[..., width:], k, v, pos)
    k = jnp.concatenate([old.k.astype(k.dtype), k], axis=2)
    v = jnp.concatenate([old.v.astype(v.dtype), v], axis=2)
    return slots, Written(target, k, v, jnp.concatenate([old.pos, pos], axis=2))


def _new_slots(keep: SlotFlags, width: int) -> tuple[Slots, SlotFlags]:
    """The slot of everything that is kept, -1 for the rest, and what has to be written there.

    The new length n is the number of those kept. Old slots under n that are kept remain; new tokens, after the old
    ones at n and beyond, fill the holes under n in order. With three old slots and two tokens:

        keep   [1 0 1 | 1 1]   n = 4, holes 1 3   slots [0 -1 2 | 1 3]   written [0 0 0 | 1 1]
        keep   [0 0 1 | 1 0]   n = 2, holes 0 1   slots [-1 -1 0 | 1 -1] written [0 0 1 | 1 0]
    """
    all_slots = jnp.arange(keep.shape[-1])
    n = keep.sum(axis=-1, keepdims=True)
    in_place = keep & (all_slots < n) & (all_slots < width)
    hole = (all_slots < n) & ~in_place
    written = keep & ~in_place

    def rank(flags):
        return jnp.cumsum(flags, axis=-1) - 1

    b, h = jnp.arange(keep.shape[0])[:, None, None], jnp.arange(keep.shape[1])[None, :, None]
    index = jnp.where(hole, rank(hole), keep.shape[-1])
    holes = jnp.zeros(keep.shape, jnp.int32).at[b, h, index].set(all_slots.astype(jnp.int32), mode="drop")
    taken = jnp.take_along_axis(holes, jnp.maximum(rank(written), 0), axis=-1)
    return jnp.where(written, taken, jnp.where(in_place, all_slots, -1)), written
