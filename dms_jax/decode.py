"""Level 4. Decoding as pure functions of one pytree: prefill, one step, a chunk of steps.

Everything that decoding changes is `DecodeState`, passed in and returned. Its B rows are independent sequences; a
row that is done idles and holds nothing that matters, so that another sequence can take its place.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dms_jax import attention, kernels, masks, sampling
from dms_jax.cache import Storage
from dms_jax.config import SamplingConfig
from dms_jax.dms import hard_keep_log
from dms_jax.policies import Policy
from dms_jax.policies.base import Span, Step, positions
from dms_jax.transformer import Decoder
from dms_jax.types import Counts, Keys, NextLogits, Params, Tokens


class Setup(NamedTuple):
    """What is fixed while decoding; hashable, so jit compiles once for each."""

    model: Decoder
    policy: Policy
    storage: Storage
    sampling: SamplingConfig
    stop: tuple[int, ...]  # token ids that end a sequence


class DecodeState(NamedTuple):
    """What decoding changes."""

    cache: Any
    policy: tuple[Any, ...]  # the policy's state for each layer
    token: Counts  # the newest token, not yet in the cache
    position: Counts  # its position: how many tokens the sequence has in the past
    last: Counts  # the position at which a sequence has all the tokens it may have
    done: Bool[Array, "B"]
    keys: Keys


class Chunk(NamedTuple):
    """What a chunk of N steps produced; `active[n, b]` says whether sequence b took step n."""

    tokens: Int[Array, "N B"]
    active: Bool[Array, "N B"]
    live: Int[Array, "N B L K"]  # live tokens after the step
    reads: Int[Array, "N B L K"] | None  # tokens read in the step, where that is not all that live


def init(setup: Setup, batch: int, dtype, pages: int = 0) -> DecodeState:
    """A state of `batch` empty rows, all done; paged storage gets a pool of `pages` pages."""
    c = setup.model.config
    token, position, last = (jnp.zeros(batch, jnp.int32) for _ in range(3))  # three buffers: all are donated
    return DecodeState(
        cache=setup.storage.init(c, batch, dtype, pages),
        policy=tuple(setup.policy.init(batch, c.num_kv_heads, setup.storage.slots) for _ in range(c.num_layers)),
        token=token,
        position=position,
        last=last,
        done=jnp.ones(batch, bool),
        keys=jnp.zeros((batch, 2), jnp.uint32),
    )


def _stopped(token, position, last, stop: tuple[int, ...]):
    ended = jnp.isin(token, jnp.asarray(stop, jnp.int32)) if stop else jnp.zeros_like(token, bool)
    return ended | (position >= last)


def _rows(tree, rows):
    return jax.tree.map(lambda x: x.at[rows].get(mode="fill", fill_value=0), tree)


def _put_rows(tree, rows, part):
    return jax.tree.map(lambda x, y: x.at[rows].set(y.astype(x.dtype), mode="drop"), tree, part)


@functools.partial(jax.jit, static_argnames=("setup", "width"), donate_argnames=("state",))
def prefill(
    setup: Setup,
    params: Params,
    state: DecodeState,
    rows: Counts,
    tokens: Tokens,
    count: Counts,
    max_new: Counts,
    keys: Keys,
    width: int,
) -> tuple[DecodeState, NextLogits, Int[Array, "B T"]]:
    """Reads a chunk of prompt tokens into some rows, under the policy's mask, and draws the next token of each.

    The rows may hold earlier tokens (an earlier chunk, an earlier turn); only survivors are stored. A prompt longer
    than a chunk is read by several calls, of which the last one's draw counts.

    Args:
      rows: `[A]`, distinct; a row beyond the batch is padding. tokens: `[A, C]`, right-padded; count: `[A]` of them
        that are real; 0 leaves a row as it is. max_new: `[A]`, at least 1. keys: `[A, 2]`.
      width: static; no row may hold more live tokens a head than this. 0: all rows are empty.
    Returns:
      the state; the logits `[A, V]` of the next token; for each token the number of keys it saw, summed over layers
      and heads, `[A, C]`.
    """
    storage, policy = setup.storage, setup.policy
    A, C = tokens.shape
    start = _rows(state.position, rows)
    query_pos = start[:, None] + jnp.arange(C, dtype=jnp.int32)
    token_pos = jnp.where(jnp.arange(C) < count[:, None], query_pos, -1)

    def attend(layer, q, k, v, logit, carried):
        store, states, seen = carried
        old = storage.view(store, layer, width)
        span = Span(start, count, old.pos, k, logit, keys)
        alpha = policy.mark(states[layer], span)
        all_k, all_v = (
            jnp.concatenate([x.swapaxes(1, 2).astype(new.dtype), new], axis=1) for x, new in ((old.k, k), (old.v, v))
        )
        pos = positions(span)
        out = kernels.flash_attention(q, all_k, all_v, query_pos, pos, hard_keep_log(alpha), policy.window, hard=True)
        weights = None
        if policy.weights is not None:
            index = jnp.arange(C)
            counted = index < count[:, None] if policy.weights == "sum" else index == count[:, None] - 1
            weights = attention.key_weights(q, all_k, query_pos, pos, counted.astype(jnp.float32))
        stay, carry = policy.retain(states[layer], span, alpha, weights)
        moving = old if policy.budget is not None else None  # only a budget makes a cache shrink
        store, slots = storage.extend(store, layer, k, v, token_pos, stay, moving)
        own = policy.settle(states[layer], span, carry, slots)
        seen += masks.live_counts(pos, alpha, start, C, policy.window).sum(axis=1)
        return out, (store, (*states[:layer], own, *states[layer + 1 :]), seen)

    begin = (storage.take(state.cache, rows), _rows(state.policy, rows), jnp.zeros((A, C), jnp.int32))
    hidden, (store, states, seen) = setup.model.apply({"params": params}, tokens, query_pos, attend, begin)
    hidden = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
    logits = setup.model.apply({"params": params}, hidden, method="unembed")[:, 0]
    position = start + count
    token = sampling.sample(logits, keys, position, setup.sampling)
    last = position + max_new - 1
    done = _stopped(token, position, last, setup.stop)
    rows = jnp.where(count > 0, rows, len(state.done))
    new = _put_rows(
        (state.policy, state.token, state.position, state.last, state.done, state.keys),
        rows,
        (states, token, position, last, done, keys),
    )
    return DecodeState(storage.put(state.cache, rows, store), *new), logits, seen


def decode_step(setup: Setup, params: Params, state: DecodeState) -> tuple[DecodeState, NextLogits, Chunk]:
    """Feeds `state.token` to the model and draws the next one.

    Sequences that are done, and those for which the storage has no room, stay as they are. Returns the new state,
    the logits `[B, V]` and the Chunk of this one step, without its axis N.
    """
    policy, storage = setup.policy, setup.storage
    position, active = state.position, storage.admit(state.cache, ~state.done)

    def attend(layer, q, k, v, logit, carried):
        store, states, reads = carried
        last_logit = None if logit is None else logit[..., 0]
        step = Step(position, active, storage.live(store, layer), k[:, 0], last_logit, state.keys)
        victim, own = policy.choose(states[layer], step)
        store, slot = storage.place(store, layer, k[:, 0], v[:, 0], position, victim, active)
        readable = None
        if policy.select is not None:
            readable, read = policy.select(own, step, q[:, 0])
            reads = (*reads, read)
        out, weights = storage.attend(store, layer, q[:, 0], readable, policy.weights is not None)
        own = policy.record(own, step, slot, weights)
        return out[:, None], (store, (*states[:layer], own, *states[layer + 1 :]), reads)

    hidden, (store, states, reads) = setup.model.apply(
        {"params": params}, state.token[:, None], position[:, None], attend, (state.cache, state.policy, ())
    )
    logits = setup.model.apply({"params": params}, hidden, method="unembed")[:, 0]
    live = jnp.stack([storage.live(store, n) for n in range(setup.model.config.num_layers)], axis=1)
    token = jnp.where(active, sampling.sample(logits, state.keys, position + 1, setup.sampling), state.token)
    position = position + active
    done = state.done | active & _stopped(token, position, state.last, setup.stop)
    new = DecodeState(store, states, token, position, state.last, done, state.keys)
    return new, logits, Chunk(token, active, live, jnp.stack(reads, axis=1) if reads else None)


@functools.partial(jax.jit, static_argnames=("setup", "steps", "batch"), donate_argnames=("state",))
def decode_chunk(
    setup: Setup, params: Params, state: DecodeState, steps: int, batch: int | None = None
) -> tuple[DecodeState, Chunk]:
    """`steps` decode steps in one `lax.scan`; layers are unrolled inside, the cache is a donated carry.

    batch: only the first so many rows are decoded; the others keep what they hold (a prompt that waits, say).
    """

    def body(state, _):
        state, _, made = decode_step(setup, params, state)
        return state, made

    if batch is None or batch == len(state.done):
        return jax.lax.scan(body, state, None, length=steps)
    rows = jnp.arange(batch)
    part = state._replace(cache=setup.storage.take(state.cache, rows))
    part = DecodeState(part.cache, *jax.tree.map(lambda x: x[:batch], tuple(part[1:])))
    part, made = jax.lax.scan(body, part, None, length=steps)
    rest = jax.tree.map(lambda x, y: x.at[:batch].set(y), tuple(state[1:]), tuple(part[1:]))
    return DecodeState(setup.storage.put(state.cache, rows, part.cache), *rest), made


@functools.partial(jax.jit, static_argnames=("setup", "width"), donate_argnames=("state",))
def fork(
    setup: Setup,
    state: DecodeState,
    logits: NextLogits,
    source: Counts,
    target: Counts,
    moved: Bool[Array, "A"],
    keys: Keys,
    width: int,
) -> DecodeState:
    """Copies prefilled rows `source` `[A]` into empty rows `target` `[A]`, each with a random key of its own.

    A row that is `moved` hands over what it holds and is to be released next. logits `[A, V]`: those of the prompt's
    next token, which every copy draws for itself. A target beyond the batch is padding. width: as for `prefill`.
    """
    cache = setup.storage.fork(state.cache, source, target, moved, width)
    own, position, last = _rows((state.policy, state.position, state.last), source)
    token = sampling.sample(logits, keys, position, setup.sampling)
    done = _stopped(token, position, last, setup.stop)
    new = _put_rows(
        (state.policy, state.token, state.position, state.last, state.done, state.keys),
        target,
        (own, token, position, last, done, keys),
    )
    return DecodeState(cache, *new)


@functools.partial(jax.jit, static_argnames=("setup",), donate_argnames=("state",))
def release(setup: Setup, state: DecodeState, rows: Bool[Array, "B"]) -> DecodeState:
    """Empties the rows marked; their pages go back to the pool."""
    return state._replace(
        cache=setup.storage.release(state.cache, rows),
        position=jnp.where(rows, 0, state.position),
        done=state.done | rows,
    )


@functools.partial(jax.jit, static_argnames=("setup",))
def live_tokens(setup: Setup, state: DecodeState) -> Int[Array, "B L K"]:
    """Live tokens of every row, layer and head."""
    layers = range(setup.model.config.num_layers)
    return jnp.stack([setup.storage.live(state.cache, n) for n in layers], axis=1)


@functools.partial(jax.jit, static_argnames=("setup",))
def stored_positions(setup: Setup, state: DecodeState, row: Int[Array, ""]) -> Int[Array, "L K S"]:
    """The position in every slot of one row, -1 for none."""
    part = setup.storage.take(state.cache, row[None])
    layers = range(setup.model.config.num_layers)
    return jnp.stack([setup.storage.view(part, n, setup.storage.slots).pos[0] for n in layers])
