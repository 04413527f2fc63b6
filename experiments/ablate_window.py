"""The window ablation: delayed against immediate eviction for several windows and compression ratios.

A cell is a window and a mode: one short retrofit of the mini model whose schedule passes the compression ratios,
with a snapshot at each, which is then scored on held-out problems as `experiments.aime` scores (one chain, sampled
at temperature 1). The query neuron is given up once a seed, before any cell: that depends on neither window nor mode.
With window 0 the two modes are the same model, which is trained once and reported under both.

examples:
  python -m experiments.ablate_window --jobs 9
  python -m experiments.ablate_window --windows 16 --modes immediate --seeds 1 --out runs/ablate_window

OUT holds a folder for the shared start of each seed and one for each cell; what is finished there is not run again,
and OUT/results.json has a row for each (window, mode, ratio) of all cells in it, the mean of its seeds.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from rich.console import Console

from dms_jax.config import Count, DMSConfig, Positive, Ratio, Seed, Share, Size, check, load_yaml, require
from dms_jax.files import write_atomically
from experiments import command, report, stats
from experiments.command import metavar
from experiments.run import Run, RunError, environment, open_run, read_config, read_json, read_jsonl, write_json
from experiments.variants import batches
from paper_figures.rows import percent

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "ablate_window.yaml"
POOL = "pool.npz"
PADDED = 64  # lengths of training sequences are cut to a multiple of this
POLL = 2.0  # seconds between two looks at the cells that run
CAPTION = (
    f"Accuracy of one sampled chain a problem, mean of the seeds (each a retrofit of its own), with its 95% interval "
    f"({stats.METHOD}). Achieved CR: tokens seen over tokens live at the end of a chain, the window included."
)


@dataclasses.dataclass(frozen=True)
class Ablation:
    """The grid, and how a cell is trained and scored; fields as in RetrofitConfig and `experiments.aime`.

    modes: "delayed" reads the decision off the token itself (o = 0), "immediate" off the one `window` later (o = w).
    seeds: retrofits of each cell, each with its own training problems, order and noise.
    pool: training problems drawn. problems: held-out problems scored; sampled: sequences in one call.
    """

    windows: tuple[Count, ...] = (0, 1, 4, 16, 64)
    modes: tuple[Literal["delayed", "immediate"], ...] = ("delayed", "immediate")
    crs: tuple[Ratio, ...] = (2.0, 4.0, 8.0)
    retire_steps: Size = 100
    steps_per_cr: Size = 150
    learning_rate: Positive = 5e-4
    batch_size: Size = 128
    pool: Size = 65536
    slip_rate: Share = 0.045
    problems: Size = 512
    sampled: Size = 512
    max_length: Size = 448
    seeds: tuple[Seed, ...] = (1, 2, 3)

    def __post_init__(self):
        check(self)
        for key in ("windows", "modes", "crs", "seeds"):
            values = getattr(self, key)
            require(len(values) > 0, key, values, "must not be empty")
            require(len(set(values)) == len(values), key, values, "a value occurs twice")
        require(all(cr > 1 for cr in self.crs), "crs", self.crs, "must be above 1")
        require(self.pool >= self.batch_size, "pool", self.pool, f"is less than batch_size={self.batch_size}")

    def shared(self) -> dict:
        """What the shared starts depend on, besides their seeds."""
        keys = ("retire_steps", "learning_rate", "batch_size", "pool", "slip_rate")
        return {key: getattr(self, key) for key in keys}

    def scoring(self) -> dict:
        """What a score depends on besides the model."""
        return {"max_length": self.max_length, "problems": self.problems}


@dataclasses.dataclass(frozen=True)
class Config:
    config: Annotated[Path, metavar("FILE")] = CONFIG
    """YAML file with the fields of Ablation; default: configs/ablate_window.yaml; the options below override it"""
    windows: Annotated[tuple[int, ...], metavar("TOKENS ...")] = ()
    """windows of the grid"""
    modes: Annotated[tuple[Literal["delayed", "immediate"], ...], metavar("MODE ...")] = ()
    """delayed, immediate"""
    crs: Annotated[tuple[float, ...], metavar("CR ...")] = ()
    """compression ratios that the schedule passes"""
    seeds: Annotated[tuple[int, ...], metavar("SEED ...")] = ()
    """retrofits of each cell"""
    retire_steps: Annotated[int | None, metavar("N")] = None
    """steps over which the query neuron is given up, once for all cells of a seed"""
    steps_per_cr: Annotated[int | None, metavar("N")] = None
    """steps in which the compression ratio rises by 1"""
    batch_size: Annotated[int | None, metavar("N")] = None
    """training sequences in a step"""
    pool: Annotated[int | None, metavar("N")] = None
    """training problems"""
    problems: Annotated[int | None, metavar("N")] = None
    """held-out problems that score a cell"""
    max_length: Annotated[int | None, metavar("TOKENS")] = None
    """the most new tokens of a chain"""
    out: Annotated[Path, metavar("FOLDER")] = Path("runs/ablate_window")
    """where cells are written, and found again; default: runs/ablate_window"""
    jobs: Annotated[int, metavar("N")] = 1
    """cells at the same time, each in a process of its own; default: 1"""


class Cell(NamedTuple):
    """A model to train. For window 0 the modes are one, called delayed."""

    window: int
    mode: str
    seed: int

    @property
    def name(self) -> str:
        return f"w{self.window}-{self.mode}-seed{self.seed}"

    @property
    def start(self) -> str:
        """The folder of the shared start."""
        return f"start-seed{self.seed}"

    @property
    def dms(self) -> DMSConfig:
        return DMSConfig(window=self.window, decision_offset=self.window if self.mode == "immediate" else 0)


def grid(settings: Ablation) -> list[Cell]:
    """The cells to train, widest window first: theirs take longest."""
    grid = itertools.product(settings.windows, settings.modes, settings.seeds)
    return sorted({Cell(w, mode if w else "delayed", seed) for w, mode, seed in grid}, reverse=True)


def cell_identity(settings: Ablation, cell: Cell) -> dict:
    """What makes a cell's folder that cell's."""
    return {
        **settings.shared(),
        **settings.scoring(),
        "crs": sorted(settings.crs),
        "steps_per_cr": settings.steps_per_cr,
        **cell._asdict(),
    }


# ---- the shared start


def retrofit_config(settings: Ablation, dms: DMSConfig, seed: int):
    """The retrofit of a cell; its first `retire_steps` steps are the shared ones."""
    from dms_jax.training.config import RetrofitConfig

    return RetrofitConfig(
        dms=dms,
        retire_steps=settings.retire_steps,
        steps_per_cr=settings.steps_per_cr,
        max_cr=max(settings.crs),
        crs=settings.crs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        seed=seed,
    )


def train_cell(settings: Ablation, cell: Cell, lm: Any, folder: Path, **options) -> None:
    """The retrofit of a cell in `folder`, from its newest checkpoint; `options` are those of `train`."""
    from dms_jax.training.data import PoolStream
    from dms_jax.training.train import train

    config = retrofit_config(settings, cell.dms, cell.seed)
    pool = read_pool(folder.parent / cell.start / POOL)
    train(lm.params, lm.config, config, PoolStream(pool, config.batch_size, config.seed).packed, folder, **options)


def make_pool(settings: Ablation, seed: int, path: Path) -> None:
    """Draws the training problems that all cells share, and writes them in one piece."""
    from experiments.tasks import mini

    workers = min(os.cpu_count() or 1, -(-settings.pool // mini.CHUNK))
    tokenizer = mini.build_tokenizer()
    drawn = mini.generate_pool(
        tokenizer, "train", seed, settings.pool, mini.LENGTH, workers, slip_rate=settings.slip_rate
    )
    width = -(-int(drawn.total_lengths.max()) // PADDED) * PADDED
    arrays = {"tokens": drawn.tokens[:, :width], "prompts": drawn.prompt_lengths, "lengths": drawn.total_lengths}
    write_atomically(path, functools.partial(np.savez, **arrays))


def read_pool(path: Path):
    """The training problems as a `Batch`."""
    from dms_jax.training.data import Batch

    with np.load(path, allow_pickle=False) as arrays:
        return Batch(arrays["tokens"], arrays["prompts"], arrays["lengths"])


def prepare(settings: Ablation, out: Path) -> dict:
    """The base model's score in OUT/base, which it returns; each seed's pool and retired state in OUT/start-seed1, ....

    Raises:
      RunError: OUT was made with other settings.
    """
    import dms_jax

    lm = dms_jax.load("mini", dtype="float32")
    for seed in settings.seeds:
        cell = Cell(0, "delayed", seed)
        with contextlib.closing(open_run(out, "start", settings.shared(), out / cell.start)) as run:
            if not (run.path / POOL).exists():
                make_pool(settings, seed, run.path / POOL)
            train_cell(settings, cell, lm, run.path, until=settings.retire_steps)
    with contextlib.closing(open_run(out, "base", settings.scoring(), out / "base")) as run:
        score_member(settings, run, lm, None, "base")
        return summarize(run.samples, "base")


# ---- a cell


def begin_cell(settings: Ablation, start: Path, folder: Path) -> None:
    """Puts the shared start into a cell's folder as its first checkpoint."""
    from dms_jax.training import checkpoint

    if not checkpoint.steps_in(folder / "checkpoints"):
        checkpoint.copy(settings.retire_steps, start / "checkpoints", folder / "checkpoints")


