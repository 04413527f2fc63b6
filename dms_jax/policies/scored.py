"""Policies with a budget: every live token has a score, and in a full head a new token overwrites the lowest.

A prompt is read whole and pruned once, at its end, so that the size of its chunks changes nothing; from then on the
budget holds at every step: with `budget` tokens live the victim is evicted before the new token is stored and read.

With `evict_every = n` a head grows to `budget + n - 1` tokens, and evicts the n lowest together before the next one
is stored; so it holds `budget` again after that step. Budget 4 and n = 3, live tokens after each step:

    prompt of 9   4   5   6   4   5   6   4 ...      evicts 5, then 3 at a time
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dms_jax.config import Size, check, require
from dms_jax.policies.base import DecodeStep, NewToken, Policy, PrefillChunk, Stored
from dms_jax.types import Counts, Keys, NewKeys, NewValues, PerHead, SlotFlags, Slots, StoredKeys, StoredValues

Budget = Size | tuple[tuple[Size, ...], ...]


class Scores(NamedTuple):
    """What is known of each slot."""

    pos: Slots  # [B, K, S], -1 for an empty one
    score: Float[Array, "B K S"]
    prompt: SlotFlags  # whether the token came with a prompt


class Candidates(NamedTuple):
    """The tokens of one layer among which an eviction chooses."""

    k: StoredKeys
    v: StoredValues
    pos: Slots  # -1 for none: its key and value say nothing
    score: Float[Array, "B K S"]
    limit: PerHead  # tokens that a head may hold
    keys: Keys  # a random key for each sequence, another at every eviction and in every layer


@dataclass(frozen=True)
class ScoredPolicy(Policy):
    """Keeps the tokens with the highest scores; a method overrides some of the four methods that come first.

    budget: live tokens a head, or a tuple of tuples: one number for each layer and KV head.
    protect_prompt: never evict a token of a prompt. A prompt that fills the budget is kept all the same, and beside
      it the least number of tokens that the method can work with (`num_protected` + 1).
    evict_every: steps from one eviction to the next. Between them a head holds up to `evict_every - 1` tokens more
      than its budget, which `peak_tokens` and `kv_reads` count.
    ranks_stored: whether `rank` is used; evictions then read what is stored.
    """

    budget: Budget = 1024
    protect_prompt: bool = False
    evict_every: Size = 1
    max_protected: ClassVar[int] = 0
    ranks_stored: ClassVar[bool] = False

    def __post_init__(self):
        check(self)
        rows = ((self.budget,),) if isinstance(self.budget, int) else self.budget
        even = len({len(row) for row in rows}) == 1 and rows[0] != ()
        require(even, "budget", self.budget, "expected as many numbers for each layer")
        smallest = min(min(row) for row in rows)
        held = f"policy {self.name!r} needs more than the {self.num_protected} it never evicts"
        require(smallest > self.num_protected, "budget", self.budget, held)

    @property
    def num_protected(self) -> int:
        """The most tokens that `protected` names at any time."""
        return self.max_protected

    @property
    def max_budget(self) -> int:
        return int(np.max(self.budget)) + self.evict_every - 1

    @property
    def evicts_many(self) -> bool:
        return self.evict_every > 1 or self.ranks_stored

    # What a method overrides

    def initial_score(self, k: NewKeys, v: NewValues, pos: Slots, keys: Keys) -> Float[Array, "B K T"]:
        """Scores of new tokens; k, v `[B, T, K, D]`, pos `[B, K, T]`, keys `[B, 2]`: one random key a sequence."""
        return jnp.zeros(pos.shape)

    def update_score(self, score: Float[Array, "B K S"], attention: Float[Array, "B K S"]) -> Float[Array, "B K S"]:
        """Scores after a chunk or a step in which the slots got these attention weights."""
        return score

    def rank(self, tokens: Candidates) -> Float[Array, "B K S"]:
        """The scores that an eviction goes by, where they depend on the other tokens stored or are drawn anew."""
        return tokens.score

    def protected(self, pos: Slots, newest: Counts) -> SlotFlags:
        """Which positions must stay, given the newest one; at most `num_protected` of them."""
        return jnp.zeros_like(pos, bool)

    # What follows

    def init_state(self, batch: int, num_kv_heads: int, slots: int, head_dim: int) -> Scores:
        shape = (batch, num_kv_heads, slots)
        return Scores(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool))

    def prefill_keep_mask(self, state: Scores, chunk: PrefillChunk, evicted, attention):
        W, pos = chunk.pos.shape[-1], chunk.positions()
        fresh = self.initial_score(chunk.k, chunk.v, pos[..., W:], chunk.keys)
        score = jnp.concatenate([state.score[..., :W], fresh], axis=-1)
        score = score if attention is None else self.update_score(score, attention)
        prompt = jnp.concatenate([state.prompt[..., :W], jnp.ones_like(fresh, bool)], axis=-1) & (pos >= 0)
        limit = self._limit(chunk.layer, prompt)
        # The rest of a prompt is still to be read, and attends to all of it; or nothing is read in this row.
        unfinished = (chunk.remaining > 0) | (chunk.count == 0)
        most = jnp.where(unfinished[:, None], pos.shape[-1], limit)
        ranked = score
        if self.ranks_stored:
            both = zip(chunk.stored, (chunk.k, chunk.v), strict=True)
            k, v = (jnp.concatenate([old.astype(new.dtype), new.swapaxes(1, 2)], axis=2) for old, new in both)
            keys = _another(chunk.keys, chunk.newest(), chunk.layer)
            ranked = self.rank(Candidates(k, v, pos, score, limit, keys))
        return self._highest(pos, ranked, prompt, chunk.newest(), most), (score, prompt)

    def commit_prefill(self, state: Scores, chunk: PrefillChunk, carry, slots: Slots) -> Scores:
        score, prompt = carry
        return self._stored_at(state, Scores(chunk.positions(), score, prompt), slots)

    def due(self, state: Scores, step: DecodeStep):
        limit = self._limit(step.layer, state.prompt & (state.pos >= 0))
        return (step.live >= limit + self.evict_every - 1) & step.active[:, None]

    def prune(self, state: Scores, step: DecodeStep, stored: Stored) -> tuple[SlotFlags, Scores]:
        pos, prompt, score = state.pos, state.prompt & (state.pos >= 0), state.score
        limit = self._limit(step.layer, prompt)
        if self.ranks_stored:
            keys = _another(step.keys, step.position, step.layer)
            score = self.rank(Candidates(*stored, pos, score, limit, keys))
        return self._highest(pos, score, prompt, step.position, limit - 1), state

    def move(self, state: Scores, slots: Slots) -> Scores:
        return self._stored_at(state, state, slots)

    def choose_victim(self, state: Scores, step: DecodeStep, logit) -> tuple[PerHead, Scores]:
        if self.evicts_many:  # `prune` has made room
            return jnp.full_like(step.live, -1), state
        live = state.pos >= 0
        candidate = live & ~self.protected(state.pos, step.position)
        if self.protect_prompt:
            candidate &= ~state.prompt
        score = jnp.where(candidate, state.score, jnp.inf)
        lowest = candidate & (score == score.min(axis=-1, keepdims=True))
        oldest = jnp.argmin(jnp.where(lowest, state.pos, jnp.iinfo(jnp.int32).max), axis=-1)
        full = step.live >= self._limit(step.layer, live & state.prompt)
        victim = jnp.where(full & step.active[:, None], oldest, -1).astype(jnp.int32)
        gone = jnp.arange(state.pos.shape[-1]) == victim[..., None]
        return victim, state._replace(pos=jnp.where(gone, -1, state.pos))

    def update(self, state: Scores, step: DecodeStep, new: NewToken) -> Scores:
        at = jnp.arange(state.pos.shape[-1]) == new.slot[..., None]
        pos = jnp.broadcast_to(step.position[:, None], new.slot.shape)[..., None]
        fresh = self.initial_score(new.k[:, None], new.v[:, None], pos, step.keys)
        score = jnp.where(at, fresh, state.score)
        if new.attention is not None:
            active = step.active[:, None, None]
            score = jnp.where(active, self.update_score(score, new.attention), score)
        return Scores(jnp.where(at, pos, state.pos), score, state.prompt & ~at)

    def _highest(self, pos: Slots, score, prompt: SlotFlags, newest: Counts, most: PerHead) -> SlotFlags:
        """The `most` tokens of each head with the highest scores, protected ones first."""
        kept = self.protected(pos, newest) | (prompt & self.protect_prompt)
        rank = jnp.where(pos >= 0, jnp.where(kept, jnp.inf, score), -jnp.inf)
        # Of equals the older is evicted first, whatever the order of slots.
        return largest(rank, pos, most) & (pos >= 0)

    def _stored_at(self, state: Scores, tokens: Scores, slots: Slots) -> Scores:
        """A state like `state` with each of `tokens` in its slot; -1 is nowhere."""
        B, K, S = state.pos.shape
        b, h = jnp.ogrid[:B, :K]
        at = b[..., None], h[..., None], jnp.where(slots < 0, S, slots)  # out of range: dropped
        empty = self.init_state(B, K, S, 0)
        return Scores(*(x.at[at].set(y, mode="drop") for x, y in zip(empty, tokens, strict=True)))

    def _limit(self, layer: Int[Array, ""], prompt: SlotFlags) -> PerHead:
        """Live tokens that each head may hold, `[B, K]`; `prompt` flags those that came with a prompt."""
        budget = jnp.asarray(np.asarray(self.budget, np.int32))
        budget = jnp.broadcast_to(budget if budget.ndim == 0 else budget[layer], prompt.shape[:2])
        if not self.protect_prompt:
            return budget
        return jnp.maximum(budget, prompt.sum(axis=-1, dtype=jnp.int32) + self.num_protected + 1)


def largest(x: Float[Array, "B K S"], ties: Slots, count: PerHead) -> SlotFlags:
    """The `count` largest of each head; of equals those with the larger of `ties`, which differ."""
    least, at = jax.lax.sort((x, ties), num_keys=2)
    last = jnp.clip(x.shape[-1] - count, 0, x.shape[-1] - 1)[..., None]
    least, at = (jnp.take_along_axis(y, last, axis=-1) for y in (least, at))
    return ((x > least) | (x == least) & (ties >= at)) & (count > 0)[..., None]


def _another(keys: Keys, position: Counts, layer: Int[Array, ""]) -> Keys:
    """Random keys for the eviction at these positions in this layer."""
    return jax.vmap(lambda key, at: jax.random.fold_in(jax.random.fold_in(key, at), layer))(keys, position)
