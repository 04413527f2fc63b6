"""The main job: accuracy against KV reads of L-W-CR configurations, vanilla and DMS.

Without arguments it runs the bundled miniature reasoning model on held-out problems for a few minutes. With
`--model` and `--data` it runs a real model on AIME 2024 or on data of its form.

examples:
  python -m experiments.aime
  python -m experiments.aime --limit 512
  python -m experiments.aime --model org/name --data HuggingFaceH4/aime_2024 --max-length 8192 --chains 1 4
  python -m experiments.aime --model folder --data problems.jsonl --policy full --limit 5 --max-length 256
  python -m experiments.aime --sweep --batch-size 512 --workers 8

--sweep compares every policy at several compression ratios, as configs/aime_sweep.yaml says.
An interrupted run continues when the same command is given again.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from experiments import report, stats
from experiments.run import Run, RunError, digest, open_run
from experiments.tasks import aime as tasks
from experiments.tasks.base import Task

MINI = "mini"
SHIPPED = Path(__file__).resolve().parents[1] / "paper_figures" / "results" / "mini"
# CR -> numbers of chains. Two chains vote as the first of them does, so W = 2 would show nothing.
MINI_CELLS = {1.0: (1, 4), 4.0: (1, 4), 8.0: (1, 4, 8)}
MINI_PROBLEMS = 2048  # at most, when a time budget ends the run
MINI_MINUTES = 4.5
NOT_IDENTITY = ("run_dir", "runs", "fresh", "workers", "merge", "plan")
HOW_MUCH = ("limit", "minutes")  # what a continued run may change


def _metavar(name: str):
    return tyro.conf.arg(metavar=name, help_behavior_hint="")  # the help texts name the defaults themselves


@dataclasses.dataclass(frozen=True)
class Config:
    model: Annotated[str, _metavar("MODEL")] = MINI
    """mini (the default, bundled), a hub name, a folder in Hugging Face's format, or a .gguf file"""
    data: Annotated[str | None, _metavar("DATA")] = None
    """JSONL file or hub data set (org/name[:split]) with problem, answer, id; default: AIME 2024; mini has its own"""
    chains: Annotated[tuple[int, ...], _metavar("W ...")] = ()
    """W, numbers of chains that vote, a row of the table each; default: 1; for mini, several"""
    cr: Annotated[tuple[float, ...], _metavar("CR ...")] = ()
    """members of a retrofitted family, 1 for the original; default: the model as it is; for mini, 1 4 8"""
    max_length: Annotated[int | None, _metavar("TOKENS")] = None
    """L, the most new tokens of a chain; default: 8192; for mini, 448"""
    policy: Annotated[str | None, _metavar("NAME")] = None
    """eviction policy of every model; default: dms where the model was retrofitted, full otherwise"""
    gate: Annotated[Path | None, _metavar("FILE")] = None
    """adapter gate (safetensors) to lay over the model's weights"""
    window: Annotated[int | None, _metavar("TOKENS")] = None
    """overrides the window that the model was retrofitted with"""
    limit: Annotated[int | None, _metavar("N")] = None
    """number of problems, from the first; default: all; for mini, as many as fit in --minutes"""
    minutes: Annotated[float | None, _metavar("MINUTES")] = None
    """time budget, kept to a block of problems; default: none; for mini without --limit, 4.5"""
    temperature: Annotated[float | None, _metavar("T")] = None
    """0 is greedy; default: 0.6; for mini, 1"""
    top_p: Annotated[float | None, _metavar("P")] = None
    """default: 0.95; for mini, 1"""
    budget: Annotated[float | None, _metavar("SHARE")] = None
    """of a policy that needs one: the share of the maximum length that a head may hold, 1 / CR"""
    cache: Annotated[Literal["paged", "masked"], _metavar("KIND")] = "paged"
    """paged (memory falls) or masked (one array a layer); default: paged"""
    page_size: Annotated[int | None, _metavar("TOKENS")] = None
    """slots a page; default: 64"""
    quant: Annotated[Literal["none", "int8", "fp8"], _metavar("KIND")] = "none"
    """keys and values in int8 or fp8; default: none"""
    batch_size: Annotated[int, _metavar("N")] = 16
    """sequences decoded together; default: 16"""
    workers: Annotated[int | None, _metavar("N")] = None
    """engines at the same time; default: 1; for mini on a CPU, 2 where there are two cores"""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, _metavar("DTYPE")] = None
    """float32, bfloat16 or float16, of parameters and cache; default: float32 on a CPU, bfloat16 elsewhere"""
    sweep: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """run the policies, ratios, lengths and chains of --plan, which the options above do not change"""
    plan: Annotated[Path | None, _metavar("FILE")] = None
    """YAML file of a sweep; default: configs/aime_sweep.yaml"""
    policies: Annotated[tuple[str, ...], _metavar("NAME ...")] = ()
    """only these policies of the sweep"""
    merge: Annotated[tuple[Path, ...], _metavar("FOLDER ...")] = ()
    """run folders of parts of the sweep, whose chains are taken over first"""
    seed: Annotated[int, _metavar("SEED")] = 0
    """a chain depends on the seed, its problem and its number only; default: 0"""
    runs: Annotated[Path, _metavar("FOLDER")] = Path("runs")
    """where run folders are made; default: runs"""
    run_dir: Annotated[Path | None, _metavar("FOLDER")] = None
    """the run folder to use, new or to be continued (also with another --limit or --minutes)"""
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """start a new run folder even where an interrupted run could go on"""


