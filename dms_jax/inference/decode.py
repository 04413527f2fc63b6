"""Decoding as pure functions of one pytree: prefill, one step, a chunk of steps.

Everything that decoding changes is `DecodeState`, passed in and returned. Its B rows are independent sequences; a
row that is done idles and holds nothing that matters, so that another sequence can take its place.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dms_jax import dms, kernels, sharding
from dms_jax.cache import Storage
from dms_jax.config import SamplingConfig
from dms_jax.dms import hard_log_keep_prob
from dms_jax.inference import sampling
from dms_jax.kernels import attention
from dms_jax.models.transformer import Decoder
from dms_jax.policies import Policy
from dms_jax.policies.base import DecodeStep, NewToken, PrefillChunk, positions
from dms_jax.types import Counts, Keys, NextLogits, Params, Tokens

FEW_ROWS = 64  # see compiled_chunk and docs/speed.md


class DecodeSpec(NamedTuple):
    """What is fixed while decoding; hashable, so jit compiles once for each."""

    model: Decoder
    policy: Policy
    storage: Storage
    sampling: SamplingConfig
    stop: tuple[int, ...]  # token ids that end a sequence


class DecodeState(NamedTuple):
    """What decoding changes."""

    cache: Any
    policy: Any  # the policy's state; every array in it begins with the axes [B, L]
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


def init(spec: DecodeSpec, batch: int, dtype, pages: int = 0) -> DecodeState:
    """A state of `batch` empty rows, all done; paged storage gets a pool of `pages` pages."""
    c = spec.model.config
    token, position, last = (jnp.zeros(batch, jnp.int32) for _ in range(3))  # three buffers: all are donated
    return DecodeState(
        cache=spec.storage.init(c, batch, dtype, pages),
        policy=_join([spec.policy.init(batch, c.num_kv_heads, spec.storage.slots)] * c.num_layers),
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


def _layers(policy_state, layers: int | slice):
    """The policy's state of one layer, or of several."""
    return jax.tree.map(lambda x: x[:, layers], policy_state)


def _join(states, together=jnp.stack):
    """The policy's states of all layers as one: each of one layer, or with jnp.concatenate of several."""
    return jax.tree.map(lambda *xs: together(xs, axis=1), *states)


