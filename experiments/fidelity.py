"""How far an eviction policy moves a model's predictions: KL, greedy agreement and perplexity on a text.

The text is cut into windows. Each is prefilled up to --prompt tokens and then fed token by token through the cache
as a real generation runs it. What the uncompressed model predicts for the same tokens comes from one forward pass.
The uncompressed model is the same weights with eviction off; for the mini family, whose members are retrofitted in
all their weights, it is the original. --reference names another.

The mini model knows no English: its windows are its own held-out problems, the prompt prefilled and the right
chain fed.

examples:
  python -m experiments.fidelity
  python -m experiments.fidelity --model org/name --data text.txt --length 4096 --prompt 2048
  python -m experiments.fidelity --model file.gguf --data text.txt --policy full tova h2o --budget 0.25 0.5
  python -m experiments.fidelity --model file.gguf --data text.txt --chat "Write an article."

A chat model is at home in its chat template: later tokens attend to the very first ones whatever they say, and a gate
that was trained on chats knows them only where a chat begins. --chat puts the windows there.

An interrupted run continues when the same command is given again.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from dms_jax import dms
from dms_jax.config import require
from dms_jax.models.transformer import Decoder, arange_positions, causal
from dms_jax.weights.text import encode, encode_turn, has_chat
from experiments import command, report, stats
from experiments import variants as variants_module
from experiments.command import MINI, metavar
from experiments.forced import forced_logits
from experiments.run import Run, digest, file_digest, open_run
from experiments.tasks import aime, ruler
from experiments.variants import Loaded, batches
from paper_figures.rows import percent

FIELDS = ("kl", "agreement", "nll", "nll_reference")  # of a window, means over its tokens after the prompt
CAPTION = (
    f"KL to the uncompressed model in nats a token, share of tokens whose most likely continuation is the same, and "
    f"perplexity; means of windows with 95% intervals ({stats.METHOD.replace('problems', 'windows')}). Achieved CR: "
    f"tokens seen over tokens live, at the end of a window."
)


@dataclasses.dataclass(frozen=True)
class Config(command.ModelOptions):
    data: Annotated[Path | None, metavar("FILE")] = None
    """text file; mini has its own problems"""
    chat: Annotated[str | None, metavar("MESSAGE")] = None
    """each window's text is the model's answer to this message, in its chat template; default: the text alone"""
    reference: Annotated[str | None, metavar("MODEL")] = None
    """the uncompressed model; default: the model's own weights with eviction off; for mini, the original"""
    policy: Annotated[tuple[str, ...], metavar("NAME ...")] = ()
    """eviction policies; default: dms where the model was retrofitted and for mini, full otherwise"""
    cr: Annotated[tuple[float, ...], metavar("CR ...")] = ()
    """members of a retrofitted family, for policy dms; default: the model as it is; for mini, 2 4 8"""
    cache: Annotated[Literal["paged", "masked"], metavar("KIND")] = "paged"
    """paged (memory falls) or masked (one array a layer); default: paged"""
    page_size: Annotated[int, metavar("TOKENS")] = 64
    """slots a page; Quest reads whole pages, its authors' of 16; default: 64"""
    length: Annotated[int, metavar("TOKENS")] = 1024
    """tokens of a window; default: 1024; mini's problems have a length of their own"""
    prompt: Annotated[int | None, metavar("TOKENS")] = None
    """tokens that are prefilled; default: half of the window; for mini, the problem"""
    limit: Annotated[int, metavar("N")] = 32
    """windows, from the beginning of the text; default: 32"""
    batch_size: Annotated[int, metavar("N")] = 8
    """windows at once; default: 8"""


class Window(NamedTuple):
    """Token ids of a piece of text, of which the first `prompt` are prefilled."""

    tokens: tuple[int, ...]
    prompt: int


