"""The one job behind `experiments.aime`, `gsm8k`, `math500`, `gpqa`, `humaneval` and `livecodebench`.

It samples the chains of L-W-CR configurations on a task's problems, judges them, and makes the table of accuracy
against KV reads. A run folder keeps a JSON line for each chain, and an interrupted run continues when the same command
is given again.
"""

import dataclasses
import functools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from experiments import command, report, stats
from experiments.command import metavar
from experiments.run import Run, digest, file_digest, open_run
from experiments.tasks.base import Task

NOT_IDENTITY = ("run_dir", "runs", "fresh", "workers", "merge", "plan")
HOW_MUCH = ("limit", "problems", "minutes")
FROM_PLAN = (  # of a sweep
    "chains", "cr", "max_length", "policy", "budget", "protect_prompt", "evict_every", "window", "minutes", "page_size",
)  # fmt: skip
EXTENDABLE = ("limit", "drawn", "minutes")  # what a continued run may change, as its config.json calls it


@dataclasses.dataclass(frozen=True)
class Options(command.ModelOptions):
    model: Annotated[str, metavar("MODEL")] = dataclasses.field()
    """a hub name, a folder in Hugging Face's format, or a .gguf file"""
    data: Annotated[str | None, metavar("DATA")] = None
    """a .jsonl, .json, .csv or .parquet file, or a hub data set (org/name[/subset][:split]); default: the task's own"""
    chains: Annotated[tuple[int, ...], metavar("W ...")] = ()
    """W, numbers of chains for each problem, a row of the table each; default: 1"""
    cr: Annotated[tuple[float, ...], metavar("CR ...")] = ()
    """members of a retrofitted family, 1 for the original; default: the model as it is"""
    max_length: Annotated[int | None, metavar("TOKENS")] = None
    """L, the most new tokens of a chain; default: the task's own"""
    policy: Annotated[tuple[str, ...], metavar("NAME ...")] = ()
    """eviction policies; one holds for every --cr, of several dms for every --cr and the others for the original;
    default: dms where the model was retrofitted, full otherwise"""
    limit: Annotated[int | None, metavar("N")] = None
    """number of problems, from the first; default: all"""
    problems: Annotated[int | None, metavar("N")] = None
    """number of problems, drawn by --seed; more of them contain the fewer; default: all"""
    minutes: Annotated[float | None, metavar("MINUTES")] = None
    """time budget, kept to a block of problems; default: none"""
    temperature: Annotated[float | None, metavar("T")] = None
    """0 is greedy; default: the task's own"""
    top_p: Annotated[float | None, metavar("P")] = None
    """default: the task's own"""
    stop: Annotated[tuple[str, ...], metavar("TEXT ...")] = ()
    """strings that end a chain, besides those of the task for a model without a chat template"""
    cache: Annotated[Literal["paged", "masked"], metavar("KIND")] = "paged"
    """paged (memory falls) or masked (one array a layer); default: paged"""
    page_size: Annotated[int | None, metavar("TOKENS")] = None
    """slots a page; default: 64"""
    quant: Annotated[Literal["none", "int8", "fp8"], metavar("KIND")] = "none"
    """keys and values in int8 or fp8; default: none"""
    batch_size: Annotated[int, metavar("N")] = 16
    """sequences decoded together; default: 16"""
    workers: Annotated[int | None, metavar("N")] = None
    """engines at the same time; default: 1"""
    sweep: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """run the policies, ratios, lengths and chains of --plan, which the options above do not change"""
    plan: Annotated[Path | None, metavar("FILE")] = None
    """YAML file of a sweep; default: configs/aime_sweep.yaml"""
    policies: Annotated[tuple[str, ...], metavar("NAME ...")] = ()
    """only these policies of the sweep"""
    merge: Annotated[tuple[Path, ...], metavar("FOLDER ...")] = ()
    """run folders of parts of the sweep, whose chains are taken over first"""
    seed: Annotated[int, metavar("SEED")] = 0
    """a chain depends on the seed, its problem and its number only; default: 0"""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A task as a command: its name, where its problems are, and what it does where options say nothing.

    data: the hub data set. read: its problems from a file or the hub. The rest: defaults of the options.
    """

    name: str
    data: str
    read: Callable[[str], Task]
    max_length: int = 8192
    temperature: float = 0.6
    top_p: float = 0.95

    def defaults(self, options: Any) -> dict[str, Any]:
        """Values of the options that were not given."""
        import jax

        return {
            "data": self.data,
            "max_length": self.max_length,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "dtype": "float32" if jax.default_backend() == "cpu" else "bfloat16",
            "page_size": 64,
            "workers": 1,
        }

    def load(self, options: Any) -> Task:
        """The task's problems, all of them."""
        return self.read(options.data)

    def data_digest(self, task: Task) -> str:
        """A hash of the data, which makes runs on other problems other runs."""
        return digest([record[:3] if record.more is None else record for record in task.records])

    def cells(self, options: Any) -> dict[float | None, tuple[int, ...]]:
        """CR of the weights (None: the model as it is) -> numbers of chains, ascending."""
        return {cr: tuple(sorted(options.chains or (1,))) for cr in options.cr or (None,)}

    def run_name(self, options: Any) -> str:
        """What run folders of these options are called."""
        return f"{self.name}-sweep" if options.sweep else self.name

    def shipped(self, options: Any) -> Path | None:
        """A folder of recorded results to show beside this run's."""
        return None