@functools.partial(jax.jit, static_argnames=("spec", "width"), donate_argnames=("state",))
def prefill(
    spec: DecodeSpec,
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
    storage, policy = spec.storage, spec.policy
    A, C = tokens.shape
    before, start = _rows((state.policy, state.position), rows)
    query_pos = start[:, None] + jnp.arange(C, dtype=jnp.int32)
    token_pos = jnp.where(jnp.arange(C) < count[:, None], query_pos, -1)

    def attend(layer, q, k, v, logit, carried):
        store, states, seen = carried
        old, own = storage.view(store, layer, width), _layers(before, layer)
        span = PrefillChunk(start, count, old.pos, k, logit, keys)
        alpha = policy.mark(own, span)
        all_k, all_v = (
            jnp.concatenate([x.swapaxes(1, 2).astype(new.dtype), new], axis=1) for x, new in ((old.k, k), (old.v, v))
        )
        pos = positions(span)
        flash = functools.partial(kernels.flash_attention, window=policy.window, hard=True)
        letters = ("B T H D", "B S K D", "B S K D", "B T", "B K S", "B K S")
        out = sharding.by_heads(flash, letters)(q, all_k, all_v, query_pos, pos, hard_log_keep_prob(alpha))
        weights = None
        if policy.weights is not None:
            index = jnp.arange(C)
            counted = index < count[:, None] if policy.weights == "sum" else index == count[:, None] - 1
            weights = attention.key_weights(q, all_k, query_pos, pos, counted.astype(jnp.float32))
        stay, carry = policy.retain(own, span, alpha, weights)
        moving = old if policy.budget is not None else None  # only a budget makes a cache shrink
        store, slots = storage.extend(store, layer, k, v, token_pos, stay, moving)
        own = policy.settle(own, span, carry, slots)
        seen += dms.live_counts(pos, alpha, start, C, policy.window).sum(axis=1)
        return out, (store, (*states, own), seen)

    begin = (storage.take(state.cache, rows), (), jnp.zeros((A, C), jnp.int32))
    hidden, (store, states, seen) = spec.model.apply({"params": params}, tokens, query_pos, attend, begin)
    hidden = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
    logits = spec.model.apply({"params": params}, hidden, method="unembed")[:, 0]
    position = start + count
    token = sampling.sample(logits, keys, position, spec.sampling)
    last = position + max_new - 1
    done = _stopped(token, position, last, spec.stop)
    rows = jnp.where(count > 0, rows, len(state.done))
    new = _put_rows(tuple(state[1:]), rows, (_join(states), token, position, last, done, keys))
    return DecodeState(storage.put(state.cache, rows, store), *new), logits, seen


def decode_step(spec: DecodeSpec, params: Params, state: DecodeState) -> tuple[DecodeState, NextLogits, Chunk]:
    """Feeds `state.token` to the model and draws the next one.

    Sequences that are done, and those for which the storage has no room, stay as they are. Returns the new state,
    the logits `[B, V]` and the Chunk of this one step, without its axis N.
    """
    model, policy, storage = spec.model, spec.policy, spec.storage
    position, active = state.position, storage.admit(state.cache, ~state.done)
    step = DecodeStep(position, active, storage.live(state.cache), state.keys)
    mapped = DecodeStep(None, None, 0, None)  # the axis of layers; that of a policy's state is 1
    at_once = 1 if policy.late else model.config.num_layers  # layers in which room is made together

    def make_room(cache, layer, logit):
        layers = slice(layer, layer + at_once)
        now = step._replace(live=step.live[layers])
        victim, own = jax.vmap(policy.choose, (1, mapped, 0), (0, 1))(_layers(state.policy, layers), now, logit)
        return *storage.place(cache, layer, position, victim, active), own

    def attend(layer, q, k, v, logit, carried):
        cache, slots, owns, new, reads = carried  # slots and owns[-1]: of the layers that room was made for last
        q, k, v = q[:, 0], k[:, 0], v[:, 0]
        logit = None if logit is None else logit[..., 0]
        if layer % at_once == 0:
            cache, slots, own = make_room(cache, layer, logit[None] if policy.late else None)
            owns = (*owns, own)
        readable = None
        if policy.select is not None:
            now = step._replace(live=step.live[layer])
            readable, read = policy.select(_layers(owns[-1], layer % at_once), now, q)
            reads = (*reads, read)
        cache, out, weights = storage.attend(cache, layer, q, k, v, slots, readable, policy.weights is not None)
        newcomer = NewToken(slots[layer % at_once], k, logit, weights)
        return out[:, None], (cache, slots, owns, (*new, newcomer), reads)

    given = {"params": params}, state.token[:, None], position[:, None], attend, (state.cache, None, (), (), ())
    # All layers' eviction logits at once where none is asked for before the layers are through.
    together = model.gate is not None and model.gate.reads_residual and not policy.late
    if together:
        hidden, carried, residuals = Decoder(model.config).apply(*given, method="with_residuals")
    else:
        hidden, carried = model.apply(*given)
    cache, _, owns, new, reads = carried
    new = jax.tree.map(lambda *xs: jnp.stack(xs), *new)
    if together:
        new = new._replace(logit=model.gate.logits_from_residuals(params, residuals, model.config)[..., 0])
    own = jax.vmap(policy.record, (1, mapped, 0), 1)(_join(owns, jnp.concatenate), step, new)
    logits = model.apply({"params": params}, hidden, method="unembed")[:, 0]
    live = jnp.moveaxis(storage.live(cache), 0, 1)
    token = jnp.where(active, sampling.sample(logits, state.keys, position + 1, spec.sampling), state.token)
    position = position + active
    done = state.done | active & _stopped(token, position, state.last, spec.stop)
    state = DecodeState(cache, own, token, position, state.last, done, state.keys)
    return state, logits, Chunk(token, active, live, jnp.stack(reads, axis=1) if reads else None)


def decode_chunk(
    spec: DecodeSpec, params: Params, state: DecodeState, steps: int, batch: int | None = None
) -> tuple[DecodeState, Chunk]:
    """`steps` decode steps in one `lax.scan`; layers are unrolled inside, the cache is a donated carry.

    batch: only the first so many rows are decoded; the others keep what they hold (a prompt that waits, say).
    """
    if isinstance(state.done, jax.core.Tracer):  # inside another jit, whose options hold
        return _chunk(spec, params, state, steps, batch)
    return compiled_chunk((batch or len(state.done)) <= FEW_ROWS)(spec, params, state, steps, batch)


@functools.cache
def compiled_chunk(few: bool):
    """The jitted `decode_chunk` for few rows or for many.

    On a GPU XLA may make one product of several that share an operand, reading their kernels as if they were one. For
    few rows q, k and v, and gate and up, are to be joined so, up to 256 MB; for many, nothing: it would keep XLA from
    the libraries' faster products. This goes before what XLA_FLAGS says of that threshold.
    """
    options = {"xla_gpu_dot_merger_threshold_mb": 256 if few else 0} if jax.default_backend() == "gpu" else None
    return jax.jit(
        _chunk, static_argnames=("spec", "steps", "batch"), donate_argnames=("state",), compiler_options=options
    )


def _chunk(spec: DecodeSpec, params: Params, state: DecodeState, steps: int, batch: int | None):
    def body(state, _):
        state, _, made = decode_step(spec, params, state)
        return state, made

    if batch is None or batch == len(state.done):
        return jax.lax.scan(body, state, None, length=steps)
    rows = jnp.arange(batch)
    part = DecodeState(spec.storage.take(state.cache, rows), *jax.tree.map(lambda x: x[:batch], tuple(state[1:])))
    part, made = jax.lax.scan(body, part, None, length=steps)
    rest = jax.tree.map(lambda x, y: x.at[:batch].set(y), tuple(state[1:]), tuple(part[1:]))
    return DecodeState(spec.storage.put(state.cache, rows, part.cache), *rest), made


@functools.partial(jax.jit, static_argnames=("spec", "width"), donate_argnames=("state",))
def fork(
    spec: DecodeSpec,
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
    cache = spec.storage.fork(state.cache, source, target, moved, width)
    own, position, last = _rows((state.policy, state.position, state.last), source)
    token = sampling.sample(logits, keys, position, spec.sampling)
    done = _stopped(token, position, last, spec.stop)
    new = _put_rows(tuple(state[1:]), target, (own, token, position, last, done, keys))
    return DecodeState(cache, *new)


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("state",))
def release(spec: DecodeSpec, state: DecodeState, rows: Bool[Array, "B"]) -> DecodeState:
    """Empties the rows marked; their pages go back to the pool."""
    return state._replace(
        cache=spec.storage.release(state.cache, rows),
        position=jnp.where(rows, 0, state.position),
        done=state.done | rows,
    )


@functools.partial(jax.jit, static_argnames=("spec",))
def live_tokens(spec: DecodeSpec, state: DecodeState) -> Int[Array, "B L K"]:
    """Live tokens of every row, layer and head."""
    return jnp.moveaxis(spec.storage.live(state.cache), 0, 1)


@functools.partial(jax.jit, static_argnames=("spec",))
def stored_positions(spec: DecodeSpec, state: DecodeState, row: Int[Array, ""]) -> Int[Array, "L K S"]:
    """The position in every slot of one row, -1 for none."""
    part = spec.storage.take(state.cache, row[None])
    layers = range(spec.model.config.num_layers)
    return jnp.stack([spec.storage.view(part, n, spec.storage.slots).pos[0] for n in layers])