def resolve(config: Config) -> Config:
    """The config with its defaults filled in, checked.

    Raises:
      ConfigError: an impossible value, or no text.
    """
    mini = config.model == MINI
    require(not mini or config.data is None, "data", config.data, "the mini model has its own problems")
    require(not mini or config.chat is None, "chat", config.chat, "the mini model does not chat")
    require(mini or config.data is not None, "data", None, "a text file is needed")
    for key in ("limit", "batch_size", "page_size"):
        require(getattr(config, key) > 0, key, getattr(config, key), "must be positive")
    prompt = config.length // 2 if config.prompt is None else config.prompt
    require(1 <= prompt < config.length, "prompt", prompt, f"must lie in 1..length-1={config.length - 1}")
    policy = config.policy or (("dms",) if mini else ())
    cr = config.cr or ((2.0, 4.0, 8.0) if mini and "dms" in policy else ())
    return dataclasses.replace(
        config, prompt=prompt, policy=policy, cr=cr, dtype=config.dtype or command.default_dtype()
    )


def opening_of(tokenizer, chat: str | None) -> tuple[int, ...]:
    """What stands before a window's text: what the tokenizer begins a text with, or a chat up to the answer.

    Raises:
      ConfigError: a chat, and a tokenizer without a template for one.
    """
    if chat is None:
        return tuple(encode(tokenizer, ""))
    require(has_chat(tokenizer), "chat", chat, "the model's tokenizer has no chat template")
    return tuple(encode_turn(tokenizer, chat))


def text_windows(text: str, tokenizer, length: int, prompt: int, limit: int, chat: str | None = None) -> list[Window]:
    """Pieces of `length` tokens, `opening_of` included; the text in them does not overlap.

    Raises:
      ConfigError: a text shorter than one window, or no room for it behind the opening.
    """
    opening = opening_of(tokenizer, chat)
    step = length - len(opening)
    require(step > 1, "length", length, f"too short: {len(opening)} tokens stand before the text")
    require(prompt >= len(opening), "prompt", prompt, f"{len(opening)} tokens stand before the text")
    ids = tuple(encode(tokenizer, text, begins=False))
    pieces = [ids[n : n + step] for n in range(0, min(len(ids), limit * step), step)]
    windows = [Window(opening + piece, prompt) for piece in pieces if len(piece) == step]
    require(len(windows) > 0, "length", length, f"the text has only {len(ids)} tokens")
    return windows


def mini_windows(tokenizer, limit: int) -> list[Window]:
    """Held-out problems of the mini task with their right chains."""
    windows = []
    for problem in aime.mini_problems(limit):
        prompt, chain = encode(tokenizer, problem.problem), encode(tokenizer, problem.solution, begins=False)
        windows.append(Window((*prompt, *chain), len(prompt)))
    return windows


@functools.partial(jax.jit, static_argnames="config")
def reference_hidden(params, tokens, config):
    """Hidden states `[B, T, E]` of the uncompressed model, whatever gate it carries."""
    model_config, gate = config
    return Decoder(model_config, gate).apply({"params": params}, tokens, arange_positions(tokens), causal)[0]


@functools.partial(jax.jit, static_argnames="config")
def compare(logits, params, hidden, targets, valid, config):
    """Sums over a chunk's real steps, `[4, B]`: KL, agreement, and the negative log-likelihood of both models.

    logits `[N, B, V]` are the compressed model's, hidden `[N, B, E]` the reference's; targets, valid `[N, B]`.
    """
    model_config, gate = config
    theirs = Decoder(model_config, gate).apply({"params": params}, hidden, method="unembed")
    ours = logits.astype(jnp.float32)

    def nll(x):
        return -jnp.take_along_axis(jax.nn.log_softmax(x), targets[..., None], axis=-1)[..., 0]

    agree = ours.argmax(-1) == theirs.argmax(-1)
    each = jnp.stack([dms.kl(theirs, ours), agree.astype(jnp.float32), nll(ours), nll(theirs)])
    return jnp.sum(jnp.where(valid, each, 0.0), axis=1)


