"""Level 3. Masked storage: slot = order of arrival; a victim keeps its slot and is hidden. Memory never falls.

For research, for debugging and as the oracle of paged storage. Keys are kept transposed: on a CPU the product with
a query is then twice as fast.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dms_jax.cache.base import Storage, View
from dms_jax.config import CacheConfig, ModelConfig
from dms_jax.types import NEGATIVE, Counts, NewKV, PerHead, PerHeadKV, Positions, SlotFlags, Slots, StoredKV


class MaskedCache(NamedTuple):
    """One array a layer; the batch is the leading axis of each."""

    k: tuple[Float[Array, "B K D S"], ...]
    v: tuple[StoredKV, ...]  # [B, K, S, D]
    pos: tuple[Slots, ...]  # [B, K, S], -1 for empty or hidden
    used: tuple[PerHead, ...]  # [B, K], the next fresh slot


def _replace(items: tuple, layer: int, item) -> tuple:
    return (*items[:layer], item, *items[layer + 1 :])


def _rows_and_heads(used: PerHead) -> tuple[Array, Array]:
    B, K = used.shape
    return jnp.arange(B)[:, None], jnp.arange(K)[None, :]


def masked_storage(config: CacheConfig) -> Storage:
    """Masked storage of `capacity` slots a head."""
    S = config.capacity

    def init(model: ModelConfig, batch: int, dtype, pages: int = 0) -> MaskedCache:
        L, K, D = model.num_layers, model.num_kv_heads, model.head_dim
        return MaskedCache(
            k=tuple(jnp.zeros((batch, K, D, S), dtype) for _ in range(L)),
            v=tuple(jnp.zeros((batch, K, S, D), dtype) for _ in range(L)),
            pos=tuple(jnp.full((batch, K, S), -1, jnp.int32) for _ in range(L)),
            used=tuple(jnp.zeros((batch, K), jnp.int32) for _ in range(L)),
        )

    def admit(cache: MaskedCache, active: Bool[Array, "B"]) -> Bool[Array, "B"]:
        return active & (jnp.stack(cache.used).max(axis=(0, 2)) < S)

    def place(cache, layer, k: PerHeadKV, v: PerHeadKV, position: Counts, victim: PerHead, active):
        b, h = _rows_and_heads(cache.used[layer])
        slot = jnp.where(active[:, None], cache.used[layer], S)  # S is out of range, and what goes there is dropped
        hidden = jnp.where(active[:, None] & (victim >= 0), victim, S)
        pos = cache.pos[layer].at[b, h, hidden].set(-1, mode="drop")
        cache = cache._replace(
            k=_replace(cache.k, layer, cache.k[layer].at[b, h, :, slot].set(k, mode="drop")),
            v=_replace(cache.v, layer, cache.v[layer].at[b, h, slot].set(v, mode="drop")),
            pos=_replace(cache.pos, layer, pos.at[b, h, slot].set(position[:, None], mode="drop")),
            used=_replace(cache.used, layer, cache.used[layer] + active[:, None]),
        )
        return cache, slot

    return Storage(S, init, admit, place, attend, view, extend, live, take, put, fork, release)


def attend(
    cache: MaskedCache, layer: int, q: Float[Array, "B H D"], readable: Bool[Array, "B K P"] | None, weights: bool
):
    B, H, D = q.shape
    pos = cache.pos[layer]
    K, S = pos.shape[1:]
    read = pos >= 0
    if readable is not None:
        read &= jnp.repeat(readable, -(-S // readable.shape[-1]), axis=-1)[..., :S]
    scores = jnp.einsum(
        "BKGD,BKDS->BKGS", q.reshape(B, K, H // K, D), cache.k[layer], preferred_element_type=jnp.float32
    )
    probs = jax.nn.softmax(scores * D**-0.5 + jnp.where(read, 0.0, NEGATIVE)[:, :, None], axis=-1)
    out = jnp.einsum("BKGS,BKSD->BKGD", probs.astype(q.dtype), cache.v[layer]).reshape(B, H, D)
    return out, jnp.where(read, probs.sum(axis=2), 0.0) if weights else None


def view(cache: MaskedCache, layer: int, width: int) -> View:
    k = cache.k[layer][..., :width].swapaxes(2, 3)
    return View(k, cache.v[layer][:, :, :width], cache.pos[layer][:, :, :width])


def extend(
    cache: MaskedCache, layer: int, k: NewKV, v: NewKV, position: Positions, stay: SlotFlags, old: View | None = None
) -> tuple[MaskedCache, Slots]:
    """Every token takes a slot, also one that does not stay; nothing is ever moved."""
    W = stay.shape[-1] - position.shape[1]
    used = cache.used[layer]
    S = cache.pos[layer].shape[-1]
    b, h = (x[..., None] for x in _rows_and_heads(used))
    real = position >= 0
    fresh = used[..., None] + jnp.cumsum(real, axis=1)[:, None] - 1
    fresh = jnp.where(real[:, None], fresh, S)
    kept = jnp.where(stay[..., :W], cache.pos[layer][..., :W], -1)
    pos = cache.pos[layer].at[..., :W].set(kept)
    pos = pos.at[b, h, fresh].set(jnp.where(stay[..., W:], position[:, None], -1), mode="drop")
    cache = cache._replace(
        k=_replace(cache.k, layer, cache.k[layer].at[b, h, :, fresh].set(k.swapaxes(1, 2), mode="drop")),
        v=_replace(cache.v, layer, cache.v[layer].at[b, h, fresh].set(v.swapaxes(1, 2), mode="drop")),
        pos=_replace(cache.pos, layer, pos),
        used=_replace(cache.used, layer, used + real.sum(axis=1, dtype=jnp.int32)[:, None]),
    )
    old_slots = jnp.broadcast_to(jnp.arange(W, dtype=jnp.int32), (*used.shape, W))
    slots = jnp.concatenate([old_slots, fresh.astype(jnp.int32)], axis=-1)
    return cache, jnp.where(stay, slots, -1)


def live(cache: MaskedCache, layer: int) -> PerHead:
    return jnp.sum(cache.pos[layer] >= 0, axis=-1, dtype=jnp.int32)


def take(cache: MaskedCache, rows: Counts) -> MaskedCache:
    k, v, used = (tuple(x.at[rows].get(mode="fill", fill_value=0) for x in xs) for xs in (cache.k, cache.v, cache.used))
    pos = tuple(x.at[rows].get(mode="fill", fill_value=-1) for x in cache.pos)
    return MaskedCache(k, v, pos, used)


def put(cache: MaskedCache, rows: Counts, part: MaskedCache) -> MaskedCache:
    return jax.tree.map(lambda whole, x: whole.at[rows].set(x, mode="drop"), cache, part)


def fork(cache: MaskedCache, source: Counts, target: Counts, moved: Bool[Array, "A"], width: int) -> MaskedCache:
    """Always copies; a row that moves is left as it is, for `release` to empty."""
    return put(cache, target, take(cache, source))


def release(cache: MaskedCache, rows: Bool[Array, "B"]) -> MaskedCache:
    return cache._replace(
        pos=tuple(jnp.where(rows[:, None, None], -1, x) for x in cache.pos),
        used=tuple(jnp.where(rows[:, None], 0, x) for x in cache.used),
    )
