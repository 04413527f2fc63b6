"""Level 4. Prefill, one decode step, a chunk of steps, and `generate`.

Everything that the loop changes is one pytree, `DecodeState`, passed in and returned.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dms_jax import attention, masks, metrics, policies, sampling
from dms_jax.cache import Storage, storage
from dms_jax.config import CacheConfig, DMSConfig, SamplingConfig, require
from dms_jax.dms import hard_keep_log
from dms_jax.policies import Policy
from dms_jax.transformer import Decoder, arange_positions
from dms_jax.types import Keys, Lengths, NextLogits, Params, Tokens

BUCKET = 64  # prompt lengths and capacities are rounded up to this, so that few shapes are compiled
CHUNK = 64  # decode steps between two looks from the host


class Setup(NamedTuple):
    """What is fixed while decoding; hashable, so jit compiles once for each."""

    model: Decoder
    policy: Policy
    storage: Storage
    sampling: SamplingConfig
    stop: tuple[int, ...]  # token ids that end a sequence


class DecodeState(NamedTuple):
    """What a decode step changes."""

    cache: Any
    policy: tuple[Any, ...]  # the policy's state for each layer
    token: Int[Array, "B"]  # the newest token, not yet in the cache
    position: Int[Array, "B"]  # its position
    last: Int[Array, "B"]  # the position at which a sequence has all the tokens it may have
    done: Bool[Array, "B"]
    keys: Keys


class Chunk(NamedTuple):
    """What a chunk of N steps produced; `active[n, b]` says whether sequence b took step n."""

    tokens: Int[Array, "N B"]
    active: Bool[Array, "N B"]
    live: Int[Array, "N B L K"]  # live tokens after the step


def _stopped(token, position, last, stop: tuple[int, ...]):
    ended = jnp.isin(token, jnp.asarray(stop, jnp.int32)) if stop else jnp.zeros_like(token, bool)
    return ended | (position >= last)


@functools.partial(jax.jit, static_argnames=("setup", "capacity"))
def prefill(
    setup: Setup,
    params: Params,
    tokens: Tokens,
    lengths: Lengths,
    max_new: Int[Array, "B"],
    keys: Keys,
    capacity: int,
) -> tuple[DecodeState, NextLogits, Int[Array, "T B"]]:
    """Runs right-padded prompts under the policy's mask, stores the survivors and draws the first new token.

    Args:
      tokens: `[B, T]`; lengths: `[B]`, at least 1; max_new: `[B]`, at least 1; capacity: slots a head.
    Returns:
      the state before the first decode step, the logits of the first new token, and for each prompt token the
      number of keys it saw, summed over layers and heads (`[T, B]`).
    """
    config, policy = setup.model.config, setup.policy
    B, T = tokens.shape
    positions = arange_positions(tokens)
    real = positions < lengths[:, None]
    past_window = lengths[:, None] - 1 - positions > policy.window

    def attend(layer, q, k, v, logit, state):
        store, states, seen = state
        alpha = policy.mark(k, logit, lengths)
        out = attention.blockwise(q, k, v, positions, positions, hard_keep_log(alpha), policy.window)
        survives = real[:, None] & ~(alpha & past_window[:, None])
        store, slots = setup.storage.fill(store, layer, k, v, survives)
        states += (policy.settle(alpha, slots, lengths),)
        return out, (store, states, seen + masks.live_counts(alpha, policy.window).sum(axis=1))

    dtype = params["embed"]["embedding"].dtype
    store = setup.storage.init(config, B, capacity, dtype)
    start = (store, (), jnp.zeros((B, T), jnp.int32))
    hidden, (store, states, seen) = setup.model.apply({"params": params}, tokens, positions, attend, start)
    hidden = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    logits = setup.model.apply({"params": params}, hidden, method="unembed")[:, 0]
    token = sampling.sample(logits, keys, lengths, setup.sampling)
    last = lengths + max_new - 1
    done = _stopped(token, lengths, last, setup.stop)
    return DecodeState(store, states, token, lengths, last, done, keys), logits, seen.T


def decode_step(setup: Setup, params: Params, state: DecodeState) -> tuple[DecodeState, NextLogits, Array]:
    """Feeds `state.token` to the model and draws the next one. Finished sequences idle on their last token.

    Returns the new state, the logits `[B, V]` and the live tokens `[B, L, K]` after the step.
    """
    policy = setup.policy
    position = state.position

    def attend(layer, q, k, v, logit, carried):
        store, states = carried
        last_logit = None if logit is None else logit[..., 0]
        victim, own = policy.choose(states[layer], position, k, last_logit)
        store, slot = setup.storage.place(store, layer, k, v, position, victim)
        own = policy.record(own, position, slot, last_logit)
        out = setup.storage.attend(store, layer, q)
        return out, (store, (*states[:layer], own, *states[layer + 1 :]))

    hidden, (store, states) = setup.model.apply(
        {"params": params}, state.token[:, None], position[:, None], attend, (state.cache, state.policy)
    )
    logits = setup.model.apply({"params": params}, hidden, method="unembed")[:, 0]
    live = jnp.stack([setup.storage.live(store, n) for n in range(setup.model.config.num_layers)], axis=1)
    drawn = sampling.sample(logits, state.keys, position + 1, setup.sampling)
    token = jnp.where(state.done, state.token, drawn)
    position = jnp.where(state.done, position, position + 1)
    done = state.done | _stopped(token, position, state.last, setup.stop)
    return DecodeState(store, states, token, position, state.last, done, state.keys), logits, live


@functools.partial(jax.jit, static_argnames=("setup", "steps"), donate_argnames=("state",))
def decode_chunk(setup: Setup, params: Params, state: DecodeState, steps: int) -> tuple[DecodeState, Chunk]:
    """`steps` decode steps in one `lax.scan`; layers are unrolled inside, the cache is a donated carry."""

    def body(state, _):
        active = ~state.done
        state, _, live = decode_step(setup, params, state)
        return state, Chunk(state.token, active, live)

    return jax.lax.scan(body, state, None, length=steps)


class Output(NamedTuple):
    """What `generate` returns; every field is indexed `[prompt][chain]`.

    text is None without a tokenizer; tokens are the new ids, the stop token included; for the counts see
    `metrics.CacheUse`.
    """

    text: list[list[str]] | None
    tokens: list[list[list[int]]]
    kv_reads: np.ndarray
    prefill_reads: np.ndarray
    peak_tokens: np.ndarray
    achieved_cr: np.ndarray


def _round_up(n: int) -> int:
    return -(-n // BUCKET) * BUCKET


def resolve_dms(lm, policy: str | None, dms: DMSConfig | None) -> tuple[str, DMSConfig | None]:
    """The policy's name and the gate's config that `generate` means by None.

    Raises:
      ConfigError: a DMS policy or config on a model that was never retrofitted, or another gate than its own.
    """
    if dms is not None:
        require(lm.dms is not None, "dms", dms, "this model was never retrofitted")
        require(dms.gate == lm.dms.gate, "dms.gate", dms.gate, f"the model carries the {lm.dms.gate!r} gate")
    dms = dms or lm.dms
    return policy or ("dms" if dms else "full"), dms


def encode(lm, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Token ids of each prompt, checked.

    Raises:
      ValueError: an empty prompt, ids outside the vocabulary, or text for a model without a tokenizer.
    """
    V = lm.config.vocab_size
    encoded = []
    for n, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if lm.tokenizer is None:
                raise ValueError(f"prompts[{n}] is text, but this model has no tokenizer: pass token ids")
            prompt = lm.tokenizer(prompt)["input_ids"]
        ids = [int(t) for t in prompt]
        if not ids:
            raise ValueError(f"prompts[{n}] is empty")
        if min(ids) < 0 or max(ids) >= V:
            raise ValueError(f"prompts[{n}] has token ids outside 0..{V - 1}")
        encoded.append(ids)
    return encoded


