"""Feeding a given text through the cache as generation runs it, and the logits on the way."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax import decode, policies
from dms_jax.cache import storage
from dms_jax.config import CacheConfig, SamplingConfig, require
from dms_jax.transformer import Decoder
from experiments.variants import Loaded


class Forced(NamedTuple):
    """A chunk of N steps: what was predicted, and the live tokens of each sequence, mean of layers and heads."""

    logits: jax.Array  # [N, B, V] float32; step n of the whole run predicts token prompt_length + n
    live: jax.Array  # [N, B]


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="state")
def _steps(setup: decode.Setup, params, state: decode.DecodeState, tokens) -> tuple[decode.DecodeState, Forced]:
    """Decode steps that take `tokens` `[N, B]` instead of what they would have drawn."""

    def body(state, token):
        state, logits, live = decode.decode_step(setup, params, state._replace(token=token))
        return state, Forced(logits, live.mean(axis=(1, 2)))

    return jax.lax.scan(body, state, tokens)


def forced_logits(
    loaded: Loaded, tokens: np.ndarray, prompt_lengths: np.ndarray, cache: str | None = None, chunk: int = 32
) -> Iterator[Forced]:
    """Logits under the policy and storage of a real generation, teacher-forced: a prefill, then one step a token.

    Args:
      tokens: `[B, T]`, padded on the right; what is predicted after a sequence's own end is for the caller to drop.
      prompt_lengths: `[B]`, tokens of each sequence that are prefilled.
      cache: the storage, None for the usual one.
      chunk: steps whose logits are in memory at once.
    Yields:
      the prediction of the prefill (one step), then chunks, until token T - 1 of every sequence is predicted.
    """
    lm, variant = loaded.lm, loaded.variant
    budget = {} if variant.budget is None else {"budget": variant.budget}
    setup = decode.Setup(
        model=Decoder(lm.config, loaded.dms or lm.dms),
        policy=policies.policy(variant.policy, loaded.dms, **budget),
        storage=storage(CacheConfig() if cache is None else CacheConfig(storage=cache)),
        sampling=SamplingConfig(),
        stop=(),
    )
    B, T = tokens.shape
    longest = int(prompt_lengths.max())
    require(longest < T, "prompt", longest, f"leaves nothing of {T} tokens to predict")
    steps = T - int(prompt_lengths.min()) - 1
    steps += -steps % chunk  # whole chunks: one shape compiles once
    padded, capacity = (-(-n // decode.BUCKET) * decode.BUCKET for n in (longest, longest + steps))
    start = np.zeros((B, padded), np.int32)
    start[:, :longest] = tokens[:, :longest]
    room = np.full(B, steps + 2, np.int32)  # so that no sequence ever counts as finished
    keys = np.zeros((B, 2), np.uint32)
    state, logits, seen = decode.prefill(setup, lm.params, start, prompt_lengths, room, keys, capacity)
    heads = lm.config.num_layers * lm.config.num_kv_heads
    yield Forced(logits[None], jnp.asarray(np.asarray(seen)[prompt_lengths - 1, np.arange(B)] / heads)[None])
    # Step n of sequence b is fed token prompt_length + n; past the end anything will do.
    index = np.minimum(prompt_lengths + np.arange(steps)[:, None], T - 1)
    fed = np.take_along_axis(np.asarray(tokens, np.int32).T, index, axis=0)
    for first in range(0, steps, chunk):
        state, forced = _steps(setup, lm.params, state, fed[first : first + chunk])
        yield forced