def measure(loaded: Loaded, reference: Any, windows: Sequence[Window], length: int, **storage) -> list[dict]:
    """KL, agreement and likelihoods of each window, means over its tokens after the prompt.

    length: what all windows are padded to. storage: see `forced_logits`.
    """
    lengths = np.array([len(w.tokens) for w in windows], np.int32)
    prompts = np.array([w.prompt for w in windows], np.int32)
    tokens = np.zeros((len(windows), length), np.int32)
    for row, window in zip(tokens, windows, strict=True):
        row[: len(window.tokens)] = window.tokens
    config = (reference.config, reference.dms)
    hidden = reference_hidden(reference.params, tokens, config)
    sums, counts, ends, first = np.zeros((4, len(windows))), lengths - prompts, np.ones(len(windows)), 0
    for forced in forced_logits(loaded, tokens, prompts, **storage):
        target = prompts + first + np.arange(len(forced.logits))[:, None]  # position of the token predicted
        index = np.minimum(target, length - 1)
        own = jnp.take_along_axis(hidden.swapaxes(0, 1), index[..., None] - 1, axis=0)
        wanted = np.take_along_axis(tokens.T, index, axis=0)
        valid = target < lengths
        sums += np.asarray(compare(forced.logits, reference.params, own, wanted, valid, config))
        ratio, last = target / np.asarray(forced.live), valid.sum(axis=0) - 1
        ends = np.where(last >= 0, ratio[last, np.arange(len(windows))], ends)
        first += len(forced.logits)
    means = dict(zip(FIELDS, sums / counts, strict=True))
    return [
        {**{name: float(mean[b]) for name, mean in means.items()}, "tokens": int(counts[b]), "achieved_cr": ends[b]}
        for b in range(len(windows))
    ]


def load_models(config: Config) -> tuple[list[Loaded], list[Any]]:
    """The variants, and the uncompressed model of each."""
    import dms_jax

    chosen_policies = config.policy
    if not chosen_policies:
        lm = dms_jax.load(config.model, dtype=config.dtype, gate=config.gate, cr=min(config.cr, default=None))
        chosen_policies = ("full",) if lm.dms is None else ("dms",)
    eviction = config.budget, config.protect_prompt, config.evict_every
    chosen = variants_module.variants(chosen_policies, config.cr, *eviction)
    loaded = variants_module.load(config.model, chosen, config.dtype, config.gate, config.window)
    source = config.reference or (MINI if config.model == MINI else None)
    if source is None:
        return loaded, [one.lm for one in loaded]
    reference = dms_jax.load(source, dtype=config.dtype)
    for one in loaded:
        same = reference.config.vocab_size == one.lm.config.vocab_size
        require(same, "reference", source, f"its vocabulary is not that of {config.model}")
    return loaded, [reference] * len(loaded)


def load_windows(config: Any, tokenizer, prompt: int, chat: str | None = None) -> list[Window]:
    """The windows that `data`, `length` and `limit` of a config ask for, or the mini model's own."""
    if config.model == MINI:
        return mini_windows(tokenizer, config.limit)
    text = ruler.read_text(config.data)
    return text_windows(text, tokenizer, config.length, prompt, config.limit, chat)


def measure_all(config: Config, run: Run, models: list, windows: list[Window], bar) -> None:
    """Measures what is missing; of a batch with a window missing, all are measured again.

    A budget that is a share is one of --length, of mini's problems of the model's context.
    """
    done = {(s["variant"], s["id"]) for s in run.samples}
    length = max(len(window.tokens) for window in windows)
    for loaded, reference in models:
        name = loaded.variant.name
        loaded = loaded.in_tokens(None if config.model == MINI else config.length)
        bar.describe(name)
        for group, padded in batches(list(enumerate(windows)), config.batch_size):
            if all((name, n) in done for n, _ in group):
                continue
            texts = [window for _, window in padded]
            measured = measure(loaded, reference, texts, length, cache=config.cache, page_size=config.page_size)
            rows = [{"id": n, "variant": name, **row} for (n, _), row in zip(group, measured, strict=False)]
            run.append([row for row in rows if (name, row["id"]) not in done])
            bar.on_tokens(sum(row["tokens"] for row in rows))
        bar.on_block(len(windows), len(run.samples))


