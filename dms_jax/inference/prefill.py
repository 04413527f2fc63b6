"""What a layer does with a chunk of a prompt: attention to it and to the cache, and what is stored of it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from dms_jax import dms, kernels, sharding
from dms_jax.cache import KVCache
from dms_jax.inference.eviction import layers_of
from dms_jax.kernels import attention
from dms_jax.policies import Policy, PrefillChunk, Stored
from dms_jax.types import Counts, Keys, Layer, Tokens


class PromptChunk(NamedTuple):
    """The next C tokens of the prompts of A rows.

    rows: `[A]`, distinct; a row beyond the batch is padding. tokens: `[A, C]`, right-padded, of which `count` `[A]`
    are real; 0 leaves a row as it is. remaining: tokens of each prompt after this chunk. max_new: at least 1.
    """

    rows: Counts
    tokens: Tokens
    count: Counts
    remaining: Counts
    max_new: Counts
    keys: Keys


class Read(NamedTuple):
    """What a layer made of a chunk, of which `PrefillAttend.store` stores a part; or all layers, an axis in front."""

    k: Num[Array, "*L A C K D"]
    v: Num[Array, "*L A C K U"]
    logit: Float[Array, "*L A K C"] | None
    evicted: Bool[Array, "*L A K WC"]
    attention: Float[Array, "*L A K WC"] | None


@dataclass(frozen=True, eq=False)
class PrefillAttend:
    """An `Attend` for a chunk of a prompt: reads the cache and the chunk under the policy's mask.

    Nothing is stored before all layers have read, so that storing is one loop over them (see `KVCache.over_layers`).

    cache, before: the rows' cache and state of the policy. start: the position of each row's first token. width: of
    the view of the cache that is read. It threads (what each layer made, keys seen by each token `[A, C]`) through the
    layers.
    """

    policy: Policy
    kv_cache: KVCache
    chunk: PromptChunk
    cache: Any
    before: Any
    start: Counts
    width: int

    @property
    def query_pos(self):
        return self.start[:, None] + jnp.arange(self.chunk.tokens.shape[1], dtype=jnp.int32)

    def __call__(self, layer, q, k, v, logit, carried):
        (made, seen), policy, query_pos = carried, self.policy, self.query_pos
        old, own, prompt = self._given(self.cache, layer, k, v, logit)
        evicted, pos = policy.prefill_evict_mask(own, prompt), prompt.positions()
        all_k, all_v = (
            jnp.concatenate([x.swapaxes(1, 2).astype(new.dtype), new], axis=1) for x, new in ((old.k, k), (old.v, v))
        )

        def flash(q, k, v, *mask):
            return kernels.flash_attention(q, k, v, kernels.EvictionMask(*mask, policy.window), hard=True)

        letters = ("B T H D", "B S K D", "B S K D", "B T", "B K S", "B K S")
        out = sharding.by_heads(flash, letters)(q, all_k, all_v, query_pos, pos, dms.hard_log_keep_prob(evicted))
        read = Read(k, v, logit, evicted, self._observed(q, all_k, pos))
        seen += dms.live_counts(pos, evicted, self.start, k.shape[1], policy.window).sum(axis=1)
        return out, ((*made, read), seen)

    def store(self, read: Read, cache: Any, layer: Layer) -> tuple[Any, Any]:
        """The cache with what the policy keeps in one layer of `read`, and its state of this layer."""
        policy, chunk = self.policy, self.chunk
        k, v, logit, evicted, weights = jax.tree.map(lambda x: x[layer], read)
        old, own, prompt = self._given(cache, layer, k, v, logit)
        keep, carry = policy.prefill_keep_mask(own, prompt, evicted, weights)
        token_pos = jnp.where(jnp.arange(k.shape[1]) < chunk.count[:, None], self.query_pos, -1)
        moving = old if policy.max_budget is not None else None  # only a budget makes a cache shrink
        cache, slots = self.kv_cache.write_prefill(cache, layer, k, v, token_pos, keep, moving)
        return cache, policy.commit_prefill(own, prompt, carry, slots)

    def _given(self, cache: Any, layer: Layer, k, v, logit):
        """Of one layer: what is stored, the policy's state, and the chunk as the policy gets it."""
        old, chunk = self.kv_cache.view(cache, layer, self.width), self.chunk
        counts = self.start, chunk.count, chunk.remaining
        prompt = PrefillChunk(jnp.int32(layer), *counts, old.pos, k, v, logit, chunk.keys, Stored(old.k, old.v))
        return old, layers_of(self.before, layer), prompt

    def _observed(self, q, k, pos):
        """The attention that each token gets from the queries that the policy wants to observe."""
        wanted, chunk = self.policy.attention_from, self.chunk
        if wanted is None:
            return None
        index = jnp.arange(q.shape[1])
        counted = index < chunk.count[:, None]
        if wanted != "all":
            counted &= index >= (chunk.count + chunk.remaining - wanted)[:, None]
        return attention.key_weights(q, k, self.query_pos, pos, counted.astype(jnp.float32))
