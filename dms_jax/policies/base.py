"""What an eviction policy is: a frozen dataclass whose fields are hyper-parameters and whose methods are pure.

A policy chooses which slot a new token overwrites, and which tokens of a prompt are kept. It never touches what is
stored, so it does not know how. Its state, a pytree of arrays that begin with the batch axis, is passed in and
returned; there is one for each layer. In a decode step its methods run in this order:

    due, prune      (only where `evicts_many`) the heads that must evict now, what they keep, and `move`: the state
                    after what is kept has been moved together
    choose_victim   the slot that the new token overwrites in each head, -1 for a fresh one
    select_pages    the pages that attention reads (only where `selects_pages`)
    update          the state, from what attention read and where the new token was stored

What is evicted follows from what was read before the step (unless `needs_current_logit`), so `choose_victim` runs for
all layers before the first, and `update` after the last: both are written for one layer and mapped over all. While a
prompt is read, chunk by chunk:

    prefill_evict_mask   which tokens later tokens of the chunk cannot see beyond `window`
    prefill_keep_mask    which tokens are stored after the chunk
    commit_prefill       the state, from the slots where they were stored
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dms_jax.types import (
    Counts,
    GateLogits,
    Keys,
    NewKeys,
    NewValues,
    PerHead,
    PerHeadKeys,
    PerHeadValues,
    SlotFlags,
    Slots,
    StoredKeys,
    StoredValues,
)

State = Any  # a policy's state of one layer


class DecodeStep(NamedTuple):
    """One new token of each sequence, in one layer. Of a sequence that is not active nothing may change."""

    layer: Int[Array, ""]
    position: Counts  # of the new token
    active: Bool[Array, "B"]
    live: PerHead  # live tokens before the new one is stored
    keys: Keys  # a random key for each sequence


class NewToken(NamedTuple):
    """What attention computed for the new token in one layer."""

    slot: PerHead  # where it is stored; no slot where its sequence is not active
    k: PerHeadKeys
    v: PerHeadValues
    logit: Float[Array, "B K"] | None  # its eviction logit, None for a model without a gate
    attention: Float[Array, "B K S"] | None  # weight of each slot, summed over the query heads of a KV head


class Stored(NamedTuple):
    """Keys and values in the S slots of one layer; of an empty slot they say nothing."""

    k: StoredKeys
    v: StoredValues


class PrefillChunk(NamedTuple):
    """C tokens of a prompt, at positions `start + 0 .. start + count - 1`, after W slots already filled."""

    layer: Int[Array, ""]
    start: Counts
    count: Counts
    remaining: Counts  # tokens of the same prompt that are still to be read after this chunk
    pos: Slots  # [B, K, W] positions in the old slots, -1 for empty
    k: NewKeys  # [B, C, K, D]
    v: NewValues
    logit: GateLogits | None  # [B, K, C]
    keys: Keys
    stored: Stored | None = None  # in the old slots, for policies that rank by it

    def present(self) -> SlotFlags:
        """Which old slots and which places of the chunk hold a token, `[B, K, W + C]`."""
        real = jnp.arange(self.k.shape[1]) < self.count[:, None]
        real = jnp.broadcast_to(real[:, None], (*self.pos.shape[:2], real.shape[1]))
        return jnp.concatenate([self.pos >= 0, real], axis=-1)

    def positions(self) -> Slots:
        """The position in each old slot and of each token of the chunk, -1 for none, `[B, K, W + C]`."""
        new = self.start[:, None] + jnp.arange(self.k.shape[1], dtype=jnp.int32)
        new = jnp.broadcast_to(new[:, None], (*self.pos.shape[:2], new.shape[1]))
        return jnp.where(self.present(), jnp.concatenate([self.pos, new], axis=-1), -1)

    def newest(self) -> Counts:
        """The position of the last token read."""
        return self.start + self.count - 1


@dataclass(frozen=True)
class Policy:
    """Keeps everything, reads everything; a subclass overrides what differs.

    attention_from: the queries of a prompt whose attention `prefill_keep_mask` is given, summed over them: the last
      n of the whole prompt, or "all"; None: no attention weights are computed, in decoding neither.
    selects_pages: whether `select_pages` is used.
    evicts_many: whether `due` and `prune` are used: a head may evict several tokens at once, every so many steps.
    rereads: the share of each stored key and value that an eviction of many reads again, beside attention.
    needs_current_logit: whether what is evicted depends on the new token's own eviction logit.
    """

    name: ClassVar[str] = "full"
    attention_from: ClassVar[int | Literal["all"] | None] = None
    selects_pages: ClassVar[bool] = False
    rereads: ClassVar[float] = 0.0

    @property
    def evicts_many(self) -> bool:
        return False

    @property
    def needs_current_logit(self) -> bool:
        return False

    @property
    def window(self) -> int:
        """A prompt token in `prefill_evict_mask` stays visible to the next `window` tokens."""
        return 0

    @property
    def max_budget(self) -> int | None:
        """The most tokens that a head holds while decoding; None where nothing is pruned to a number."""
        return None

    def overhead(self, tokens: float) -> float:
        """Memory that a head takes beside so many live tokens, in tokens' worth of keys and values."""
        return 0.0

    def init_state(self, batch: int, num_kv_heads: int, slots: int, head_dim: int) -> State:
        """The state of one layer for `batch` empty sequences of up to `slots` slots a head."""
        return ()

    def prefill_evict_mask(self, state: State, chunk: PrefillChunk) -> SlotFlags:
        """alpha of the W old slots and the C tokens, `[B, K, W + C]`: True is invisible beyond the window."""
        return jnp.zeros_like(chunk.present())

    def prefill_keep_mask(
        self, state: State, chunk: PrefillChunk, evicted: SlotFlags, attention: Float[Array, "B K WC"] | None
    ) -> tuple[SlotFlags, Any]:
        """Which tokens are stored after the chunk, `[B, K, W + C]`, and a value for `commit_prefill`."""
        return chunk.present(), ()

    def commit_prefill(self, state: State, chunk: PrefillChunk, carry: Any, slots: Slots) -> State:
        """The state after the chunk; `slots` `[B, K, W + C]` says where each token is stored now, -1 for nowhere."""
        return state

    def due(self, state: State, step: DecodeStep) -> Bool[Array, "B K"]:
        """The heads that must evict before the new token is stored."""
        raise NotImplementedError(f"policy {self.name!r} evicts one token at a time")

    def prune(self, state: State, step: DecodeStep, stored: Stored) -> tuple[SlotFlags, State]:
        """Which slots stay, `[B, K, S]`, in heads that are due; of the others it says nothing."""
        raise NotImplementedError(f"policy {self.name!r} evicts one token at a time")

    def move(self, state: State, slots: Slots) -> State:
        """The state after `prune`; `slots` `[B, K, S]` says where each slot's token is stored now, -1 for nowhere."""
        raise NotImplementedError(f"policy {self.name!r} evicts one token at a time")

    def choose_victim(self, state: State, step: DecodeStep, logit: Float[Array, "B K"] | None) -> tuple[PerHead, State]:
        """The slot that the new token overwrites, -1 for a fresh one; `logit` only where `needs_current_logit`."""
        return jnp.full_like(step.live, -1), state

    def select_pages(
        self, state: State, step: DecodeStep, q: Float[Array, "B H D"]
    ) -> tuple[Bool[Array, "B K P"], PerHead]:
        """The pages to read, and how many KV tokens' worth that costs each head."""
        raise NotImplementedError(f"policy {self.name!r} reads all pages")

    def update(self, state: State, step: DecodeStep, new: NewToken) -> State:
        """The state after the step."""
        return state
