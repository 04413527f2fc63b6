"""Policies with a budget: every live token has a score, and a newcomer to a full head drives out the lowest.

A method says how a score begins, how it changes with the attention weights seen, and which tokens are safe. Budgets
hold at every step: with `budget` tokens live, the victim leaves before the newcomer is stored and read. A prompt is
read whole (chunk by chunk, each pruned at its end), as the training-free methods do.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dms_jax.config import require
from dms_jax.policies.base import DecodeStep, NewToken, Policy, PrefillChunk, nothing_marked, positions
from dms_jax.types import Counts, NewKV, PerHead, SlotFlags, Slots


class Scores(NamedTuple):
    """What is known of each slot; a position of -1 marks an empty one."""

    pos: Slots  # [B, K, S]
    score: Float[Array, "B K S"]


def _begin(k: NewKV, pos: Slots, keys) -> Float[Array, "B K T"]:
    return jnp.zeros(pos.shape)


def _keep(score: Float[Array, "B K S"], weights) -> Float[Array, "B K S"]:
    return score


def _none(pos: Slots, last: Counts) -> SlotFlags:
    return jnp.zeros_like(pos, bool)


def budgeted(
    name: str,
    budget: int,
    *,
    begin: Callable = _begin,
    update: Callable = _keep,
    safe: Callable = _none,
    safe_tokens: int = 0,
    weights: str | None = None,
) -> Policy:
    """A policy that keeps `budget` tokens a head.

    Args:
      begin: (keys `[B, T, K, D]`, positions `[B, K, T]`, random keys `[B, 2]`) -> scores of new tokens `[B, K, T]`.
      update: (scores, attention weights) -> scores `[B, K, S]`, after each look at the cache.
      safe: (positions `[B, K, S]`, newest position `[B]`) -> which must stay, at most `safe_tokens` of them.
      weights: which attention weights of a prompt count, "sum" over its queries or the "last" query's.
    Raises:
      ConfigError: a budget that leaves nothing to evict.
    """
    require(
        budget > safe_tokens, "budget", budget, f"policy {name!r} needs more than the {safe_tokens} it never evicts"
    )

    def init(batch: int, heads: int, slots: int) -> Scores:
        return Scores(jnp.full((batch, heads, slots), -1, jnp.int32), jnp.zeros((batch, heads, slots)))

    def retain(state: Scores, span: PrefillChunk, alpha, seen) -> tuple[SlotFlags, Float[Array, "B K S"]]:
        W, pos = span.pos.shape[-1], positions(span)
        score = jnp.concatenate([state.score[..., :W], begin(span.k, pos[..., W:], span.keys)], axis=-1)
        score = score if seen is None else update(score, seen)
        rank = jnp.where(safe(pos, span.start + span.count - 1), jnp.inf, score)
        rank = jnp.where(pos >= 0, rank, -jnp.inf)
        # Of equals the older goes first, whatever the order of slots.
        order = jnp.argsort(jnp.lexsort((-pos, -rank), axis=-1), axis=-1)
        return (order < budget) & (pos >= 0), score

    def settle(state: Scores, span: PrefillChunk, score, slots: Slots) -> Scores:
        B, K, S = state.pos.shape
        b, h = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
        target = jnp.where(slots < 0, S, slots)  # out of range: dropped
        new = init(B, K, S)
        return Scores(
            new.pos.at[b, h, target].set(positions(span), mode="drop"),
            new.score.at[b, h, target].set(score, mode="drop"),
        )

    def choose(state: Scores, step: DecodeStep, _) -> tuple[PerHead, Scores]:
        candidate = (state.pos >= 0) & ~safe(state.pos, step.position)
        score = jnp.where(candidate, state.score, jnp.inf)
        lowest = candidate & (score == score.min(axis=-1, keepdims=True))
        oldest = jnp.argmin(jnp.where(lowest, state.pos, jnp.iinfo(jnp.int32).max), axis=-1)
        victim = jnp.where((step.live >= budget) & step.active[:, None], oldest, -1)
        gone = jnp.arange(state.pos.shape[-1]) == victim[..., None]
        return victim, state._replace(pos=jnp.where(gone, -1, state.pos))

    def record(state: Scores, step: DecodeStep, new: NewToken) -> Scores:
        at = jnp.arange(state.pos.shape[-1]) == new.slot[..., None]
        fresh = jnp.broadcast_to(step.position[:, None], new.slot.shape)
        score = begin(new.k[:, None], fresh[..., None], step.keys)
        state = Scores(jnp.where(at, fresh[..., None], state.pos), jnp.where(at, score, state.score))
        if new.weights is None:
            return state
        active = step.active[:, None, None]
        return state._replace(score=jnp.where(active, update(state.score, new.weights), state.score))

    return Policy(name, 0, budget, weights, init, nothing_marked, retain, settle, choose, None, record)


def uniform(pos: Slots, keys) -> Float[Array, "B K T"]:
    """A number in [0, 1) for each token and head that depends on the sequence's key and the position alone."""
    heads = jnp.arange(pos.shape[1])

    def one(key, head, position):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, head), position))

    over_tokens = jax.vmap(one, (None, None, 0))
    return jax.vmap(jax.vmap(over_tokens, (None, 0, 0)), (0, None, 0))(keys, heads, pos)