def resolve(experiment: Experiment, options: Any) -> Any:
    """The options with their defaults filled in, checked.

    Raises:
      ConfigError: an impossible value.
    """
    from dms_jax.config import require

    options = resolve_sweep(options)
    for key in ("chains", "cr"):
        values = getattr(options, key)
        require(all(v >= 1 for v in values), key, values, "must be at least 1")
        require(len(set(values)) == len(values), key, values, "a value occurs twice")
    for key in ("limit", "problems", "minutes", "batch_size", "max_length", "workers", "page_size"):
        value = getattr(options, key)
        require(value is None or value > 0, key, value, "must be positive")
    require(None in (options.limit, options.problems), "problems", options.problems, "give --limit or --problems")
    require(all(options.stop), "stop", options.stop, "an empty string ends every chain")
    missing = {k: value for k, value in experiment.defaults(options).items() if getattr(options, k) is None}
    return dataclasses.replace(options, **missing)


def resolve_sweep(options: Any) -> Any:
    """What the plan of a sweep decides; options that it leaves no room for are errors.

    Raises:
      ConfigError: an option of a sweep without one, or one that a sweep takes from its plan.
    """
    from dms_jax.config import require
    from experiments import sweep

    if not options.sweep:
        for key in ("plan", "policies", "merge"):
            require(not getattr(options, key), key, getattr(options, key), "is an option of --sweep")
        return options
    for key in FROM_PLAN:
        value = getattr(options, key)
        require(value in (None, ()), key, value, "a sweep takes it from --plan")
    path = options.plan or sweep.PLAN
    plan = sweep.read(path).restricted(options.policies)
    limit = options.limit or (None if options.problems else plan.problems)
    longest = max(plan.max_lengths)
    decided = {"policies": plan.policies, "page_size": plan.page_size, "limit": limit, "max_length": longest}
    return dataclasses.replace(options, plan=path, **decided)


def chosen_problems(options: Any, count: int) -> list[int]:
    """The numbers of the problems to run, in the order in which they run.

    Raises:
      ConfigError: more problems than there are.
    """
    from dms_jax.config import require

    if options.problems is None:
        return list(range(count))[: options.limit]
    require(options.problems <= count, "problems", options.problems, f"the data has only {count}")
    order = list(range(count))
    random.Random(f"problems/{options.seed}").shuffle(order)
    return order[: options.problems]


def chosen_variants(experiment: Experiment, options: Any) -> list[tuple[Any, float | None, tuple[int, ...]]]:
    """What is compared: variants, the CR asked for, and their numbers of chains.

    Raises:
      ConfigError: a combination that makes no sense.
    """
    from experiments.variants import Variant, variants

    eviction = options.protect_prompt, options.evict_every
    if len(options.policy) > 1:
        several = variants(options.policy, [cr for cr in options.cr if cr != 1], options.budget, *eviction)
        return [(variant, variant.cr, tuple(sorted(options.chains or (1,)))) for variant in several]
    policy = options.policy[0] if options.policy else None
    return [
        (Variant(policy, None if cr == 1 else cr, budget, *eviction), cr, chains)
        for cr, chains in experiment.cells(options).items()
        for budget in options.budget or (None,)
    ]


