"""Level 2. Dynamic Memory Sparsification with delayed eviction (arXiv 2506.05345, section 3.2).

At each step one token comes in and at most one leaves a head: the one whose distance becomes w + 1, if it was
marked. So a ring of the last w + 1 slots and decisions is all the state there is. With w = 2:

    position   0  1  2  3  4         position % 3 is the ring index, and at position 4 the entry there
    ring index 0  1  2  0  1         still belongs to token 1, the one that is leaving
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dms_jax import dms, masks
from dms_jax.config import DMSConfig
from dms_jax.policies.base import Policy
from dms_jax.types import Decisions, GateLogits, Lengths, PerHead, Slots


class Ring(NamedTuple):
    """The last w + 1 tokens of each head, at index `position % (w + 1)`."""

    slot: Int[Array, "B K W"]
    evict: Bool[Array, "B K W"]


@functools.cache
def delayed_eviction(config: DMSConfig) -> Policy:
    """The policy for a window, an offset and a gate. Cached, so that equal configs share compiled code."""
    width = config.window + 1
    offset = config.decision_offset

    def mark(k, logit: GateLogits, lengths: Lengths) -> Decisions:
        return masks.shift(dms.hard_decisions(logit), offset, lengths, False)

    def settle(alpha: Decisions, slots: Slots, lengths: Lengths) -> Ring:
        # The newest prompt token with each ring index: for 7 tokens and width 3 that is 6, 4, 5.
        last = lengths[:, None] - 1
        newest = last - (last - jnp.arange(width)) % width
        token = jnp.broadcast_to(jnp.maximum(newest, 0)[:, None, :], (*slots.shape[:2], width))
        # An index that no token has yet holds token 0's entry; it is overwritten before it is looked at.
        return Ring(jnp.take_along_axis(slots, token, axis=-1), jnp.take_along_axis(alpha, token, axis=-1))

    def choose(state: Ring, position: Int[Array, "B"], k, logit) -> tuple[PerHead, Ring]:
        if offset > 0:  # this token tells the fate of the one `offset` before it
            known = _set(state.evict, (position - offset) % width, dms.hard_decisions(logit))
            state = state._replace(evict=jnp.where((position >= offset)[:, None, None], known, state.evict))
        leaving = _get(state.evict, position % width) & (position >= width)[:, None]
        return jnp.where(leaving, _get(state.slot, position % width), -1), state

    def record(state: Ring, position: Int[Array, "B"], slot: PerHead, logit) -> Ring:
        evict = dms.hard_decisions(logit) if offset == 0 else jnp.zeros_like(slot, bool)
        index = position % width
        return Ring(slot=_set(state.slot, index, slot), evict=_set(state.evict, index, evict))

    return Policy("dms", config.window, mark, settle, choose, record)


def _get(ring: Array, index: Int[Array, "B"]) -> Array:
    return jnp.take_along_axis(ring, index[:, None, None], axis=-1)[..., 0]


def _set(ring: Array, index: Int[Array, "B"], value: Array) -> Array:
    B, K, _ = ring.shape
    return ring.at[jnp.arange(B)[:, None], jnp.arange(K)[None, :], index[:, None]].set(value)
