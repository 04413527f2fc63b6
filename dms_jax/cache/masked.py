"""A cache in which every token keeps its slot and a mask hides evicted ones. Memory never falls.

For research, for debugging, as the oracle of paged caches, and the fastest where nothing is evicted on a CPU. Keys are
kept transposed: on a CPU the product with a query is then twice as fast.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dms_jax.cache.base import DecodeQuery, KVCache, View
from dms_jax.config import ModelConfig
from dms_jax.types import MASK_VALUE, Counts, NewKeys, NewValues, Positions, SlotFlags, Slots, StoredValues


class MaskedArrays(NamedTuple):
    """Keys and values: one array a layer, the batch its leading axis.

    Where a value is the first U numbers of its key, v is empty, `[B, K, 0, U]`.
    """

    k: tuple[Float[Array, "B K D S"], ...]
    v: tuple[StoredValues, ...]  # [B, K, S, U]
    pos: Int[Array, "L B K S"]  # -1 for empty or hidden
    used: Int[Array, "L B K"]  # the next fresh slot


def _replaced(items: tuple, layer: int, item) -> tuple:
    """`items` with another one for a layer."""
    return (*items[:layer], item, *items[layer + 1 :])


def _values(cache: MaskedArrays, layer: int) -> StoredValues:
    v, k = cache.v[layer], cache.k[layer]
    return v if v.shape[2] else k[:, :, : v.shape[3]].swapaxes(2, 3)


def _written(cache: MaskedArrays, layer: int, heads: tuple, slot, k, v) -> MaskedArrays:
    """With new keys and values in their slots of a layer; a slot out of range is dropped."""
    cache = cache._replace(k=_replaced(cache.k, layer, cache.k[layer].at[*heads, :, slot].set(k, mode="drop")))
    if not cache.v[layer].shape[2]:
        return cache
    return cache._replace(v=_replaced(cache.v, layer, cache.v[layer].at[*heads, slot].set(v, mode="drop")))


@dataclass(frozen=True)
class MaskedCache(KVCache):
    """Slots in the order in which tokens came, `capacity` a head."""

    @property
    def slots(self) -> int:
        return self.config.capacity

    def allocate(self, model: ModelConfig, batch: int, dtype, pages: int = 0) -> MaskedArrays:
        L, K, D = model.num_layers, model.num_kv_heads, model.head_dim
        own = 0 if model.latent else self.slots
        return MaskedArrays(
            k=tuple(jnp.zeros((batch, K, D, self.slots), dtype) for _ in range(L)),
            v=tuple(jnp.zeros((batch, K, own, model.value_dim), dtype) for _ in range(L)),
            pos=jnp.full((L, batch, K, self.slots), -1, jnp.int32),
            used=jnp.zeros((L, batch, K), jnp.int32),
        )

    def can_append(self, cache: MaskedArrays, active: Bool[Array, "B"]) -> Bool[Array, "B"]:
        return active & (cache.used.max(axis=(0, 2)) < self.slots)

    def append(
        self, cache: MaskedArrays, layer: int, position: Counts, victim: Int[Array, "M B K"], active: Bool[Array, "B"]
    ) -> tuple[MaskedArrays, Int[Array, "M B K"]]:
        S, layers = cache.pos.shape[-1], slice(layer, layer + len(victim))
        used, on = cache.used[layers], active[:, None]
        slot = jnp.where(on, used, S)  # S is out of range, and what goes there is dropped
        n, b, h = jnp.ogrid[tuple(slice(size) for size in used.shape)]
        pos = cache.pos.at[n + layer, b, h, jnp.where(on & (victim >= 0), victim, S)].set(-1, mode="drop")
        pos = pos.at[n + layer, b, h, slot].set(position[:, None], mode="drop")
        return cache._replace(pos=pos, used=cache.used.at[layers].add(on.astype(jnp.int32))), slot

    def attend(self, cache: MaskedArrays, layer: int, query: DecodeQuery, weights: bool):
        """The products read whole arrays: no key or value is copied."""
        q, (B, H, D), (K, S) = query.q, query.q.shape, cache.pos.shape[2:]
        b, h, slot = *jnp.ogrid[:B, :K], query.slots[layer % len(query.slots)]
        cache = _written(cache, layer, (b, h), slot, query.k, query.v)
        keys, values = cache.k[layer], _values(cache, layer)
        read = cache.pos[layer] >= 0
        if query.readable is not None:
            read &= jnp.repeat(query.readable, self.config.page_size, axis=-1)[..., :S]
        scores = jnp.einsum("BKGD,BKDS->BKGS", q.reshape(B, K, H // K, D), keys, preferred_element_type=jnp.float32)
        probs = jax.nn.softmax(scores * D**-0.5 + jnp.where(read, 0.0, MASK_VALUE)[:, :, None], axis=-1)
        out = jnp.einsum("BKGS,BKSU->BKGU", probs.astype(q.dtype), values).reshape(B, H, -1)
        return cache, out, jnp.where(read, probs.sum(axis=2), 0.0) if weights else None

    def view(self, cache: MaskedArrays, layer: int, width: int) -> View:
        """All slots, if any: where tokens were evicted, live ones lie beyond as many slots as there are of them."""
        width = self.slots if width else 0
        k = cache.k[layer][..., :width].swapaxes(2, 3)
        return View(k, _values(cache, layer)[:, :, :width], cache.pos[layer][:, :, :width])

    def write_prefill(
        self,
        cache: MaskedArrays,
        layer: int,
        k: NewKeys,
        v: NewValues,
        position: Positions,
        keep: SlotFlags,
        old: View | None = None,
    ) -> tuple[MaskedArrays, Slots]:
        """Every token has a slot, also one that is not kept; nothing is ever moved."""
        W = keep.shape[-1] - position.shape[1]
        used, S = cache.used[layer], cache.pos.shape[-1]
        b, h = (x[..., None] for x in jnp.ogrid[: used.shape[0], : used.shape[1]])
        real = position >= 0
        fresh = used[..., None] + jnp.cumsum(real, axis=1)[:, None] - 1
        fresh = jnp.where(real[:, None], fresh, S)
        kept = jnp.where(keep[..., :W], cache.pos[layer][..., :W], -1)
        pos = cache.pos.at[layer, :, :, :W].set(kept)
        pos = pos.at[layer, b, h, fresh].set(jnp.where(keep[..., W:], position[:, None], -1), mode="drop")
        cache = _written(cache, layer, (b, h), fresh, k.swapaxes(1, 2), v.swapaxes(1, 2))
        used_now = cache.used.at[layer].add(real.sum(axis=1, dtype=jnp.int32)[:, None])
        cache = cache._replace(pos=pos, used=used_now)
        old_slots = jnp.broadcast_to(jnp.arange(W, dtype=jnp.int32), (*used.shape, W))
        slots = jnp.concatenate([old_slots, fresh.astype(jnp.int32)], axis=-1)
        return cache, jnp.where(keep, slots, -1)

    def over_layers(self, function, cache: MaskedArrays, layers: int):
        """Unrolled: each layer has arrays of its own."""
        made = []
        for layer in range(layers):
            cache, item = function(cache, layer)
            made.append(item)
        return cache, jax.tree.map(lambda *xs: jnp.stack(xs), *made)

    def live(self, cache: MaskedArrays) -> Int[Array, "L B K"]:
        return jnp.sum(cache.pos >= 0, axis=-1, dtype=jnp.int32)

    def take_rows(self, cache: MaskedArrays, rows: Counts) -> MaskedArrays:
        k, v = (tuple(x.at[rows].get(mode="fill", fill_value=0) for x in xs) for xs in (cache.k, cache.v))
        pos = cache.pos.at[:, rows].get(mode="fill", fill_value=-1)
        return MaskedArrays(k, v, pos, cache.used.at[:, rows].get(mode="fill", fill_value=0))

    def put_rows(self, cache: MaskedArrays, rows: Counts, part: MaskedArrays) -> MaskedArrays:
        k, v = (
            tuple(x.at[rows].set(new, mode="drop") for x, new in zip(xs, parts, strict=True))
            for xs, parts in ((cache.k, part.k), (cache.v, part.v))
        )
        pos = cache.pos.at[:, rows].set(part.pos, mode="drop")
        return MaskedArrays(k, v, pos, cache.used.at[:, rows].set(part.used, mode="drop"))

    def fork(
        self, cache: MaskedArrays, source: Counts, target: Counts, moved: Bool[Array, "A"], width: int
    ) -> MaskedArrays:
        """Always copies; a row that moves is left as it is, for `free` to empty."""
        return self.put_rows(cache, target, self.take_rows(cache, source))

    def free(self, cache: MaskedArrays, rows: Bool[Array, "B"]) -> MaskedArrays:
        """Numbers are emptied, too: `attend` reads whole arrays, and 0 times NaN is NaN."""
        gone = rows[None, :, None]
        k, v = (tuple(jnp.where(rows[:, None, None, None], 0, x) for x in xs) for xs in (cache.k, cache.v))
        pos = jnp.where(gone[..., None], -1, cache.pos)
        return MaskedArrays(k, v, pos, jnp.where(gone, 0, cache.used))
