"""The one runner of `experiments.niah` and `experiments.variable_tracking`: recall from long contexts, by policy.

Every question is answered greedily under every policy; an answer's score is the share of references that occur in
it. A run folder keeps a JSON line for each answer, and an interrupted run continues when the same command is given
again.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from rich.console import Console

from dms_jax.config import one_of, require
from dms_jax.inference import generation
from dms_jax.inference import use_counts as metrics
from dms_jax.inference.engine import Engine
from dms_jax.inference.generation import GenerationConfig
from dms_jax.inference.scheduler import Job, Result
from dms_jax.weights.text import encode, has_chat, rendered
from experiments import command, report, stats
from experiments import variants as variants_module
from experiments.command import MINI, metavar
from experiments.run import Run, digest, open_run
from experiments.tasks import mini_recall, ruler
from experiments.tasks.ruler import Encode, Form, Sample
from experiments.variants import Loaded
from paper_figures.rows import percent

COUNTS = metrics.CacheUse._fields
CAPTION = (
    f"Score: share of the references that occur in the answer, whatever their case, with its 95% interval "
    f"({stats.METHOD}). KV reads (decoding only), peak live tokens: averaged over layers and KV heads. Achieved CR: "
    f"tokens seen over tokens live at the end."
)


@dataclasses.dataclass(frozen=True)
class Config(command.ModelOptions):
    task: Annotated[tuple[str, ...], metavar("NAME ...")] = ()
    """tasks of the table; default: all that need no text, with --data all; mini has its own"""
    length: Annotated[tuple[int, ...], metavar("TOKENS ...")] = ()
    """longest prompt and answer together; default: 1024; mini's questions have a length of their own"""
    data: Annotated[Path | None, metavar("FILE")] = None
    """text file, for the tasks that hide their statements in one"""
    policy: Annotated[tuple[str, ...], metavar("NAME ...")] = ()
    """eviction policies; default: full; for mini, full and dms"""
    cr: Annotated[tuple[float, ...], metavar("CR ...")] = ()
    """members of a retrofitted family, for policy dms; default: the model as it is; for mini, 4 8"""
    page_size: Annotated[int, metavar("TOKENS")] = 64
    """slots a page; Quest reads whole pages, its authors' of 16; default: 64"""
    limit: Annotated[int, metavar("N")] = 50
    """questions of each task and length; default: 50"""
    batch_size: Annotated[int, metavar("N")] = 10
    """sequences decoded together; default: 10"""
    seed: Annotated[int, metavar("SEED")] = 42
    """of RULER's questions; default: 42, as there; mini's are always the main job's held-out problems"""


class Experiment(NamedTuple):
    """What is run: RULER's tasks, and the mini model's stand-in for them."""

    name: str
    tasks: dict[str, Any]  # name -> its options; one with haystack "essay" needs a text
    form: Callable[[str, int, Encode, Sequence[str]], Form]
    mini_task: str


class Cell(NamedTuple):
    """A row of the table."""

    task: str
    length: int | None  # None: the questions' own
    loaded: Loaded

    @property
    def key(self) -> tuple:
        return self.task, self.length, self.loaded.variant.name


def resolve(experiment: Experiment, config: Config) -> Config:
    """The config with its defaults filled in, checked.

    Raises:
      ConfigError: an impossible value.
    """
    mini = config.model == MINI
    for key in ("length", "data"):
        value = getattr(config, key)
        require(not (mini and value), key, value, "the mini model has its own questions, and they their own length")
    for key in ("limit", "batch_size", "page_size"):
        require(getattr(config, key) > 0, key, getattr(config, key), "must be positive")
    require(all(n > 0 for n in config.length), "length", config.length, "must be positive")
    ours = tuple(n for n, task in experiment.tasks.items() if config.data or task.haystack != "essay")
    policy = config.policy or (("full", "dms") if mini else ("full",))
    defaults = {
        "task": (experiment.mini_task,) if mini else ours,
        "length": () if mini else (1024,),
        "policy": policy,
        "cr": (4.0, 8.0) if mini and "dms" in policy else (),
        "dtype": command.default_dtype(),
    }
    config = dataclasses.replace(config, **{k: v for k, v in defaults.items() if not getattr(config, k)})
    for name in config.task:
        one_of("task", name, (experiment.mini_task,) if mini else tuple(experiment.tasks))
    return config


def encode_with(tokenizer, prompt: str, prefix: str) -> list[int]:
    """Prompt and answer prefix as the model is given them: a chat turn where the tokenizer knows how."""
    if prefix and has_chat(tokenizer):
        text = rendered(tokenizer, [{"role": "user", "content": prompt}], opens_answer=True)
        return encode(tokenizer, text + prefix, begins=False)
    return encode(tokenizer, prompt + prefix)


def questions(experiment: Experiment, config: Config, encode: Encode) -> dict[tuple, tuple[list[Sample], int]]:
    """(task, length) -> its questions, and how many tokens may answer each."""
    if config.model == MINI:
        name = experiment.mini_task
        return {(name, None): (mini_recall.samples(name, config.limit, encode), mini_recall.NEW_TOKENS[name])}
    essay = ruler.read_text(config.data).split() if config.data else ()
    out = {}
    for length in config.length:
        for name in config.task:
            form = experiment.form(name, length, encode, essay)
            out[name, length] = (ruler.samples(form, config.limit, length, config.seed, encode), form.new_tokens)
    return out


def engine_for(config: Config, cell: Cell, longest: int, bar: report.ProgressBar) -> Engine:
    """A greedy engine for questions of up to `longest` tokens."""
    options = cell.loaded.in_tokens(cell.length).options
    chosen = GenerationConfig(**options, page_size=config.page_size, max_num_seqs=config.batch_size)
    return generation.build(cell.loaded.lm, longest, chosen, on_progress=bar.on_progress)