def run_cell(settings: Ablation, cell: Cell, out: Path) -> None:
    """Trains a cell and scores its members, each of the ratios; what its folder has already is kept."""
    import dms_jax
    from dms_jax.training.train import retrofitted

    run = open_run(out, "cell", cell_identity(settings, cell), out / cell.name)
    try:
        begun = time.monotonic()
        entry = run.started()
        lm = dms_jax.load("mini", dtype="float32")

        def write_member(cr: float, params: Any) -> None:
            dms_jax.save(retrofitted(lm, params, cell.dms, cr, "float32"), run.path / f"cr{cr:g}")

        begin_cell(settings, out / cell.start, run.path)
        train_cell(settings, cell, lm, run.path, on_member=write_member)
        trained = time.monotonic()
        rows = []
        for cr in sorted(settings.crs):
            member = dms_jax.load(run.path / f"cr{cr:g}", dtype="float32")
            score_member(settings, run, member, cell.dms, f"cr{cr:g}")
            rows.append({**cell._asdict(), "cr": cr, **summarize(run.samples, f"cr{cr:g}")})
        seconds = {"training": trained - begun, "scoring": time.monotonic() - trained}
        run.finish({"rows": rows, "seconds": seconds, "environment": entry})
    finally:
        run.close()


def score_member(settings: Ablation, run: Run, lm: Any, dms: DMSConfig | None, source: str) -> None:
    """Samples one chain for each problem as `experiments.aime` does, and judges it; a line of samples.jsonl each."""
    import dms_jax
    from dms_jax.inference import sampling
    from experiments.judge import judge
    from experiments.tasks import aime

    records = aime.mini_task(settings.problems).records
    done = {s["id"] for s in run.samples if s["source"] == source}
    for group, padded in batches(list(enumerate(records)), min(settings.sampled, settings.problems)):
        if all(record.id in done for _, record in group):
            continue
        out = dms_jax.generate(
            lm,
            [record.problem for _, record in padded],
            max_new_tokens=settings.max_length,
            temperature=1.0,
            policy="dms" if dms else "full",
            dms=dms,
            keys=sampling.chain_keys(0, [n for n, _ in padded], [0] * len(padded)),
        )
        rows = []
        for n, (_, record) in enumerate(group):
            verdict = judge(out.text[n][0], record.answer)
            row = {"source": source, "id": record.id, "text": out.text[n][0], **verdict._asdict()}
            counts = ("kv_reads", "peak_tokens", "achieved_cr")
            rows.append({**row, "tokens": len(out.tokens[n][0]), **{c: float(getattr(out, c)[n, 0]) for c in counts}})
        run.append([row for row in rows if row["id"] not in done])


