"""Level 2. Where keys and values live: slots and masked storage. Knows no policy.

Slot vocabulary, shared by every method: a token takes a slot in each KV head, `pos[sequence, head, slot]` is its
position and -1 marks an empty slot. A policy names the slot that a newcomer drives out (the victim, -1 for none);
the storage decides what becomes of it.

A storage is a record of pure functions over a NamedTuple of arrays. Keys are stored after RoPE, so the order of
slots never matters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dms_jax.config import CacheConfig, ModelConfig
from dms_jax.types import NEGATIVE, NewKV, PerHead, Queries, Slots, StoredKV


class Storage(NamedTuple):
    """The functions of one kind of storage; `cache` is whatever `init` returns."""

    init: Callable[..., Any]  # (model config, batch, capacity, dtype) -> cache
    fill: Callable[..., tuple[Any, Slots]]  # (cache, layer, k, v, survives) -> cache, slot of each token
    place: Callable[..., tuple[Any, PerHead]]  # (cache, layer, k, v, position, victim) -> cache, slot
    attend: Callable[..., Queries]  # (cache, layer, q) -> attention over all live slots
    live: Callable[..., PerHead]  # (cache, layer) -> live tokens of each head


class MaskedCache(NamedTuple):
    """Masked storage: slot = order of arrival, a victim keeps its slot and is hidden. One array a layer.

    Keys are stored transposed: on a CPU the product with a query is then twice as fast.
    """

    k: tuple[Float[Array, "B K D S"], ...]
    v: tuple[StoredKV, ...]  # [B, K, S, D]
    pos: tuple[Slots, ...]  # [B, K, S], -1 for empty or hidden
    used: tuple[PerHead, ...]  # [B, K], the next fresh slot


def _replace(items: tuple, layer: int, item) -> tuple:
    return (*items[:layer], item, *items[layer + 1 :])


def init_masked(model: ModelConfig, batch: int, capacity: int, dtype) -> MaskedCache:
    """An empty cache of `capacity` slots a head."""
    L, K, D = model.num_layers, model.num_kv_heads, model.head_dim
    return MaskedCache(
        k=tuple(jnp.zeros((batch, K, D, capacity), dtype) for _ in range(L)),
        v=tuple(jnp.zeros((batch, K, capacity, D), dtype) for _ in range(L)),
        pos=tuple(jnp.full((batch, K, capacity), -1, jnp.int32) for _ in range(L)),
        used=tuple(jnp.zeros((batch, K), jnp.int32) for _ in range(L)),
    )


def fill_masked(
    cache: MaskedCache, layer: int, k: NewKV, v: NewKV, survives: Bool[Array, "B K T"]
) -> tuple[MaskedCache, Slots]:
    """Writes a prompt into an empty cache; tokens that do not survive get a slot with pos -1.

    Returns the slot of each token, `[B, K, T]`. T must not exceed the capacity.
    """
    B, T, K, D = k.shape
    tokens = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, K, T))
    # Fresh slots follow the last real token, so padding is overwritten by what comes next.
    used = jnp.max(jnp.where(survives, tokens + 1, 0), axis=-1)
    cache = cache._replace(
        k=_replace(cache.k, layer, cache.k[layer].at[..., :T].set(k.transpose(0, 2, 3, 1))),
        v=_replace(cache.v, layer, cache.v[layer].at[:, :, :T].set(v.swapaxes(1, 2))),
        pos=_replace(cache.pos, layer, cache.pos[layer].at[:, :, :T].set(jnp.where(survives, tokens, -1))),
        used=_replace(cache.used, layer, used),
    )
    return cache, tokens


def place_masked(
    cache: MaskedCache,
    layer: int,
    k: NewKV,
    v: NewKV,
    position: Int[Array, "B"],
    victim: PerHead,
) -> tuple[MaskedCache, PerHead]:
    """Writes one token a sequence (`k`, `v` `[B, 1, K, D]`) to the next fresh slot and hides the victim."""
    B, K, S = cache.pos[layer].shape
    b, h = jnp.arange(B)[:, None], jnp.arange(K)[None, :]
    slot = cache.used[layer]
    pos = cache.pos[layer]
    # -1 would wrap to the last slot; S is out of range and dropped.
    pos = pos.at[b, h, jnp.where(victim < 0, S, victim)].set(-1, mode="drop")
    pos = pos.at[b, h, slot].set(position[:, None], mode="drop")
    cache = cache._replace(
        k=_replace(cache.k, layer, cache.k[layer].at[b, h, :, slot].set(k[:, 0], mode="drop")),
        v=_replace(cache.v, layer, cache.v[layer].at[b, h, slot].set(v[:, 0], mode="drop")),
        pos=_replace(cache.pos, layer, pos),
        used=_replace(cache.used, layer, slot + 1),
    )
    return cache, slot


def attend_masked(cache: MaskedCache, layer: int, q: Queries) -> Queries:
    """Attention of `q` `[B, T, H, D]` over every live slot."""
    B, T, H, D = q.shape
    K = cache.pos[layer].shape[1]
    q = q.reshape(B, T, K, H // K, D).swapaxes(1, 2).reshape(B, K, -1, D)  # T and G as one axis of rows
    scores = jnp.einsum("BKGD,BKDS->BKGS", q, cache.k[layer], preferred_element_type=jnp.float32) * D**-0.5
    scores += jnp.where(cache.pos[layer] >= 0, 0.0, NEGATIVE)[:, :, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("BKGS,BKSD->BKGD", weights, cache.v[layer])
    return out.reshape(B, K, T, H // K, D).swapaxes(1, 2).reshape(B, T, H, D)


def live_masked(cache: MaskedCache, layer: int) -> PerHead:
    """Live tokens of each head, `[B, K]`."""
    return jnp.sum(cache.pos[layer] >= 0, axis=-1, dtype=jnp.int32)


MASKED = Storage(init_masked, fill_masked, place_masked, attend_masked, live_masked)


def storage(config: CacheConfig) -> Storage:
    """The storage that a configuration names."""
    return {"masked": MASKED}[config.storage]
