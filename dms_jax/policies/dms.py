"""Dynamic Memory Sparsification with delayed eviction (arXiv 2506.05345, section 3.2).

At each step one token comes in and at most one leaves a head: the one whose distance becomes w + 1, if it was
marked. So a ring of the last w + 1 slots and decisions is all the state there is. With w = 2:

    position   0  1  2  3  4         position % 3 is the ring index, and at position 4 the entry there
    ring index 0  1  2  0  1         still belongs to token 1, the one that is leaving
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dms_jax import dms
from dms_jax.config import DMSConfig
from dms_jax.policies.base import DecodeStep, NewToken, Policy, PrefillChunk, positions, present
from dms_jax.types import Counts, PerHead, SlotFlags, Slots


class Ring(NamedTuple):
    """The last w + 1 tokens of each head, at index `position % (w + 1)`."""

    slot: Int[Array, "B K R"]
    evict: Bool[Array, "B K R"]


@functools.cache
def delayed_eviction(config: DMSConfig) -> Policy:
    """The policy for a window, an offset and a gate. Cached, so that equal configs share compiled code."""
    width = config.window + 1
    offset = config.decision_offset
    late = offset == width  # the token that tells is the one at which the other leaves

    def init(batch: int, heads: int, slots: int) -> Ring:
        shape = (batch, heads, width)
        return Ring(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))

    def newest(end: Counts) -> Int[Array, "B R"]:
        """The newest position before `end` with each ring index, negative for none: for 7 and width 3: 6, 4, 5."""
        last = end[:, None] - 1
        return last - (last - jnp.arange(width)) % width

    def mark(state: Ring, span: PrefillChunk) -> SlotFlags:
        fresh = dms.hard_decisions(span.logit)
        if offset > 0:  # the chunk's first tokens tell the fate of those `offset` before them
            ring = newest(span.start)
            source = ring + offset - span.start[:, None]
            told = (ring >= 0) & (source >= 0) & (source < span.count[:, None])
            index = jnp.clip(source, 0, fresh.shape[-1] - 1)[:, None]
            news = jnp.take_along_axis(fresh, jnp.broadcast_to(index, state.evict.shape), axis=-1)
            state = state._replace(evict=jnp.where(told[:, None], news, state.evict))
        B, K, W = span.pos.shape
        slot = jnp.where((newest(span.start) >= 0)[:, None], state.slot, W)
        b, h = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
        old = jnp.zeros((B, K, W), bool).at[b, h, slot].set(state.evict, mode="drop")
        return jnp.concatenate([old, dms.shift(fresh, offset, span.count, False)], axis=-1)

    def retain(state: Ring, span: PrefillChunk, alpha: SlotFlags, weights) -> tuple[SlotFlags, SlotFlags]:
        last = (span.start + span.count - 1)[:, None, None]
        return present(span) & ~(alpha & (last - positions(span) > config.window)), alpha

    def settle(state: Ring, span: PrefillChunk, alpha: SlotFlags, slots: Slots) -> Ring:
        W = span.pos.shape[-1]
        token = newest(span.start + span.count)
        # An entry is the chunk's if its newest token is; an older one keeps its slot, and may have been marked since.
        # An index that no token has yet holds something arbitrary; it is overwritten before it is looked at.
        of_chunk = (token >= span.start[:, None])[:, None]
        index = W + jnp.clip(token - span.start[:, None], 0, span.k.shape[1] - 1)[:, None]
        index = jnp.where(of_chunk, index, jnp.clip(state.slot, 0, max(W - 1, 0)))
        evict = jnp.take_along_axis(alpha, index, axis=-1)
        return Ring(jnp.take_along_axis(slots, index, axis=-1), evict)

    def tell(state: Ring, step: DecodeStep, logit) -> Ring:
        """The newcomer's logit is the decision for the token `offset` before it."""
        told = step.active & (step.position >= offset)
        evict = _set(state.evict, (step.position - offset) % width, dms.hard_decisions(logit), told)
        return state._replace(evict=evict)

    def choose(state: Ring, step: DecodeStep, logit) -> tuple[PerHead, Ring]:
        index = step.position % width
        if late:
            state = tell(state, step, logit)
        leaving = _get(state.evict, index) & (step.active & (step.position >= width))[:, None]
        return jnp.where(leaving, _get(state.slot, index), -1), state

    def record(state: Ring, step: DecodeStep, new: NewToken) -> Ring:
        index, undecided = step.position % width, jnp.zeros_like(new.slot, bool)
        evict = _set(state.evict, index, undecided, step.active)
        state = Ring(_set(state.slot, index, new.slot, step.active), evict)
        return state if late else tell(state, step, new.logit)

    return Policy("dms", config.window, None, None, init, mark, retain, settle, choose, None, record, late)


def _get(ring: Array, index: Int[Array, "B"]) -> Array:
    return jnp.take_along_axis(ring, index[:, None, None], axis=-1)[..., 0]


def _set(ring: Array, index: Int[Array, "B"], value: Array, where: Bool[Array, "B"]) -> Array:
    at = (jnp.arange(ring.shape[-1]) == index[:, None]) & where[:, None]  # rings are short: cheaper than a scatter
    return jnp.where(at[:, None], value[..., None], ring)