def answer(cell: Cell, sample: Sample, prompt: list[int], result: Result) -> dict:
    """The line of samples.jsonl for an answer."""
    text = cell.loaded.lm.tokenizer.decode(result.tokens, skip_special_tokens=True)
    task, length, name = cell.key
    return {
        "id": sample.id,
        "task": task,
        "length": length,
        "variant": name,
        "score": ruler.share_found(text, sample.answers),
        "answers": sample.answers,
        "text": text,
        "position": sample.position,
        "prompt_tokens": len(prompt),
        "tokens": len(result.tokens),
        **result.use._asdict(),
    }


def sample_all(config: Config, run: Run, cells: list[Cell], asked: dict, encode: Encode, bar) -> None:
    """Answers what is missing, cell by cell; an answer is saved as it ends."""
    done = {(s["task"], s["length"], s["variant"], s["id"]) for s in run.samples}
    for cell in cells:
        samples, new_tokens = asked[cell.key[:2]]
        bar.describe(" ".join(str(part) for part in cell.key if part is not None))
        prompts = generation.encode(cell.loaded.lm, [encode(sample.prompt, sample.prefix) for sample in samples])
        missing = [n for n, sample in enumerate(samples) if (*cell.key, sample.id) not in done]
        engine = engine_for(config, cell, max(map(len, prompts)) + new_tokens, bar)
        key = np.zeros((1, 2), np.uint32)  # greedy: draws nothing
        for result in engine.run(Job(prompts[n], key, new_tokens, n) for n in missing):
            run.append([answer(cell, samples[result.name], prompts[result.name], result)])
        bar.on_block(len(samples), len(run.samples))


def table(samples: Sequence[dict], cells: Sequence[Cell], limit: int) -> list[dict]:
    """One row a cell, over its first `limit` questions."""
    rows = []
    for cell in cells:
        own = [s for s in samples if (s["task"], s["length"], s["variant"]) == cell.key]
        own = [s for s in own if int(s["id"].rsplit("-", 1)[1]) < limit]
        variant = cell.loaded.variant
        cr = cell.loaded.lm.cr if cell.loaded.dms else None
        rows.append(
            {
                "task": cell.task,
                "length": cell.length,
                "policy": variant.policy,
                "cr": cr,
                **{key: getattr(variant, key) for key in ("budget", "protect_prompt", "evict_every")},
                "samples": len(own),
                "score": stats.bootstrap([s["score"] for s in own])._asdict(),
                **{field: float(np.mean([s[field] for s in own])) for field in ("prompt_tokens", "tokens", *COUNTS)},
            }
        )
    return rows


COLUMNS = (  # as in report.py
    ("task", "left", True, lambda row: row["task"]),
    ("length", "right", True, lambda row: "own" if row["length"] is None else f"{row['length']:,}"),
    ("policy", "left", True, lambda row: row["policy"]),
    ("CR", "right", True, lambda row: "" if row["cr"] is None else f"{row['cr']:g}"),
    ("budget", "right", True, lambda row: "" if row["budget"] is None else f"{row['budget']:g}"),
    ("score %", "right", True, lambda row: percent(row["score"])),
    ("KV reads", "right", False, lambda row: f"{row['kv_reads']:,.0f}"),
    ("peak", "right", True, lambda row: f"{row['peak_tokens']:,.0f}"),
    ("achieved CR", "right", True, lambda row: f"{row['achieved_cr']:.2f}"),
    ("samples", "right", False, lambda row: str(row["samples"])),
)


def execute(experiment: Experiment, config: Config, console: Console, start: float) -> int:
    """The whole job; returns the exit status."""
    from experiments.chains import fingerprint

    config = resolve(experiment, config)
    eviction = config.budget, config.protect_prompt, config.evict_every
    chosen = variants_module.variants(config.policy, config.cr, *eviction)
    loaded = variants_module.load(config.model, chosen, config.dtype, config.gate, config.window)
    encode = functools.partial(encode_with, loaded[0].lm.tokenizer)
    asked = questions(experiment, config, encode)
    cells = [Cell(*key, one) for key in asked for one in loaded]
    weights = {one.variant.name: fingerprint(one.lm) for one in loaded}
    first = {f"{name}/{length}": digest(samples[0]) for (name, length), (samples, _) in asked.items()}
    saved = {**command.identity(config), "weights": weights, "questions": first}
    run = open_run(config.runs, experiment.name, saved, config.run_dir, config.fresh)
    try:
        if run.samples:
            console.print(f"continuing {run.path}, which has {len(run.samples)} answers", soft_wrap=True)
        entry = run.started(limit=config.limit, batch_size=config.batch_size)
        try:
            with report.ProgressBar(console, len(cells) * config.limit, None, start) as bar:
                sample_all(config, run, cells, asked, encode, bar)
        except KeyboardInterrupt:
            console.print(f"interrupted; the same command continues {run.path}", soft_wrap=True)
            return 130
        rows = table(run.samples, cells, config.limit)
        outcome = {"experiment": experiment.name, "command": entry["command"], "problems": config.limit}
        run.finish({**outcome, "caption": CAPTION, "config": run.config, "environment": entry, "rows": rows})
        report.print_results(console, rows, f"{Path(config.model).name}: {config.limit} questions a row", COLUMNS)
        console.print(CAPTION, style="dim")
        console.print(f"run folder: {run.path}", soft_wrap=True)
        return 0
    finally:
        run.close()


def main(experiment: Experiment, description: str, arguments: list[str] | None = None) -> int:
    job = functools.partial(execute, experiment)
    return command.main(Config, job, description, f"experiments.{experiment.name}", arguments)