def resolve(config: Config) -> Config:
    """The config with its defaults filled in, checked.

    Raises:
      ConfigError: an impossible value.
    """
    import jax

    from dms_jax.config import require

    mini = config.model == MINI
    config = resolve_sweep(config)
    require(not (mini and config.data), "data", config.data, "the mini model has its own problems")
    for key in ("chains", "cr"):
        values = getattr(config, key)
        require(all(v >= 1 for v in values), key, values, "must be at least 1")
        require(len(set(values)) == len(values), key, values, "a value occurs twice")
    for key in ("limit", "minutes", "batch_size", "max_length", "workers", "page_size"):
        value = getattr(config, key)
        require(value is None or value > 0, key, value, "must be positive")
    cpu = jax.default_backend() == "cpu"
    defaults = {
        "data": None if mini else tasks.AIME_2024,
        "max_length": 448 if mini else 8192,
        "temperature": 1.0 if mini else 0.6,
        "top_p": 1.0 if mini else 0.95,
        "minutes": MINI_MINUTES if mini and config.limit is None else None,
        "dtype": "float32" if cpu else "bfloat16",
        "page_size": 64,
        "workers": min(2, os.cpu_count() or 1) if mini and cpu else 1,
    }
    missing = {key: value for key, value in defaults.items() if getattr(config, key) is None}
    return dataclasses.replace(config, **missing)


def resolve_sweep(config: Config) -> Config:
    """What the plan of a sweep decides; options that it leaves no room for are errors.

    Raises:
      ConfigError: an option of a sweep without one, or one that a sweep takes from its plan.
    """
    from dms_jax.config import require
    from experiments import sweep

    if not config.sweep:
        for key in ("plan", "policies", "merge"):
            require(not getattr(config, key), key, getattr(config, key), "is an option of --sweep")
        return config
    for key in ("chains", "cr", "max_length", "policy", "budget", "window", "minutes", "page_size"):
        value = getattr(config, key)
        require(value in (None, ()), key, value, "a sweep takes it from --plan")
    path = config.plan or sweep.PLAN
    plan = sweep.read(path).restricted(config.policies)
    limit = config.limit or plan.problems
    return dataclasses.replace(
        config,
        plan=path,
        policies=plan.policies,
        page_size=plan.page_size,
        limit=limit,
        max_length=max(plan.max_lengths),
    )


def plan(config: Config) -> dict[float | None, tuple[int, ...]]:
    """CR of the weights (None: the model as it is) -> numbers of chains, ascending."""
    default = MINI_CELLS if config.model == MINI else {None: (1,)}
    ratios = config.cr or tuple(default)
    return {cr: tuple(sorted(config.chains or default.get(cr, (1,)))) for cr in ratios}


def load_models(config: Config) -> tuple[list, list[stats.Cell]]:
    """The models of the plan, and the cells of the table."""
    import dms_jax
    from dms_jax import policies
    from dms_jax.config import require
    from dms_jax.inference.generation import resolve_dms
    from experiments import sweep
    from experiments.chains import Model

    if config.sweep:
        return sweep.models(
            sweep.read(config.plan).restricted(config.policies),
            lambda cr: dms_jax.load(config.model, dtype=config.dtype, gate=config.gate, cr=cr),
        )
    models, cells = [], []
    for cr, chains in plan(config).items():
        weights = None if cr == 1 else cr
        lm = dms_jax.load(config.model, dtype=config.dtype, gate=config.gate, cr=weights)
        require(lm.tokenizer is not None, "model", config.model, "has no tokenizer")
        dms = lm.dms
        if config.window is not None:
            require(dms is not None or cr == 1, "window", config.window, "the model was never retrofitted")
            dms = dms and dataclasses.replace(dms, window=config.window)
        dms = resolve_dms(lm, dms)
        policy = config.policy or ("dms" if dms else "full")
        policies.named(
            policy, dms, config.budget, config.max_length, config.page_size
        )  # an error now, before there is a run folder
        ratio = 1.0 if policy == "full" else (cr or lm.cr)
        source = f"{'base' if weights is None else f'cr{cr:g}'}/{policy}"
        shown = "?" if ratio is None else f"{ratio:g}"
        names = [f"{config.max_length / 1024:.2g}-{w}-{shown}" for w in chains]
        models.append(Model(source, names[-1], lm, policy, dms, chains[-1], config.max_length, config.budget))
        cells += [
            stats.Cell(n, source, policy, ratio, w, config.max_length) for n, w in zip(names, chains, strict=True)
        ]
    return models, cells