def table(samples: Sequence[dict], loaded: Sequence[Loaded], limit: int) -> list[dict]:
    """One row a variant, over its first `limit` windows; perplexities are exp of a mean and of its interval."""
    rows = []
    for one in loaded:
        own = [s for s in samples if s["variant"] == one.variant.name and s["id"] < limit]
        mean = {name: stats.bootstrap([s[name] for s in own])._asdict() for name in FIELDS}
        perplexity = {f"perplexity{n[3:]}": {k: math.exp(v) for k, v in mean[n].items()} for n in FIELDS[2:]}
        rows.append(
            {
                "policy": one.variant.policy,
                "cr": one.lm.cr if one.dms else None,
                **{key: getattr(one.variant, key) for key in ("budget", "protect_prompt", "evict_every")},
                "windows": len(own),
                "tokens": sum(s["tokens"] for s in own),
                **mean,
                **perplexity,
                "achieved_cr": float(np.mean([s["achieved_cr"] for s in own])),
            }
        )
    return rows


def _kl(estimate: dict) -> str:
    mean, low, high = (f"{estimate[key]:.2g}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


COLUMNS = (  # as in report.py
    ("policy", "left", True, lambda row: row["policy"]),
    ("CR", "right", True, lambda row: "" if row["cr"] is None else f"{row['cr']:g}"),
    ("budget", "right", True, lambda row: "" if row["budget"] is None else f"{row['budget']:g}"),
    ("KL, nats", "right", True, lambda row: _kl(row["kl"])),
    ("agreement %", "right", True, lambda row: percent(row["agreement"])),
    ("perplexity", "right", True, lambda row: f"{row['perplexity']['mean']:.3f}"),
    ("of the reference", "right", False, lambda row: f"{row['perplexity_reference']['mean']:.3f}"),
    ("achieved CR", "right", True, lambda row: f"{row['achieved_cr']:.2f}"),
    ("windows", "right", False, lambda row: str(row["windows"])),
)


def execute(config: Config, console: Console, start: float) -> int:
    """The whole job; returns the exit status."""
    from experiments.chains import fingerprint

    config = resolve(config)
    loaded, references = load_models(config)
    windows = load_windows(config, loaded[0].lm.tokenizer, config.prompt, config.chat)
    models = list(zip(loaded, references, strict=True))
    weights = {one.variant.name: [fingerprint(one.lm), fingerprint(reference)] for one, reference in models}
    text = digest([windows[0], config.data and file_digest(config.data)])
    saved = {**command.identity(config), "weights": weights, "text": text}
    run = open_run(config.runs, "fidelity", saved, config.run_dir, config.fresh)
    try:
        if run.samples:
            console.print(f"continuing {run.path}, which has {len(run.samples)} windows", soft_wrap=True)
        entry = run.started(limit=config.limit, batch_size=config.batch_size)
        try:
            with report.ProgressBar(console, len(models) * len(windows), None, start) as bar:
                measure_all(config, run, models, windows, bar)
        except KeyboardInterrupt:
            console.print(f"interrupted; the same command continues {run.path}", soft_wrap=True)
            return 130
        rows = table(run.samples, loaded, len(windows))
        outcome = {"experiment": "fidelity", "command": entry["command"], "caption": CAPTION, "config": run.config}
        run.finish({**outcome, "environment": entry, "rows": rows})
        report.print_results(console, rows, f"{Path(config.model).name}: {len(windows)} windows", COLUMNS)
        console.print(CAPTION, style="dim")
        console.print(f"run folder: {run.path}", soft_wrap=True)
        return 0
    finally:
        run.close()


def main(arguments: list[str] | None = None) -> int:
    return command.main(Config, execute, __doc__, "experiments.fidelity", arguments)


if __name__ == "__main__":
    sys.exit(main())
