"""A cell of the window ablation: what is trained and scored for one window, mode and seed of the mini model."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dms_jax.config import Count, DMSConfig, Positive, Ratio, Seed, Share, Size, check, require
from dms_jax.files import write_atomically
from experiments import stats
from experiments.run import Run, open_run, read_config
from experiments.variants import batches

POOL = "pool.npz"
PADDED = 64  # lengths of training sequences are cut to a multiple of this


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


def finished(settings: Ablation, cell: Cell, out: Path) -> bool:
    return (out / cell.name / "results.json").exists() and read_config(out / cell.name) == json.loads(
        json.dumps(cell_identity(settings, cell))
    )
