"""dms_jax as a model of lm-evaluation-harness, under any eviction policy: MMLU, HellaSwag, GSM8K as others run them.

examples:
  python -m experiments.lm_eval_adapter run --model dms_jax --tasks hellaswag --limit 100 \\
      --model_args model=org/name,policy=tova,budget=0.25,batch_size=16
  python -m experiments.lm_eval_adapter run --model dms_jax --tasks gsm8k --model_args model=file.gguf,gate=smollm2,cr=4

The options after --model_args are the fields of `Settings`; all others are the harness's own.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from dms_jax.config import Count, SamplingConfig, Size, check, require, take
from dms_jax.inference import generation, sampling
from dms_jax.inference.scheduler import Job
from dms_jax.models.transformer import Decoder
from dms_jax.weights.text import encode
from experiments import variants
from experiments.command import MISTAKES, default_dtype
from experiments.fidelity import reference_hidden
from experiments.forced import forced_logits
from experiments.stops import StopStrings

NEW_TOKENS = 256  # of a generation for which the task names no number, as in the harness's own models
LOGITS = 2**27  # in memory at once
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
OPTIONS = (*LENGTH_NAMES, "until", "do_sample", "temperature", "top_k", "top_p")
CHANGES_NOTHING = {"num_beams": 1}  # asked for by some tasks


@dataclasses.dataclass(frozen=True)
class Settings:
    """A model under a policy, and how it is run.

    model, gate, cr, dtype: as in `dms_jax.load`. policy: None for the model's own. budget: tokens a head, or their
    share: of a request's length, rounded up to 64, in scoring, of the longest prompt and answer in generation.
    protect_prompt, evict_every: see `dms_jax.policies.ScoredPolicy`. window: overrides the model's. max_length: tokens
    of a request, None for the model's context. device and max_batch_size belong to the harness's interface and change
    nothing.
    """

    model: str
    policy: str | None = None
    budget: int | float | None = None
    protect_prompt: bool | None = None
    evict_every: int | None = None
    cr: float | None = None
    gate: str | None = None
    window: int | None = None
    dtype: str | None = None
    cache: Literal["paged", "masked"] = "paged"
    page_size: Size = 64
    batch_size: Size | str = 16
    max_length: Size | None = None
    seed: Count = 0
    device: str | None = None
    max_batch_size: Any = None

    def __post_init__(self):
        check(self)
        size = str(self.batch_size)
        known = size.startswith("auto") or size.isdecimal() and int(size) > 0
        require(known, "batch_size", self.batch_size, "expected a number, or auto")

    @property
    def rows(self) -> int:
        """Requests at once."""
        return 16 if str(self.batch_size).startswith("auto") else int(self.batch_size)


class Request(NamedTuple):
    """A continuation to be scored: all tokens, and how many of them are its context."""

    tokens: list[int]
    context: int

    @property
    def bucket(self) -> int:
        return generation.round_up(len(self.tokens))


@register_model("dms_jax")
class DmsLM(TemplateLM):
    """A model of dms_jax, as the harness wants it."""

    def __init__(self, **options):
        super().__init__()
        known = {field.name for field in dataclasses.fields(Settings)}
        for name, value in options.items():
            require(name in known, name, value, f"no option of this model; there are {', '.join(sorted(known))}")
        require("model" in options, "model", None, "name one: --model_args model=...")
        self.settings = s = Settings(**options)
        chosen = variants.Variant(s.policy, s.cr, s.budget, s.protect_prompt, s.evict_every)
        (self.loaded,) = variants.load(s.model, [chosen], s.dtype or default_dtype(), s.gate, s.window)
        self.tokenizer = self.loaded.lm.tokenizer
        storage = {"cache": s.cache, "page_size": s.page_size}
        self.config = generation.GenerationConfig(**storage, max_num_seqs=s.rows, **self.loaded.options)
        generation.resolve_policy(self.config, self.loaded.dms, self.max_length)  # also where scoring needs no cache

    # What the harness asks of a model.

    @property
    def max_length(self) -> int:
        return self.settings.max_length or self.loaded.lm.config.max_positions

    @property
    def eot_token_id(self) -> int:
        return self.loaded.lm.config.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: as in the harness, the first of a text, or the last."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        return self.settings.model.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return encode(self.tokenizer, string, begins=add_special_tokens is not False)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            parts = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(utils.make_disjoint_window, parts):
                windows.append((("", ""), context, continuation))
                owners.append(number)
        sums = np.zeros(len(requests))
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += score
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, float(total))
        return sums.tolist()

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        made = [self._request(context, continuation) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(made)
        order = sorted(range(len(made)), key=lambda n: (made[n].bucket, made[n].context))
        with tqdm(total=len(made), desc="Scoring continuations", disable=disable_tqdm) as bar:
            for group in groups(order, [request.bucket for request in made], self.settings.rows):
                for number, score in zip(group, self._score([made[n] for n in group]), strict=True):
                    found[number] = score
                    if requests[number][0] != ("", ""):
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], score)
                bar.update(len(group))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        alike: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(generation_options(request.args[1]), []).append(number)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for options, numbers in alike.items():
                for number, text in self._generate(options, numbers, [requests[n].args[0] for n in numbers]):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update()
        return texts

    # How it is done.

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        """The last tokens that the model's length has room for; the last one of all is only predicted."""
        tokens = (context + continuation)[-(self.max_length + 1) :]
        fits = 0 < len(continuation) < len(tokens)
        require(fits, "continuation", len(continuation), f"must have 1 to {self.max_length} tokens, after a context")
        return Request(tokens, len(tokens) - len(continuation))

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Sums of log-probabilities, and whether every token was the likeliest."""
        rows = [*requests, *[requests[-1]] * (self.settings.rows - len(requests))]  # one shape compiles once
        tokens = np.zeros((len(rows), requests[0].bucket), np.int32)
        for row, request in zip(tokens, rows, strict=True):
            row[: len(request.tokens)] = request.tokens
        contexts = np.array([request.context for request in rows], np.int32)
        lengths = np.array([len(request.tokens) for request in rows], np.int32)
        sums, greedy = np.zeros(len(rows)), np.ones(len(rows), bool)
        for first, logits in self._predictions(tokens, contexts, int((lengths - contexts).max())):
            index = contexts + first + np.arange(len(logits))[:, None]
            real = index < lengths
            wanted = np.take_along_axis(tokens.T, np.minimum(index, tokens.shape[1] - 1), axis=0)
            likelihood, best = score(wanted, logits)
            sums += np.where(real, likelihood, 0).sum(axis=0)
            greedy &= np.where(real, best, True).all(axis=0)
        return [(float(total), bool(all_best)) for total, all_best in zip(sums, greedy, strict=True)][: len(requests)]

    def _predictions(self, tokens, contexts, most: int) -> Iterator[tuple[int, jax.Array]]:
        """Logits `[N, B, V]` of the n-th tokens after the contexts, piece by piece, with the n that a piece begins at.

        Where nothing is evicted one pass over the text gives them; else they come from the cache, step by step.
        """
        lm, first = self.loaded.lm, 0
        if self.loaded.variant.policy == "full":
            config = (lm.config, lm.dms)
            hidden = reference_hidden(lm.params, tokens, config)
            room = max(1, LOGITS // (len(tokens) * lm.config.vocab_size))
            while first < most:
                count = 1 << min(most - first - 1, room - 1).bit_length()  # few shapes are compiled
                index = np.minimum(contexts + first + np.arange(count)[:, None], tokens.shape[1]) - 1
                yield first, unembed(lm.params, hidden, index, config)
                first += count
            return
        storage = {"cache": self.settings.cache, "page_size": self.settings.page_size}
        for forced in forced_logits(self.loaded, tokens, contexts, **storage):
            yield first, forced.logits
            first += len(forced.logits)
            if first >= most:
                return

    def _generate(self, options: tuple, numbers: list[int], prompts: list[str]) -> Iterator[tuple[int, str]]:
        lm = self.loaded.lm
        stops, new_tokens, chosen = options
        room = self.max_length - new_tokens
        require(room > 0, "max_gen_toks", new_tokens, f"leaves nothing of {self.max_length} tokens for the prompt")
        encoded = [self.tok_encode(prompt)[-room:] or [self.prefix_token_id] for prompt in prompts]
        ends = StopStrings(self.tokenizer, stops)
        config = dataclasses.replace(self.config, max_new_tokens=new_tokens, **dataclasses.asdict(chosen))
        ended = {"chain_end": ends.chain_end} if stops else {}
        engine = generation.build(lm, max(map(len, encoded)) + new_tokens, config, **ended)
        keys = np.asarray(sampling.chain_keys(self.settings.seed, numbers, [0] * len(numbers)))
        jobs = [Job(ids, keys[n : n + 1], new_tokens, numbers[n]) for n, ids in enumerate(encoded)]
        for result in engine.run(sorted(jobs, key=lambda job: len(job.prompt))):
            yield result.name, ends.cut(self.tokenizer.decode(result.tokens, skip_special_tokens=True))


def groups(order: Sequence[int], buckets: Sequence[int], size: int) -> Iterator[list[int]]:
    """Pieces of `order` of at most `size`, each of one bucket: what a request gets depends on no other request."""
    group: list[int] = []
    for number in order:
        if group and (len(group) == size or buckets[group[0]] != buckets[number]):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def generation_options(given: dict[str, Any]) -> tuple[tuple[str, ...], int, SamplingConfig]:
    """Stop strings, new tokens and sampling that a task asks for; greedy unless it says `do_sample` or a temperature.

    Raises:
      ConfigError: an option that is unknown or impossible.
    """
    until = given.get("until") or ()
    until = until if isinstance(until, (list, tuple)) else (until,)
    stops = tuple(str(string) for string in until if string not in ("", None))
    # Numbers and truth values may be texts, as in the harness.
    given = {name: utils.handle_arg_string(x) if isinstance(x, str) else x for name, x in given.items()}
    for name, value in given.items():
        known = name in OPTIONS or value is None or CHANGES_NOTHING.get(name) == value
        require(known, name, value, f"no option of a generation here; there are {', '.join(OPTIONS)}")
    length = next((name for name in LENGTH_NAMES if given.get(name) is not None), LENGTH_NAMES[0])
    new_tokens = take(given, length, Size, NEW_TOKENS)
    if not take(given, "do_sample", bool, bool(given.get("temperature"))):
        return stops, new_tokens, SamplingConfig(0.0)
    options = {key: take(given, key, float, 1.0) for key in ("temperature", "top_p")}
    return stops, new_tokens, SamplingConfig(top_k=take(given, "top_k", int, 0), **options)


@functools.partial(jax.jit, static_argnames="config")
def unembed(params, hidden, index, config):
    """Logits `[N, B, V]` at these positions `[N, B]` of hidden states `[B, T, E]`."""
    model_config, gate = config
    chosen = jnp.take_along_axis(hidden.swapaxes(0, 1), index[..., None], axis=0)
    return Decoder(model_config, gate).apply({"params": params}, chosen, method="unembed")


@jax.jit
def score(wanted, logits):
    """Log-probabilities of these tokens `[N, B]`, and whether each is the likeliest."""
    logits = logits.astype(jnp.float32)
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[..., None], axis=-1)[..., 0]
    return likelihood, logits.argmax(-1) == wanted


def main() -> int:
    """The harness's own command, which then knows `--model dms_jax`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