def generate(
    lm,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    chains: int = 1,
    seed: int = 0,
    policy: str | None = None,
    cache: str = "masked",
    dms: DMSConfig | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[int] | None = None,
    keys: Keys | None = None,
    on_chunk: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> Output:
    """Continues every prompt with `chains` chains, all in one batch.

    Args:
      lm: from `dms_jax.load`.
      prompts: strings, or lists of token ids.
      policy: "full" or "dms"; None means "dms" where the model was retrofitted.
      dms: overrides `lm.dms` (another window, say).
      stop: token ids that end a chain; None means the model's own.
      keys: `[prompts * chains, 2]` raw random keys in place of those made from `seed`.
      on_chunk: called with the new tokens `[N, B]` and the flags `[N, B]` of those that count, while decoding.
    Raises:
      ConfigError: an unknown policy or cache, or DMS on a model that was never retrofitted.
      ValueError: bad prompts.
    """
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "must be at least 1")
    require(chains >= 1, "chains", chains, "must be at least 1")
    name, dms = resolve_dms(lm, policy, dms)
    setup = Setup(
        model=Decoder(lm.config, dms),
        policy=policies.policy(name, dms),
        storage=storage(CacheConfig(storage=cache)),
        sampling=SamplingConfig(temperature, top_k, top_p),
        stop=tuple(lm.config.eos_ids if stop is None else stop),
    )
    ids = [p for p in encode(lm, prompts) for _ in range(chains)]
    if keys is None:
        keys = sampling.sequence_keys(seed, len(prompts), chains)
    tokens, uses = _run(setup, lm.params, ids, max_new_tokens, keys, on_chunk)

    def grouped(flat):
        return [flat[n : n + chains] for n in range(0, len(flat), chains)]

    decoded = lm.tokenizer and [lm.tokenizer.decode(t, skip_special_tokens=True) for t in tokens]
    counts = {
        field: np.array([getattr(u, field) for u in uses]).reshape(-1, chains) for field in metrics.CacheUse._fields
    }
    return Output(text=decoded and grouped(decoded), tokens=grouped(tokens), **counts)


def _run(setup: Setup, params, ids: list[list[int]], max_new: int, keys, on_chunk):
    """New tokens and CacheUse of each sequence: prefill, then chunks until all are done."""
    lengths = np.array([len(p) for p in ids], np.int32)
    padded = np.zeros((len(ids), _round_up(lengths.max())), np.int32)
    for row, prompt in zip(padded, ids, strict=True):
        row[: len(prompt)] = prompt
    capacity = _round_up(padded.shape[1] + max_new)
    limits = np.full(len(ids), max_new, np.int32)
    state, _, seen = prefill(setup, params, padded, lengths, limits, keys, capacity)
    config = setup.model.config
    first = np.asarray(state.token)[None]
    empty = np.zeros((0, len(ids), config.num_layers, config.num_kv_heads), np.int32)
    chunks = [Chunk(first, np.ones_like(first, bool), empty)]
    if on_chunk:
        on_chunk(first, chunks[0].active)
    while not np.asarray(state.done).all():
        state, chunk = decode_chunk(setup, params, state, min(CHUNK, max_new))
        chunk = jax.tree.map(np.asarray, chunk)
        chunks.append(chunk)
        if on_chunk:
            on_chunk(chunk.tokens, chunk.active)
    out, active, live = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    tokens = [out[active[:, b], b].tolist() for b in range(len(ids))]
    return tokens, metrics.cache_use(np.asarray(seen), lengths, live, active[1:])
