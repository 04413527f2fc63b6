"""Policies with a budget: every live token has a score, and in a full head a new token overwrites the lowest.

A prompt is read whole and pruned once, at its end, so that the size of its chunks changes nothing; from then on the
budget holds at every step: with `budget` tokens live the victim is evicted before the new token is stored and read.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dms_jax.config import Size, check, require
from dms_jax.policies.base import DecodeStep, NewToken, Policy, PrefillChunk
from dms_jax.types import Counts, Keys, NewKV, PerHead, SlotFlags, Slots

Budget = Size | tuple[tuple[Size, ...], ...]


class Scores(NamedTuple):
    """What is known of each slot."""

    pos: Slots  # [B, K, S], -1 for an empty one
    score: Float[Array, "B K S"]
    prompt: SlotFlags  # whether the token came with a prompt


@dataclass(frozen=True)
class ScoredPolicy(Policy):
    """Keeps the tokens with the highest scores; a method overrides `initial_score`, `update_score` or `protected`.

    budget: live tokens a head, or a tuple of tuples: one number for each layer and KV head.
    protect_prompt: never evict a token of a prompt. A prompt that fills the budget is kept all the same, and beside
      it the least number of tokens that the method can work with (`max_protected` + 1).
    """

    budget: Budget = 1024
    protect_prompt: bool = False
    max_protected: ClassVar[int] = 0

    def __post_init__(self):
        check(self)
        rows = ((self.budget,),) if isinstance(self.budget, int) else self.budget
        require(len({len(row) for row in rows}) == 1, "budget", self.budget, "expected as many numbers for each layer")
        smallest = min((least for row in rows for least in row), default=0)
        held = f"policy {self.name!r} needs more than the {self.num_protected} it never evicts"
        require(smallest > self.num_protected, "budget", self.budget, held)

    @property
    def num_protected(self) -> int:
        """The most tokens that `protected` names at any time."""
        return self.max_protected

    @property
    def max_budget(self) -> int:
        return int(np.max(self.budget))

    # What a method overrides

    def initial_score(self, k: NewKV, v: NewKV, pos: Slots, keys: Keys) -> Float[Array, "B K T"]:
        """Scores of new tokens; k, v `[B, T, K, D]`, pos `[B, K, T]`, keys `[B, 2]`: one random key a sequence."""
        return jnp.zeros(pos.shape)

    def update_score(self, score: Float[Array, "B K S"], attention: Float[Array, "B K S"]) -> Float[Array, "B K S"]:
        """Scores after a chunk or a step in which the slots got these attention weights."""
        return score

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
        # The rest of the prompt is still to be read, and attends to all of it.
        limit = jnp.where((chunk.remaining > 0)[:, None], pos.shape[-1], limit)
        kept = self.protected(pos, chunk.newest()) | (prompt & self.protect_prompt)
        rank = jnp.where(pos >= 0, jnp.where(kept, jnp.inf, score), -jnp.inf)
        # Of equals the older is evicted first, whatever the order of slots.
        order = jnp.argsort(jnp.lexsort((-pos, -rank), axis=-1), axis=-1)
        return (order < limit[..., None]) & (pos >= 0), (score, prompt)

    def commit_prefill(self, state: Scores, chunk: PrefillChunk, carry, slots: Slots) -> Scores:
        B, K, S = state.pos.shape
        b, h = jnp.ogrid[:B, :K]
        at = b[..., None], h[..., None], jnp.where(slots < 0, S, slots)  # out of range: dropped
        score, prompt = carry
        empty = self.init_state(B, K, S, 0)
        return Scores(
            empty.pos.at[at].set(chunk.positions(), mode="drop"),
            empty.score.at[at].set(score, mode="drop"),
            empty.prompt.at[at].set(prompt, mode="drop"),
        )

    def choose_victim(self, state: Scores, step: DecodeStep, logit) -> tuple[PerHead, Scores]:
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

    def _limit(self, layer: Int[Array, ""], prompt: SlotFlags) -> PerHead:
        """Live tokens that each head may hold, `[B, K]`; `prompt` flags those that came with a prompt."""
        budget = jnp.asarray(np.asarray(self.budget, np.int32))
        budget = jnp.broadcast_to(budget if budget.ndim == 0 else budget[layer], prompt.shape[:2])
        if not self.protect_prompt:
            return budget
        return jnp.maximum(budget, prompt.sum(axis=-1, dtype=jnp.int32) + self.num_protected + 1)
