"""A conversation that goes on turn after turn: each turn is read onto the cache that the last one left."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from dms_jax.config import Size, described, fits, require
from dms_jax.inference import generation, sampling
from dms_jax.inference.generation import GenerationConfig
from dms_jax.inference.runner import Runner
from dms_jax.weights.text import encode_turn


class Conversation:
    """One sequence with a cache of its own, of up to `length` tokens in all.

    The tokens of earlier turns are never read again; those evicted stay evicted. An answer that is broken off (by an
    interrupt, or by what `on_tokens` raises) stays in the conversation as far as it got. `config`, `options`: as for
    `generate`; of an EngineConfig only prefill_chunk and steps count, and there is one device.

        talk = dms_jax.Conversation(lm, 4096)
        talk.say("What is 6 * 7?")
        talk.say("And that times two?")
    """

    def __init__(self, lm, length: int, config: GenerationConfig | None = None, **options):
        config = dataclasses.replace(config or GenerationConfig(), **options)
        require(config.devices is None, "devices", config.devices, "a conversation runs on one device")
        engine = generation.build(lm, length, config)
        self.lm, self.length, self.steps = lm, length, engine.config.steps
        live = np.full((1, lm.config.num_layers, lm.config.num_kv_heads), engine.expected(length))
        pages = int(engine.spec.kv_cache.pages_needed(live).max())
        self.runner = Runner(engine.spec, engine.params, 1, pages, prefill_chunk=engine.config.prefill_chunk)
        self.key = np.asarray(sampling.sequence_keys(config.seed, 1, 1))
        self.tokens: list[int] = []  # of all turns; those from the state's position on are not in the cache yet

    def say(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 256,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> str | list[int]:
        """Reads a turn and answers it, as text for a model with a tokenizer, as token ids without.

        A turn that is text is a user's in the chat template, where the tokenizer has one.

        Raises:
          ConfigError: an impossible turn (see `generation.encode`), or one that with its answer would make the
            conversation longer than `length`.
        """
        require(fits(max_new_tokens, Size), "max_new_tokens", max_new_tokens, f"expected {described(Size)}")
        if isinstance(prompt, str):
            require(bool(prompt), "prompt", prompt, "is empty")
            prompt = encode_turn(self.lm.tokenizer, prompt, first=not self.tokens)
            if len(prompt) > 1 and prompt[:1] == self.tokens[-1:]:
                del prompt[0]  # the end of the answer before, which was generated
        (ids,) = generation.encode(self.lm, [prompt])
        total = len(self.tokens) + len(ids) + max_new_tokens
        require(total <= self.length, "length", self.length, f"this turn may make {total} tokens")
        new = self.tokens[int(self.runner.state.position[0]) :] + ids
        self.tokens += ids
        self.runner.prefill([0], [new], [max_new_tokens], self.runner.live(), self.key)
        answer = [int(self.runner.state.token[0])]
        self.tokens += answer
        if on_tokens:
            on_tokens(answer[:])
        while not bool(self.runner.state.done[0]):
            steps = min(self.steps, max_new_tokens)
            self.runner.fits(self.runner.live() + steps)
            made = self.runner.decode(steps)
            fresh = np.asarray(made.tokens)[np.asarray(made.active)].tolist()
            answer += fresh
            self.tokens += fresh
            if on_tokens:
                on_tokens(fresh)
        tokenizer = self.lm.tokenizer
        return answer if tokenizer is None else tokenizer.decode(answer, skip_special_tokens=True)