def summarize(samples: Sequence[dict], source: str) -> dict:
    """Accuracy and achieved CR of one member's samples."""
    own = [s for s in samples if s["source"] == source]
    return {
        "accuracy": stats.bootstrap([s["correct"] for s in own])._asdict(),
        "achieved_cr": float(np.mean([s["achieved_cr"] for s in own])),
        "problems": len(own),
    }


# ---- all cells


def finished(settings: Ablation, cell: Cell, out: Path) -> bool:
    return (out / cell.name / "results.json").exists() and read_config(out / cell.name) == json.loads(
        json.dumps(cell_identity(settings, cell))
    )


def _quiet_cell(settings: Ablation, cell: Cell, out: Path) -> None:
    """`run_cell` in a process of its own; what it prints goes to a file."""
    (out / cell.name).mkdir(parents=True, exist_ok=True)
    with (out / f"{cell.name}.log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        run_cell(settings, cell, out)


def steps_done(cell: Cell, out: Path) -> int:
    """The step of the last whole line of a cell's log."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return json.loads((out / cell.name / "log.jsonl").read_text().splitlines()[-1])["step"]
    return 0


def run_cells(settings: Ablation, cells: Sequence[Cell], out: Path, jobs: int) -> None:
    """Runs the cells, `jobs` at a time; a bar shows training steps. The first failure ends it, naming the cell."""
    from tqdm import tqdm

    if jobs == 1 or len(cells) <= 1:
        for cell in cells:
            print(f"cell {cell.name}")
            run_cell(settings, cell, out)
        return
    steps = round((max(settings.crs) - 1) * settings.steps_per_cr)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(cells)), mp_context=spawn) as executor:
        waiting = {executor.submit(_quiet_cell, settings, cell, out): cell for cell in cells}
        with tqdm(total=steps * len(cells), unit="step") as bar:
            while waiting:
                ended, _ = concurrent.futures.wait(waiting, timeout=POLL)
                bar.n = sum(max(0, steps_done(cell, out) - settings.retire_steps) for cell in cells)
                bar.set_postfix({"cells running or waiting": len(waiting) - len(ended)})
                for future in ended:
                    cell = waiting.pop(future)
                    if error := future.exception():
                        executor.shutdown(cancel_futures=True)
                        raise RunError(f"cell {cell.name}: {error}; see {out / cell.name}.log") from error


def finished_rows(out: Path) -> Iterator[dict]:
    """Rows of every finished cell in OUT, each with what its chains came to, `right` by problem.

    Raises:
      RunError: cells that were trained or scored differently.
    """
    seen: dict[str, dict] = {}
    for path in sorted(out.glob("w*/results.json")):
        own = {k: v for k, v in read_config(path.parent).items() if k not in (*Cell._fields, "crs")}
        seen[path.parent.name] = own
        first = next(iter(seen))
        if own != seen[first]:
            raise RunError(f"{path.parent}: made with other settings than {out / first}")
        samples = read_jsonl(path.parent / "samples.jsonl")
        for row in read_json(path, dict)["rows"]:
            right = {s["id"]: s["correct"] for s in samples if s["source"] == f"cr{row['cr']:g}"}
            yield {**row, "right": right}


def merged(out: Path, base: dict) -> Iterator[dict]:
    """A row for each (window, mode, ratio): the mean of its seeds, and each of them; window 0 stands for both modes.

    Raises:
      RunError: as `finished_rows`.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in finished_rows(out):
        groups.setdefault((row["window"], row["mode"], row["cr"]), []).append(row)
    for (window, mode, cr), rows in groups.items():
        right = [np.mean([row["right"][problem] for row in rows]) for problem in rows[0]["right"]]
        row = {
            "cr": cr,
            "accuracy": stats.bootstrap(right)._asdict(),
            "achieved_cr": float(np.mean([row["achieved_cr"] for row in rows])),
            "by_seed": [{k: row[k] for k in ("seed", "accuracy", "achieved_cr")} for row in rows],
            "problems": len(right),
            "base_accuracy": base["accuracy"],
        }
        for shown in ("delayed", "immediate") if window == 0 else (mode,):
            yield {"window": window, "mode": shown, **row}


COLUMNS = (  # as in report.py
    ("window", "right", True, lambda row: str(row["window"])),
    ("mode", "left", True, lambda row: row["mode"]),
    ("CR", "right", True, lambda row: f"{row['cr']:g}"),
    ("accuracy %", "right", True, lambda row: percent(row["accuracy"])),
    ("each seed %", "left", False, lambda row: ", ".join(f"{100 * s['accuracy']['mean']:.1f}" for s in row["by_seed"])),
    ("achieved CR", "right", True, lambda row: f"{row['achieved_cr']:.2f}"),
    ("problems", "right", True, lambda row: str(row["problems"])),
)


def load_settings(config: Config) -> Ablation:
    """The YAML file with the options laid over it."""
    require(config.jobs > 0, "jobs", config.jobs, "must be positive")
    require(config.config.is_file(), "config", str(config.config), "no such file")
    names = {field.name for field in dataclasses.fields(Ablation)}
    given = {k: v for k, v in vars(config).items() if k in names and v not in (None, ())}
    return dataclasses.replace(load_yaml(Ablation, config.config), **given)


def execute(config: Config, console: Console, start: float) -> int:
    """The whole job; returns the exit status."""
    settings, out = load_settings(config), config.out
    # Several processes share the GPU: none may take most of its memory when it starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cells = grid(settings)
    try:
        base = prepare(settings, out)
        run_cells(settings, [cell for cell in cells if not finished(settings, cell, out)], out, config.jobs)
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command continues {out}", soft_wrap=True)
        return 130
    rows = sorted(merged(out, base), key=lambda row: (row["cr"], row["window"], row["mode"]))
    entry = environment()
    outcome = {"experiment": "ablate_window", "command": entry["command"], "problems": settings.problems}
    settled = {**outcome, "caption": CAPTION, "config": dataclasses.asdict(settings), "environment": entry}
    write_json(out / "results.json", {**settled, "base": base, "rows": rows})
    title = f"mini: {settings.problems} problems; the base model has {percent(base['accuracy'])}%"
    report.print_results(console, rows, title, COLUMNS)
    console.print(CAPTION, style="dim")
    console.print(f"results: {out / 'results.json'}", soft_wrap=True)
    console.print(f"{time.monotonic() - start:.0f} seconds")
    return 0


def main(arguments: list[str] | None = None) -> int:
    return command.main(Config, execute, __doc__, "experiments.ablate_window", arguments)


if __name__ == "__main__":
    sys.exit(main())
