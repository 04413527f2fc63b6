"""Quest: everything is stored, and each query reads the pages that could matter most (Tang et al. 2024,
arXiv 2406.10774).

A page's summary is the smallest and the largest value of each dim of its keys; `sum_d max(q_d min_d, q_d max_d)` is
at least as large as the score of any of its tokens. The pages with the largest bounds are read, and always the one
that is being filled. For grouped-query attention a page's bound is the largest of its KV head's query heads.
Deviation: the authors read everything in the first two layers; here all layers read alike.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dms_jax.config import Size, check, require
from dms_jax.policies.base import DecodeStep, NewToken, Policy, PrefillChunk
from dms_jax.types import PerHead, Slots


class Summaries(NamedTuple):
    """Of each page of each head. Nothing is evicted, so slots are positions."""

    low: Float[Array, "B K P D"]
    high: Float[Array, "B K P D"]


@dataclass(frozen=True)
class Quest(Policy):
    """Reads `budget` tokens a step, a whole number of pages (at least the newest); the summaries are counted too.

    A page's summary is two vectors, as much as one token's key and value: for each page that is held one more token
    is read in every step, and held. (In latent attention, where no value is stored beside the key, it takes two tokens'
    memory, and is counted as one.)
    page_size: that of the cache.
    """

    budget: Size = 1024
    page_size: Size = 64
    name: ClassVar[str] = "quest"
    selects_pages: ClassVar[bool] = True

    def __post_init__(self):
        check(self)
        whole = f"policy 'quest' reads whole pages of page_size={self.page_size}"
        require(self.budget >= self.page_size, "budget", self.budget, whole)

    def overhead(self, tokens: float) -> float:
        return math.ceil(tokens / self.page_size)

    def init_state(self, batch: int, num_kv_heads: int, slots: int, head_dim: int) -> Summaries:
        shape = (batch, num_kv_heads, -(-slots // self.page_size), head_dim)
        return Summaries(jnp.full(shape, jnp.inf), jnp.full(shape, -jnp.inf))

    def commit_prefill(self, state: Summaries, chunk: PrefillChunk, carry, slots: Slots) -> Summaries:
        fresh = (chunk.start == 0)[:, None, None, None]  # another sequence may have used the row before
        state = Summaries(jnp.where(fresh, jnp.inf, state.low), jnp.where(fresh, -jnp.inf, state.high))
        new = slots[..., chunk.pos.shape[-1] :]
        page = jnp.where(new < 0, state.low.shape[2], new // self.page_size)
        return _widen(state, page, chunk.k.swapaxes(1, 2))

    def select_pages(
        self, state: Summaries, step: DecodeStep, q: Float[Array, "B H D"]
    ) -> tuple[Bool[Array, "B K P"], PerHead]:
        B, K, P, D = state.low.shape
        held = jnp.arange(P) <= (step.live // self.page_size)[..., None]  # the new token is stored by now
        grouped = q.reshape(B, K, 1, -1, D).astype(state.low.dtype)
        low, high = (jnp.where(held[..., None], x, 0.0)[:, :, :, None] for x in state)
        bound = jnp.maximum(grouped * low, grouped * high).sum(axis=-1).max(axis=-1)
        newest = jnp.arange(P) == (step.live // self.page_size)[..., None]
        bound = jnp.where(newest, jnp.inf, jnp.where(held, bound, -jnp.inf))
        chosen = jax.lax.top_k(bound, min(self.budget // self.page_size, P))[1]
        b, h = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
        readable = jnp.zeros((B, K, P), bool).at[b, h, chosen].set(True) & held
        in_newest = step.live % self.page_size + 1
        tokens = (readable.sum(axis=-1) - 1) * self.page_size + in_newest
        return readable, (tokens + held.sum(axis=-1)).astype(jnp.int32)

    def update(self, state: Summaries, step: DecodeStep, new: NewToken) -> Summaries:
        page = jnp.where(step.active[:, None], new.slot // self.page_size, state.low.shape[2])
        return _widen(state, page[..., None], new.k[:, :, None])


def _widen(state: Summaries, page: Slots, k: Float[Array, "B K T D"]) -> Summaries:
    """The summaries with keys `[B, K, T, D]` added to those of their pages `[B, K, T]`; a page of P is dropped."""
    b, h = jnp.arange(page.shape[0])[:, None, None], jnp.arange(page.shape[1])[None, :, None]
    k = k.astype(state.low.dtype)
    return Summaries(
        state.low.at[b, h, page].min(k, mode="drop"),
        state.high.at[b, h, page].max(k, mode="drop"),
    )
