"""Feeding a given text through the cache as generation runs it, and the logits on the way."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from dms_jax.config import require
from dms_jax.inference import decode, generation
from dms_jax.inference.generation import GenerationConfig
from dms_jax.inference.runner import Runner
from experiments.variants import Loaded


class Forced(NamedTuple):
    """A chunk of N steps: what was predicted, and the live tokens of each sequence, mean of layers and heads."""

    logits: jax.Array  # [N, B, V] float32; step n of the whole run predicts token prompt_length + n
    live: jax.Array  # [N, B]


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="state")
def _steps(spec: decode.DecodeSpec, params, state: decode.DecodeState, tokens) -> tuple[decode.DecodeState, Forced]:
    """Decode steps that take `tokens` `[N, B]` instead of what they would have drawn."""

    def body(state, token):
        state, logits, made = decode.decode_step(spec, params, state._replace(token=token))
        return state, Forced(logits, made.live.mean(axis=(1, 2)))

    return jax.lax.scan(body, state, tokens)


def forced_logits(
    loaded: Loaded,
    tokens: np.ndarray,
    prompt_lengths: np.ndarray,
    cache: str = "paged",
    page_size: int = 64,
    chunk: int = 32,
) -> Iterator[Forced]:
    """Logits under the policy and storage of a real generation, teacher-forced: a prefill, then one step a token.

    Args:
      tokens: `[B, T]`, padded on the right; what is predicted after a sequence's own end is for the caller to drop.
        A budget that is a share is one of T.
      prompt_lengths: `[B]`, tokens of each sequence that are prefilled.
      cache, page_size: see `dms_jax.CacheConfig`.
      chunk: steps whose logits are in memory at once.
    Yields:
      the prediction of the prefill (one step), then chunks, until token T - 1 of every sequence is predicted.
    """
    lm = loaded.lm
    B, T = tokens.shape
    longest = int(prompt_lengths.max())
    require(longest < T, "prompt", longest, f"leaves nothing of {T} tokens to predict")
    config = GenerationConfig(**loaded.options, stop=(), cache=cache, page_size=page_size, max_num_seqs=B)
    engine = generation.build(lm, T, config)
    spec, live = engine.spec, np.zeros((B, lm.config.num_layers, lm.config.num_kv_heads), np.int64)
    pages = int(spec.kv_cache.pages_needed(live + T).max())
    runner = Runner(spec, lm.params, B, pages, prefill_chunk=engine.config.prefill_chunk)
    prompts = [row[:length].tolist() for row, length in zip(tokens, prompt_lengths, strict=True)]
    # Every sequence takes steps until its last token is predicted; keys draw nothing, as all is given.
    read = runner.prefill(list(range(B)), prompts, (T - prompt_lengths).tolist(), live)
    state = runner.state
    yield Forced(read.logits[None, :B], decode.live_tokens(spec, state).mean(axis=(1, 2))[None])
    steps = T - int(prompt_lengths.min()) - 1
    steps += -steps % chunk  # whole chunks: one shape compiles once
    # Step n of sequence b is fed token prompt_length + n; past the end a sequence takes no more steps.
    index = np.minimum(prompt_lengths + np.arange(steps)[:, None], T - 1)
    fed = np.take_along_axis(np.asarray(tokens, np.int32).T, index, axis=0)
    for first in range(0, steps, chunk):
        state, forced = _steps(spec, lm.params, state, fed[first : first + chunk])
        yield forced