def load_task(config: Config) -> tuple[Task, str]:
    """The problems to run, cut to the limit, and a hash of the data they come from."""
    if config.model == MINI:
        task = tasks.mini_task(config.limit or MINI_PROBLEMS)
        return task, digest(task.records[:1])  # the stream of problems follows from its beginning
    task = tasks.task(config.data)
    return task._replace(records=task.records[: config.limit]), digest(task.records)


def identity(config: Config, models: list, data: str) -> dict:
    """What makes a run the same run: the options that change samples, the weights and the problems."""
    from experiments import sweep
    from experiments.chains import fingerprint

    options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    options = {k: v for k, v in options.items() if k not in NOT_IDENTITY}
    if config.sweep:
        options["sweep"] = dataclasses.asdict(sweep.read(config.plan).restricted(config.policies))
    return {
        **options,
        "weights": {model.source: fingerprint(model.lm) for model in models},
        "problems": data,
    }


def sample(config: Config, run: Run, task: Task, models: list, bar: report.ProgressBar) -> None:
    """Runs blocks of problems until all are done, or until the next would not end within the budget."""
    from experiments.chains import Sampler, Sampling, blocks

    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(Sampling)}
    sampler = Sampler(run, task, Sampling(**fields), bar.on_progress, bar.on_saved)
    duration = 0.0
    bar.describe("sampling")
    if config.sweep:  # no time budget, so no blocks: an engine's rows stay full to the end
        sampler.sample_block(models, range(len(task.records)))
        bar.on_block(len(task.records), len(run.samples))
        return
    for block in blocks(len(task.records), models, config.batch_size):
        begun = time.monotonic()
        if config.minutes and begun - bar.start + duration > 60 * config.minutes and duration:
            break
        sampler.sample_block(models, block)
        bar.on_block(block.stop, len(run.samples))
        duration = time.monotonic() - begun


def results(config: Config, run: Run, cells: list[stats.Cell], entry: dict) -> dict:
    """The content of results.json."""
    rows = stats.table(run.samples, cells)
    return {
        "experiment": "sweep" if config.sweep else "aime",
        "command": entry["command"],
        "problems": rows[0]["problems"] if rows else 0,
        "samples": len(run.samples),
        "seed": config.seed,
        "interval": stats.METHOD,
        "caption": report.CAPTION,
        "config": run.config,
        "environment": entry,
        "rows": rows,
    }


def draw(config: Config, run: Run, outcome: dict) -> list[Path]:
    """The figures of the run, in its folder."""
    from paper_figures import accuracy_vs_cr, accuracy_vs_reads, achieved_cr, pareto_fronts, style

    if config.sweep:
        scripts = (pareto_fronts, accuracy_vs_cr, achieved_cr)
        return [style.save(s.draw(outcome), run.path / s.__name__.rsplit(".", 1)[1])[0] for s in scripts]
    figure = run.path / "accuracy_vs_reads.png"
    accuracy_vs_reads.plot(outcome["rows"], figure)
    return [figure]


def show(console: Console, config: Config, run: Run, outcome: dict) -> None:
    """The table, the shipped results, and where the files are."""
    title = f"{config.model}: {outcome['problems']} problems, seed {config.seed}"
    report.print_results(console, outcome["rows"], title)
    if config.model == MINI and not config.sweep:
        report.print_shipped(console, SHIPPED)
    console.print(report.CAPTION, style="dim")
    for figure in draw(config, run, outcome) if outcome["rows"] else ():
        console.print(f"figure: {figure}", soft_wrap=True)
    console.print(f"run folder: {run.path}", soft_wrap=True)


def execute(config: Config, console: Console, start: float) -> int:
    """The whole job; returns the exit status."""
    from experiments import sweep

    config = resolve(config)
    task, data = load_task(config)
    models, cells = load_models(config)
    saved = identity(config, models, data)
    name = "sweep" if config.sweep else "aime"
    run = open_run(config.runs, name, saved, config.run_dir, config.fresh, HOW_MUCH)
    try:
        merged = sweep.merge(run, config.merge, [model.source for model in models])
        if merged:
            console.print(f"merged {merged} chains of {len(config.merge)} runs", soft_wrap=True)
        if run.samples:
            console.print(f"continuing {run.path}, which has {len(run.samples)} chains", soft_wrap=True)
        entry = run.started(limit=config.limit, minutes=config.minutes)
        chains = len(task.records) * sum(model.chains for model in models)
        seconds = config.minutes and 60 * config.minutes
        try:
            with report.ProgressBar(console, chains, seconds, start) as bar:
                sample(config, run, task, models, bar)
        except KeyboardInterrupt:
            console.print(f"interrupted; the same command continues {run.path}", soft_wrap=True)
            return 130
        outcome = results(config, run, cells, entry)
        run.finish(outcome)
        show(console, config, run, outcome)
        return 0
    finally:
        run.close()


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    config = tyro.cli(Config, args=arguments, description=__doc__, prog="python -m experiments.aime")
    from dms_jax.config import ConfigError
    from dms_jax.weights.safetensors import WeightError

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, report.WIDE))
    try:
        return execute(config, console, start)
    except (ConfigError, WeightError, RunError, tasks.DataError, FileNotFoundError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
