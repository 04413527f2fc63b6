"""A conversation that goes on turn after turn: each turn is read onto the cache that the last one left."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from dms_jax.cache import fitted
from dms_jax.config import SamplingConfig, require
from dms_jax.inference import decode, generation
from dms_jax.inference.engine import round_up


class Conversation:
    """One sequence with a cache of its own, of up to `length` tokens in all.

    The tokens of earlier turns are never read again; those evicted stay evicted. An answer that is broken off (by an
    interrupt, or by what `on_tokens` raises) stays in the conversation as far as it got. `options`: see
    `generation.build`; of an EngineConfig only prefill_chunk counts, and there is no mesh.

        talk = dms_jax.Conversation(lm, 4096)
        talk.say("What is 6 * 7?")
        talk.say("And that times two?")
    """

    def __init__(self, lm, length: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, **options):
        require("mesh" not in options, "mesh", options.get("mesh"), "a conversation runs on one device")
        sampling = SamplingConfig(temperature, top_p=top_p)
        engine = generation.build(lm, length, sampling=sampling, **options)
        self.lm, self.length, self.spec, self.params = lm, length, engine.spec, engine.params
        expected = np.full((1, lm.config.num_layers, lm.config.num_kv_heads), engine.expected(length))
        pages = int(self.spec.storage.pages(expected).max())
        self.state = decode.init(self.spec, 1, self.params["embed"]["embedding"].dtype, pages)
        self.chunk = engine.config.prefill_chunk
        self.key = np.asarray(jax.random.PRNGKey(seed), np.uint32)[None]
        self.tokens: list[int] = []  # of all turns; those from the state's position on are not in the cache yet

    def say(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 256,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> str | list[int]:
        """Reads a turn and answers it; text for a model with a tokenizer, token ids without.

        Raises:
          ConfigError: the turn and its answer would make the conversation longer than `length`.
          ValueError: an empty turn, or ids outside the vocabulary.
        """
        (ids,) = generation.encode(self.lm, [prompt])
        total = len(self.tokens) + len(ids) + max_new_tokens
        require(total <= self.length, "length", self.length, f"this turn may make {total} tokens")
        new = self.tokens[int(self.state.position[0]) :] + ids
        self.tokens += ids
        for start in range(0, len(new), self.chunk):
            part = new[start : start + self.chunk]
            padded = np.zeros((1, min(round_up(len(part)), self.chunk)), np.int32)
            padded[0, : len(part)] = part
            live = int(self._make_room(len(part)).max())
            one = (np.zeros(1, np.int32), padded, np.array([len(part)]), np.array([max_new_tokens]), self.key)
            width = min(round_up(live), self.spec.storage.slots)
            self.state, _, _ = decode.prefill(self.spec, self.params, self.state, *one, width)
        answer = [int(self.state.token[0])]
        self.tokens += answer
        if on_tokens:
            on_tokens(answer[:])
        while not bool(self.state.done[0]):
            steps = min(64, max_new_tokens)
            self._make_room(steps)
            self.state, made = decode.decode_chunk(self.spec, self.params, self.state, steps)
            fresh = np.asarray(made.tokens)[np.asarray(made.active)].tolist()
            answer += fresh
            self.tokens += fresh
            if on_tokens:
                on_tokens(fresh)
        tokenizer = self.lm.tokenizer
        return answer if tokenizer is None else tokenizer.decode(answer, skip_special_tokens=True)

    def _make_room(self, tokens: int) -> np.ndarray:
        """Live tokens `[1, L, K]`; the cache has room for `tokens` more in every head."""
        live = np.asarray(decode.live_tokens(self.spec, self.state))
        self.state = self.state._replace(cache=fitted(self.spec.storage, self.state.cache, live + tokens))
        return live
