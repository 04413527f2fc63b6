"""What an eviction policy is: a record of pure functions over a state kept for each layer.

A policy decides which slot a new token drives out, and what of a prompt stays. It never touches what is stored, so
it does not know how. While decoding it is asked, in this order: `choose` (who leaves), `select` (what is read),
`record` (what was read, and where the newcomer went). Who leaves follows from what was seen before the step (unless
the policy is `late`), so `choose` runs for all layers before the first of them, and `record` after the last: both are
written for one layer and mapped over all. While a prompt is read, chunk by chunk: `mark` (what the later tokens of
the chunk no longer see), `retain` (what stays after the chunk), `settle` (where it lies).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dms_jax.types import Counts, GateLogits, Keys, NewKV, PerHead, PerHeadKV, SlotFlags, Slots


class DecodeStep(NamedTuple):
    """One new token of each sequence. Of a sequence that is not active nothing may change."""

    position: Counts  # of the new token
    active: Bool[Array, "B"]
    live: PerHead  # live tokens before it comes
    keys: Keys  # a random key for each sequence


class NewToken(NamedTuple):
    """What a layer showed of the new token."""

    slot: PerHead  # where it lies; no slot where its sequence is not active
    k: PerHeadKV  # its key
    logit: Float[Array, "B K"] | None  # its eviction logit, None for a model without a gate
    weights: Float[Array, "B K S"] | None  # its attention, where the policy asks for weights


class PrefillChunk(NamedTuple):
    """A chunk of C prompt tokens, at positions `start + 0 .. start + count - 1`, after W slots already filled."""

    start: Counts
    count: Counts
    pos: Slots  # [B, K, W] positions in the old slots, -1 for empty
    k: NewKV  # [B, C, K, D]
    logit: GateLogits | None  # [B, K, C]
    keys: Keys


class Policy(NamedTuple):
    """One method. Everything about slots covers the W old slots of a PrefillChunk, then its C tokens.

    window: a marked prompt token stays visible to the next `window` tokens.
    budget: the most live tokens a head may hold after a chunk or a step; None where no number bounds it.
    weights: whether it needs attention weights. They are summed over the query heads of a KV head; for a prompt also
      over its queries ("sum"), or they are those of the last query alone ("last").
    late: whether who leaves depends on the newcomer's own eviction logit.
    """

    name: str
    window: int
    budget: int | None
    weights: str | None
    init: Callable[[int, int, int], Any]  # (batch, KV heads, slots) -> state of a layer
    mark: Callable[[Any, PrefillChunk], SlotFlags]  # -> alpha [B, K, W + C]
    retain: Callable[..., tuple[SlotFlags, Any]]  # (state, PrefillChunk, alpha, weights [B, K, W + C]) -> stay, carry
    settle: Callable[..., Any]  # (state, PrefillChunk, carry, slots [B, K, W + C]) -> state
    choose: Callable[
        ..., tuple[PerHead, Any]
    ]  # (state, DecodeStep, logit [B, K] if late) -> victim's slot or -1, state
    select: Callable[..., Bool[Array, "B K P"]] | None  # (state, DecodeStep, q [B, H, D]) -> readable pages; None: all
    record: Callable[[Any, DecodeStep, NewToken], Any]  # -> state
    late: bool = False


def present(span: PrefillChunk) -> SlotFlags:
    """Which old slots and which places of the chunk hold a token, `[B, K, W + C]`."""
    real = jnp.arange(span.k.shape[1]) < span.count[:, None]
    real = jnp.broadcast_to(real[:, None], (*span.pos.shape[:2], real.shape[1]))
    return jnp.concatenate([span.pos >= 0, real], axis=-1)


def positions(span: PrefillChunk) -> Slots:
    """The position in each old slot and of each token of the chunk, -1 for none, `[B, K, W + C]`."""
    new = span.start[:, None] + jnp.arange(span.k.shape[1], dtype=jnp.int32)
    new = jnp.broadcast_to(new[:, None], (*span.pos.shape[:2], new.shape[1]))
    return jnp.where(present(span), jnp.concatenate([span.pos, new], axis=-1), -1)


def nothing_marked(state, span: PrefillChunk) -> SlotFlags:
    """`mark` of every policy without a mask of its own: a chunk reads all that came before."""
    return jnp.zeros_like(present(span))