def load_models(
    experiment: Experiment, options: Any, prepare: Callable[[Any], None] | None = None
) -> tuple[list, list[stats.Cell]]:
    """The models, and the cells of the table.

    prepare: called while weights are read, with each of the models with shapes for its parameters.

    Raises:
      ConfigError: a model or a policy that does not go with the options.
    """
    import dms_jax
    from experiments import sweep, variants

    if options.sweep:
        return sweep.models(
            sweep.read(options.plan).restricted(options.policies),
            lambda cr: dms_jax.load(options.model, dtype=options.dtype, gate=options.gate, cr=cr),
        )
    chosen = chosen_variants(experiment, options)

    def early(n: int, loaded: variants.Loaded) -> None:
        if prepare:
            prepare(model_and_cells(options, loaded, *chosen[n][1:])[0])

    names = [variant for variant, _, _ in chosen]
    loaded = variants.load(options.model, names, options.dtype, options.gate, options.window, early)
    made = [model_and_cells(options, own, *more) for own, (_, *more) in zip(loaded, chosen, strict=True)]
    return [model for model, _ in made], [cell for _, cells in made for cell in cells]


def model_and_cells(options: Any, loaded: Any, cr: float | None, chains: tuple[int, ...]) -> tuple[Any, list]:
    """What a variant samples, and its cells of the table.

    Raises:
      ConfigError: a policy that does not go with the options; now, before there is a run folder.
    """
    from dms_jax import policies
    from experiments.chains import Model

    (variant, lm, dms), longest = loaded, options.max_length
    policies.named(variant.policy, dms or lm.dms, length=longest, page_size=options.page_size, **variant.eviction)
    ratio = nominal_cr(variant, cr, lm, longest)
    source = f"{'base' if variant.cr is None else f'cr{variant.cr:g}'}/{variant._replace(cr=None).name}"
    shown = "?" if ratio is None else f"{ratio:g}"
    names = [f"{longest / 1024:.2g}-{w}-{shown}" for w in chains]
    model = Model(source, names[-1], lm, variant.policy, dms, chains[-1], longest, variant.eviction)
    return model, [stats.Cell(n, source, variant.policy, ratio, w, longest) for n, w in zip(names, chains, strict=True)]


def nominal_cr(variant: Any, cr: float | None, lm: Any, longest: int) -> float | None:
    """The compression that a configuration is called by: of its weights, or of its budget; None where nobody knows."""
    if variant.policy == "full":
        return 1.0
    if variant.budget is not None:
        return 1 / variant.budget if isinstance(variant.budget, float) else longest / variant.budget
    return cr or lm.cr


def identity(experiment: Experiment, options: Any, models: list, task: Task) -> dict:
    """What makes a run the same run: the options that change samples, the weights and the problems."""
    from experiments import sweep
    from experiments.chains import fingerprint

    given = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()}
    given = {k: v for k, v in given.items() if k not in NOT_IDENTITY}
    if options.sweep:
        given["sweep"] = dataclasses.asdict(sweep.read(options.plan).restricted(options.policies))
    given["drawn"] = given.pop("problems")
    weights = {model.source: fingerprint(model.lm) for model in models}
    return {**given, "weights": weights, "problems": experiment.data_digest(task)}


def sample(options: Any, run: Run, engines: Any, problems: list[int], models: list, bar: report.ProgressBar) -> None:
    """Runs blocks of problems until all are done, or until the next would not end within the budget."""
    from experiments.chains import Sampler, blocks

    duration = 0.0
    bar.describe("sampling")
    with Sampler(run, engines, bar.on_progress, bar.on_saved) as sampler:
        if not options.minutes:  # no blocks, at whose ends an engine's rows would stand empty
            sampler.sample_block(models, problems)
            bar.on_block(len(problems), len(run.samples))
            return
        for block in blocks(len(problems), models, options.batch_size):
            begun = time.monotonic()
            if options.minutes and begun - bar.start + duration > 60 * options.minutes and duration:
                break
            sampler.sample_block(models, problems[block.start : block.stop])
            bar.on_block(block.stop, len(run.samples))
            duration = time.monotonic() - begun


