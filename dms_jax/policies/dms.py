"""Dynamic Memory Sparsification with delayed eviction (arXiv 2506.05345, section 3.2).

At each step one token is stored and at most one is evicted in a head: the one whose distance becomes w + 1, if its
decision was to evict. So a ring of the last w + 1 slots and decisions is all the state there is. With w = 2:

    position   0  1  2  3  4         position % 3 is the ring index, and at position 4 the entry there
    ring index 0  1  2  0  1         still belongs to token 1, whose distance becomes 3
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dms_jax import dms
from dms_jax.config import DMSConfig
from dms_jax.policies.base import DecodeStep, NewToken, Policy, PrefillChunk
from dms_jax.types import Counts, PerHead, SlotFlags, Slots

MANY = 64  # rows; see `_set` and docs/speed.md


class Ring(NamedTuple):
    """The last w + 1 tokens of each head, at index `position % (w + 1)`."""

    slot: Int[Array, "B K R"]
    evict: Bool[Array, "B K R"]


@dataclass(frozen=True)
class DelayedEviction(Policy):
    """Evicts the tokens that the gate decided on, each `window` tokens later."""

    dms: DMSConfig = DMSConfig()
    name: ClassVar[str] = "dms"

    @property
    def window(self) -> int:
        return self.dms.window

    @property
    def needs_current_logit(self) -> bool:
        """With o = w + 1 a token's decision is read off the token at which it is evicted."""
        return self.dms.decision_offset == self.dms.window + 1

    def init_state(self, batch: int, num_kv_heads: int, slots: int, head_dim: int) -> Ring:
        shape = (batch, num_kv_heads, self.window + 1)
        return Ring(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))

    def prefill_evict_mask(self, state: Ring, chunk: PrefillChunk) -> SlotFlags:
        decided, offset = dms.hard_decisions(chunk.logit), self.dms.decision_offset
        evict = self._decide_earlier_tokens(state, chunk, decided).evict if offset > 0 else state.evict
        B, K, W = chunk.pos.shape
        slot = jnp.where((self._newest(chunk.start) >= 0)[:, None], state.slot, W)
        b, h = jnp.ogrid[:B, :K]
        old = jnp.zeros((B, K, W), bool).at[b[..., None], h[..., None], slot].set(evict, mode="drop")
        alpha = jnp.concatenate([old, dms.shift(decided, offset, chunk.count, False)], axis=-1)
        return alpha & (chunk.positions() >= self.dms.sinks)

    def prefill_keep_mask(self, state, chunk: PrefillChunk, evicted: SlotFlags, attention):
        distance = chunk.newest()[:, None, None] - chunk.positions()
        return chunk.present() & ~(evicted & (distance > self.window)), evicted

    def commit_prefill(self, state: Ring, chunk: PrefillChunk, carry: SlotFlags, slots: Slots) -> Ring:
        W = chunk.pos.shape[-1]
        token = self._newest(chunk.start + chunk.count)
        # An entry is the chunk's if its newest token is; an older one keeps its slot, with its decision as it is now.
        # An index that no token has yet holds something arbitrary; it is overwritten before it is read.
        of_chunk = (token >= chunk.start[:, None])[:, None]
        index = W + jnp.clip(token - chunk.start[:, None], 0, chunk.k.shape[1] - 1)[:, None]
        index = jnp.where(of_chunk, index, jnp.clip(state.slot, 0, max(W - 1, 0)))
        return Ring(jnp.take_along_axis(slots, index, axis=-1), jnp.take_along_axis(carry, index, axis=-1))

    def choose_victim(self, state: Ring, step: DecodeStep, logit: Float[Array, "B K"] | None) -> tuple[PerHead, Ring]:
        width = self.window + 1
        if self.needs_current_logit:
            state = self._decide(state, step, logit)
        index = step.position % width
        evicted = _get(state.evict, index) & (step.active & (step.position >= width))[:, None]
        return jnp.where(evicted, _get(state.slot, index), -1), state

    def update(self, state: Ring, step: DecodeStep, new: NewToken) -> Ring:
        index, undecided = step.position % (self.window + 1), jnp.zeros_like(new.slot, bool)
        evict = _set(state.evict, index, undecided, step.active)
        state = Ring(_set(state.slot, index, new.slot, step.active), evict)
        return state if self.needs_current_logit else self._decide(state, step, new.logit)

    def _newest(self, end: Counts) -> Int[Array, "B R"]:
        """The newest position before `end` with each ring index, negative for none: for 7 and width 3: 6, 4, 5."""
        last = end[:, None] - 1
        return last - (last - jnp.arange(self.window + 1)) % (self.window + 1)

    def _decide_earlier_tokens(self, state: Ring, chunk: PrefillChunk, decided: Bool[Array, "B K C"]) -> Ring:
        """The chunk's first tokens carry the decisions of those `offset` before them."""
        ring = self._newest(chunk.start)
        source = ring + self.dms.decision_offset - chunk.start[:, None]
        known = (ring >= 0) & (source >= 0) & (source < chunk.count[:, None])
        index = jnp.clip(source, 0, decided.shape[-1] - 1)[:, None]
        new = jnp.take_along_axis(decided, jnp.broadcast_to(index, state.evict.shape), axis=-1)
        return state._replace(evict=jnp.where(known[:, None], new, state.evict))

    def _decide(self, state: Ring, step: DecodeStep, logit: Float[Array, "B K"]) -> Ring:
        """The new token's logit is the decision of the token `offset` before it."""
        token = step.position - self.dms.decision_offset
        known = step.active & (token >= self.dms.sinks)
        evict = _set(state.evict, token % (self.window + 1), dms.hard_decisions(logit), known)
        return state._replace(evict=evict)


def _get(ring: Array, index: Int[Array, "B"]) -> Array:
    return jnp.take_along_axis(ring, index[:, None, None], axis=-1)[..., 0]


def _set(ring: Array, index: Int[Array, "B"], value: Array, where: Bool[Array, "B"]) -> Array:
    """Rings are short: to write all of a few rows costs less than a scatter, of many rows more."""
    if len(ring) > MANY:
        b, k = jnp.ogrid[: len(ring), : ring.shape[1]]
        return ring.at[b, k, jnp.where(where, index, ring.shape[-1])[:, None]].set(value, mode="drop")
    at = (jnp.arange(ring.shape[-1]) == index[:, None]) & where[:, None]
    return jnp.where(at[:, None], value[..., None], ring)
