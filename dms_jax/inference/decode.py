"""Decoding as pure functions of one pytree: prefill, one step, a chunk of steps.

Everything that decoding changes is `DecodeState`, passed in and returned. Its B rows are independent sequences; a
row that is done idles and holds nothing that matters, so that another sequence can take its place.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from dms_jax.cache import DecodeQuery, KVCache
from dms_jax.config import SamplingConfig
from dms_jax.inference import eviction, sampling
from dms_jax.inference.eviction import LAYER_AXES, joined, layers_of, over_layers, step_of
from dms_jax.inference.prefill import PrefillAttend, PromptChunk
from dms_jax.models.transformer import Decoder
from dms_jax.policies import DecodeStep, NewToken, Policy
from dms_jax.types import Counts, Keys, NextLogits, Params

FEW_ROWS = 64  # see compiled_chunk and docs/speed.md


@dataclass(frozen=True)
class DecodeSpec:
    """What is fixed while decoding; hashable, so jit compiles once for each.

    model: a Decoder, or what has its `config`, `gate` and `apply`.
    stop: token ids that end a sequence.
    """

    model: Any
    policy: Policy
    kv_cache: KVCache
    sampling: SamplingConfig = SamplingConfig()
    stop: tuple[int, ...] = ()


class DecodeState(NamedTuple):
    """What decoding changes."""

    cache: Any
    policy: Any  # the policy's state; every array in it begins with the axes [B, L]
    token: Counts  # the newest token, not yet in the cache
    position: Counts  # its position: how many tokens the sequence has in the past
    last: Counts  # the position at which a sequence has all the tokens it may have
    done: Bool[Array, "B"]
    keys: Keys


class Taken(NamedTuple):
    """What one decode step did. Of a sequence that took no step, `active` False, the rest says nothing."""

    token: Counts
    active: Bool[Array, "B"]
    live: Int[Array, "B L K"]  # live tokens after the step
    reads: Int[Array, "B L K"]  # KV tokens that attention read, and an eviction that weighs what is stored


class Chunk(NamedTuple):
    """What N decode steps did; `active[n, b]` says whether sequence b took step n."""

    tokens: Int[Array, "N B"]
    active: Bool[Array, "N B"]
    held: Int[Array, "N B"]  # live tokens after each step, summed over layers and heads
    reads: Int[Array, "N B"]  # KV tokens that attention read, summed likewise
    reads_by_head: Int[Array, "B L K"]  # summed over the steps taken
    live: Int[Array, "B L K"]  # after the last step
    done: Bool[Array, "B"]


def init(spec: DecodeSpec, batch: int, dtype, pages: int = 0) -> DecodeState:
    """A state of `batch` empty rows, all done; a paged cache gets a pool of `pages` pages."""
    c = spec.model.config
    token, position, last = (jnp.zeros(batch, jnp.int32) for _ in range(3))  # three buffers: all are donated
    own = spec.policy.init_state(batch, c.num_kv_heads, spec.kv_cache.slots, c.head_dim)
    return DecodeState(
        cache=spec.kv_cache.allocate(c, batch, dtype, pages),
        policy=joined([own] * c.num_layers),
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


# ---- Prefill


@functools.partial(jax.jit, static_argnames=("spec", "width"), donate_argnames=("state",))
def prefill(
    spec: DecodeSpec, params: Params, state: DecodeState, chunk: PromptChunk, width: int
) -> tuple[DecodeState, NextLogits, Int[Array, "A C"]]:
    """Reads a chunk of prompt tokens into some rows, under the policy's mask, and draws the next token of each.

    The rows may hold earlier tokens (an earlier chunk, an earlier turn); only what the policy keeps is stored. A
    prompt longer than a chunk is read by several calls, of which the last one's draw counts.

    Args:
      width: static; no row may hold more live tokens a head than this. 0: all rows are empty.
    Returns:
      the state; the logits `[A, V]` of the next token; for each token the number of keys it attended to, summed over
      layers and heads, `[A, C]`.
    """
    rows, count = chunk.rows, chunk.count
    before, start = _rows((state.policy, state.position), rows)
    cache = spec.kv_cache.take_rows(state.cache, rows)
    attend = PrefillAttend(spec.policy, spec.kv_cache, chunk, cache, before, start, width)
    begin = (), jnp.zeros(chunk.tokens.shape, jnp.int32)
    hidden, (made, seen) = spec.model.apply({"params": params}, chunk.tokens, attend.query_pos, attend, begin)
    hidden = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
    logits = spec.model.apply({"params": params}, hidden, method="unembed")[:, 0]
    position = start + count
    token = sampling.sample(logits, chunk.keys, position, spec.sampling)
    # What is stored depends on the tokens drawn, which are never negative: all layers have read the cache by then, so
    # that XLA keeps no copy of it for the last one.
    attend = replace(attend, chunk=chunk._replace(count=jnp.where(token >= 0, count, 0)))
    store = functools.partial(attend.store, jax.tree.map(lambda *xs: jnp.stack(xs), *made))
    cache, own = over_layers(spec.kv_cache, store, cache, len(made))
    last = position + chunk.max_new - 1
    done = _stopped(token, position, last, spec.stop)
    rows = jnp.where(count > 0, rows, len(state.done))
    new = _put_rows(tuple(state[1:]), rows, (own, token, position, last, done, chunk.keys))
    return DecodeState(spec.kv_cache.put_rows(state.cache, rows, cache), *new), logits, seen


# ---- Steps


class _Carried(NamedTuple):
    """What a decode step threads through the layers."""

    cache: Any
    slots: Any  # of the layers in which victims were chosen last, `[M, B, K]`
    states: tuple  # the policy's states, a piece for each such choice
    new: tuple[NewToken, ...]
    reads: tuple


@dataclass(frozen=True, eq=False)
class DecodeAttend:
    """An `Attend` for one new token a sequence.

    Victims are chosen for all layers together, except where a policy needs each layer's current logit for it.
    """

    spec: DecodeSpec
    step: DecodeStep  # of all layers: `layer` [L], `live` [L, B, K]
    before: Any  # the policy's state of all layers

    @property
    def layers_at_once(self) -> int:
        return 1 if self.spec.policy.needs_current_logit else self.spec.model.config.num_layers

    def __call__(self, layer, q, k, v, logit, carried: _Carried):
        policy, index = self.spec.policy, layer % self.layers_at_once
        q, k, v, logit = q[:, 0], k[:, 0], v[:, 0], None if logit is None else logit[..., 0]
        if index == 0:
            carried = self._append(layer, logit, carried)
        readable, reads = None, carried.reads
        if policy.selects_pages:
            own = layers_of(carried.states[-1], index)
            readable, read = policy.select_pages(own, step_of(self.step, layer), q)
            reads = (*reads, read)
        query = DecodeQuery(q, k, v, carried.slots, readable)
        observes = policy.attention_from is not None
        cache, out, weights = self.spec.kv_cache.attend(carried.cache, layer, query, observes)
        new = (*carried.new, NewToken(carried.slots[index], k, v, logit, weights))
        return out[:, None], carried._replace(cache=cache, new=new, reads=reads)

    def _append(self, layer: int, logit, carried: _Carried) -> _Carried:
        """Chooses victims and appends the new token, in `layers_at_once` layers."""
        policy, layers = self.spec.policy, slice(layer, layer + self.layers_at_once)
        logit = logit[None] if policy.needs_current_logit else None
        choose = jax.vmap(policy.choose_victim, (1, LAYER_AXES, 0), (0, 1))
        victim, own = choose(layers_of(self.before, layers), step_of(self.step, layers), logit)
        step = self.step
        cache, slots = self.spec.kv_cache.append(carried.cache, layer, step.position, victim, step.active)
        return carried._replace(cache=cache, slots=slots, states=(*carried.states, own))


def decode_step(spec: DecodeSpec, params: Params, state: DecodeState) -> tuple[DecodeState, NextLogits, Taken]:
    """Feeds `state.token` to the model and draws the next one.

    Sequences that are done, and those for which the cache has no room, stay as they are. Returns the new state,
    the logits `[B, V]` and what was done.
    """
    model, policy, kv_cache = spec.model, spec.policy, spec.kv_cache
    position, layers, reread = state.position, jnp.arange(model.config.num_layers), 0
    step = DecodeStep(layers, position, ~state.done, kv_cache.live(state.cache), state.keys)
    if policy.evicts_many:
        latent = model.config.latent is not None
        cache, own, reread = eviction.prune(policy, kv_cache, state.cache, state.policy, step, latent)
        state = state._replace(cache=cache, policy=own)
    active = kv_cache.can_append(state.cache, step.active)
    step = step._replace(active=active, live=kv_cache.live(state.cache))
    given = state.token[:, None], position[:, None], DecodeAttend(spec, step, state.policy)
    hidden, carried, logit = _apply(spec, params, given, _Carried(state.cache, None, (), (), ()))
    new = jax.tree.map(lambda *xs: jnp.stack(xs), *carried.new)
    new = new if logit is None else new._replace(logit=logit)
    own = jax.vmap(policy.update, (1, LAYER_AXES, 0), 1)(joined(carried.states, jnp.concatenate), step, new)
    logits = model.apply({"params": params}, hidden, method="unembed")[:, 0]
    token = jnp.where(active, sampling.sample(logits, state.keys, position + 1, spec.sampling), state.token)
    position = position + active
    done = state.done | active & _stopped(token, position, state.last, spec.stop)
    live = jnp.moveaxis(kv_cache.live(carried.cache), 0, 1)
    reads = (jnp.stack(carried.reads, axis=1) if carried.reads else live) + reread
    state = DecodeState(carried.cache, own, token, position, state.last, done, state.keys)
    return state, logits, Taken(token, active, live, reads)


def _apply(spec: DecodeSpec, params: Params, given, carried: _Carried) -> tuple[Any, ...]:
    """Hidden states, what was carried, and the eviction logits `[L, B, K]` where they are computed for all layers."""
    model, gate = spec.model, spec.model.gate
    if gate is None or not gate.reads_residual or spec.policy.needs_current_logit:
        return *model.apply({"params": params}, *given, carried), None
    ungated = Decoder(model.config)
    *made, residuals = ungated.apply({"params": params}, *given, carried, method="with_residuals")
    return *made, gate.logits_from_residuals(params, residuals, model.config)[..., 0]


def decode_chunk(
    spec: DecodeSpec, params: Params, state: DecodeState, steps: int, batch: int | None = None
) -> tuple[DecodeState, Chunk]:
    """`steps` decode steps in one `lax.scan`; layers are unrolled inside, the cache is a donated carry.

    batch: only the first so many rows are decoded; the others keep what they hold (a prompt that waits, say).
    """
    if isinstance(state.done, Tracer):  # inside another jit, whose options hold
        return _chunk(spec, params, state, steps, batch)
    return chunk_program(state, batch)(spec, params, state, steps, batch)


def chunk_program(state: DecodeState, batch: int | None):
    """What `decode_chunk` calls."""
    return compiled_chunk((batch or len(state.done)) <= FEW_ROWS)


@functools.cache
def compiled_chunk(few: bool):
    """The jitted `decode_chunk` for few rows or for many.

    On a GPU XLA may make one product of several that share an operand, reading their kernels as if they were one. For
    few rows q, k and v, and gate and up, are to be joined so, up to 256 MB; for many only what is below 32 MB, as q, k
    and v may be: joining keeps XLA from the libraries' products, which are faster for larger ones. Nor is a product
    with a single row to become a sum of products, which takes several kernels. These go before what XLA_FLAGS says.
    """
    joined_mb = 256 if few else 32
    options = {"xla_gpu_dot_merger_threshold_mb": joined_mb, "xla_disable_hlo_passes": "dot-strength-reduction"}
    options = options if jax.default_backend() == "gpu" else None
    return jax.jit(
        _chunk, static_argnames=("spec", "steps", "batch"), donate_argnames=("state",), compiler_options=options
    )


def _chunk(spec: DecodeSpec, params: Params, state: DecodeState, steps: int, batch: int | None):
    if batch is None or batch == len(state.done):
        return _scan(spec, params, state, steps)
    rows, kv_cache = jnp.arange(batch), spec.kv_cache
    part = DecodeState(kv_cache.take_rows(state.cache, rows), *jax.tree.map(lambda x: x[:batch], tuple(state[1:])))
    part, made = _scan(spec, params, part, steps)
    rest = jax.tree.map(lambda x, y: x.at[:batch].set(y), tuple(state[1:]), tuple(part[1:]))
    return DecodeState(kv_cache.put_rows(state.cache, rows, part.cache), *rest), made


def _scan(spec: DecodeSpec, params: Params, state: DecodeState, steps: int) -> tuple[DecodeState, Chunk]:
    def body(carried, _):
        state, by_head = carried
        state, _, taken = decode_step(spec, params, state)
        by_head += jnp.where(taken.active[:, None, None], taken.reads, 0)
        summed = (x.sum(axis=(1, 2)) for x in (taken.live, taken.reads))
        return (state, by_head), (taken.token, taken.active, *summed)

    live = live_tokens(spec, state)
    (state, by_head), made = jax.lax.scan(body, (state, jnp.zeros_like(live)), None, length=steps)
    return state, Chunk(*made, by_head, live_tokens(spec, state), state.done)


# ---- Rows


class Copies(NamedTuple):
    """Prefilled rows `source` `[A]` to copy into empty rows `target` `[A]`, each with a random key of its own.

    prompt: which of the logits is that of the next token. A row that is `moved` gives its pages away and is to be
    released next. A target beyond the batch is padding.
    """

    source: Counts
    target: Counts
    prompt: Counts
    moved: Bool[Array, "A"]
    keys: Keys


class Started(NamedTuple):
    """Rows that were copied: the first token of each, and whether it ends the chain."""

    token: Counts
    done: Bool[Array, "A"]


@functools.partial(jax.jit, static_argnames=("spec", "width"), donate_argnames=("state",))
def fork(
    spec: DecodeSpec, state: DecodeState, logits: NextLogits, copies: Copies, width: int
) -> tuple[DecodeState, Started]:
    """The state with rows copied, of which each draws its first token for itself from its prompt's logits `[P, V]`.

    width: as for `prefill`.
    """
    source, target, prompt, moved, keys = copies
    cache = spec.kv_cache.fork(state.cache, source, target, moved, width)
    own, position, last = _rows((state.policy, state.position, state.last), source)
    token = sampling.sample(logits[prompt], keys, position, spec.sampling)
    done = _stopped(token, position, last, spec.stop)
    new = _put_rows(tuple(state[1:]), target, (own, token, position, last, done, keys))
    return DecodeState(cache, *new), Started(token, done)


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("state",))
def release(spec: DecodeSpec, state: DecodeState, rows: Bool[Array, "B"]) -> DecodeState:
    """Empties the rows marked; their pages go back to the pool."""
    return state._replace(
        cache=spec.kv_cache.free(state.cache, rows),
        position=jnp.where(rows, 0, state.position),
        done=state.done | rows,
    )


@functools.partial(jax.jit, static_argnames=("spec",))
def live_tokens(spec: DecodeSpec, state: DecodeState) -> Int[Array, "B L K"]:
    """Live tokens of every row, layer and head."""
    return jnp.moveaxis(spec.kv_cache.live(state.cache), 0, 1)


@functools.partial(jax.jit, static_argnames=("spec",))
def stored_positions(spec: DecodeSpec, state: DecodeState, row: Int[Array, ""]) -> Int[Array, "L K S"]:
    """The position in every slot of one row, -1 for none."""
    part, kv_cache = spec.kv_cache.take_rows(state.cache, row[None]), spec.kv_cache
    layers = range(spec.model.config.num_layers)
    return jnp.stack([kv_cache.view(part, n, kv_cache.slots).pos[0] for n in layers])