def results(
    experiment: Experiment, options: Any, run: Run, task: Task, problems: list[int], cells: list, entry: dict
) -> dict:
    """The content of results.json; of other problems a run that went on may hold the chains that ended first."""
    chosen = {task.records[problem].id for problem in problems}
    rows = stats.table((sample for sample in run.samples if sample["id"] in chosen), cells, task.metric)
    return {
        "experiment": "sweep" if options.sweep else experiment.name,
        "task": task.name,
        "form": task.form,
        "command": entry["command"],
        "problems": rows[0]["problems"] if rows else 0,
        "samples": len(run.samples),
        "seed": options.seed,
        "interval": stats.METHOD,
        "caption": report.caption(task.metric),
        "config": run.config,
        "environment": entry,
        "rows": rows,
    }


def draw(options: Any, run: Run, outcome: dict) -> list[Path]:
    """The figures of the run, in its folder."""
    from paper_figures import accuracy_vs_cr, accuracy_vs_reads, achieved_cr, pareto_fronts, style

    if options.sweep:
        scripts = (pareto_fronts, accuracy_vs_cr, achieved_cr)
        return [style.save(s.draw(outcome), run.path / s.__name__.rsplit(".", 1)[1])[0] for s in scripts]
    figure = run.path / "accuracy_vs_reads.png"
    accuracy_vs_reads.plot(outcome["rows"], figure)
    return [figure]


def show(console: Console, experiment: Experiment, options: Any, run: Run, task: Task, outcome: dict) -> None:
    """The table, the shipped results, and where the files are."""
    title = f"{options.model}: {outcome['problems']} problems, seed {options.seed}"
    columns = report.COLUMNS if task.metric == "vote" else report.PASS_COLUMNS
    report.print_results(console, outcome["rows"], title, columns)
    if (shipped := experiment.shipped(options)) is not None:
        report.print_shipped(console, shipped)
    console.print(outcome["caption"], style="dim")
    for figure in draw(options, run, outcome) if outcome["rows"] else ():
        console.print(f"figure: {figure}", soft_wrap=True)
    console.print(f"run folder: {run.path}", soft_wrap=True)


def execute(experiment: Experiment, options: Any, console: Console, start: float) -> int:
    """The whole job; returns the exit status."""
    from experiments import sweep
    from experiments.chains import Engines, Sampling

    options = resolve(experiment, options)
    task = experiment.load(options)
    task.check()
    problems = chosen_problems(options, len(task.records))
    engines = Engines(task, Sampling(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Sampling)}))
    models, cells = load_models(experiment, options, lambda model: engines.prepare(model, problems))
    saved, name = identity(experiment, options, models, task), experiment.run_name(options)
    run = open_run(options.runs, name, saved, options.run_dir, options.fresh, EXTENDABLE)
    try:
        merged = sweep.merge(run, options.merge, [model.source for model in models])
        if merged:
            console.print(f"merged {merged} chains of {len(options.merge)} runs", soft_wrap=True)
        if run.samples:
            console.print(f"continuing {run.path}, which has {len(run.samples)} chains", soft_wrap=True)
        much = {key: getattr(options, key) for key in HOW_MUCH}
        entry = run.started(**much, model_sha256=file_digest(options.model))
        chains = len(problems) * sum(model.chains for model in models)
        seconds = options.minutes and 60 * options.minutes
        begun = time.monotonic()
        try:
            with report.ProgressBar(console, chains, seconds, start) as bar:
                sample(options, run, engines, problems, models, bar)
        except KeyboardInterrupt:
            console.print(f"interrupted; the same command continues {run.path}", soft_wrap=True)
            return 130
        outcome = results(experiment, options, run, task, problems, cells, entry)
        # Of this start alone: before the first engine is built, and from there on with compiling and judging.
        spent = {"loading": begun - start, "sampling": time.monotonic() - begun}
        outcome |= {"seconds": spent, "new_tokens": bar.tokens}
        run.finish(outcome)
        show(console, experiment, options, run, task, outcome)
        return 0
    finally:
        run.close()


def main(experiment: Experiment, about: str, arguments: list[str] | None = None, options: type = Options) -> int:
    """Reads the options of a task's command and runs it; returns the exit status."""
    job = functools.partial(execute, experiment)
    return command.main(options, job, about, f"experiments.{experiment.name}", arguments)
