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
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from rich.console import Console

from dms_jax.config import require
from dms_jax.config_files import load_yaml
from experiments import command, report, stats
from experiments.command import metavar
from experiments.run import RunError, environment, read_config, read_json, read_jsonl, write_json
from experiments.window_cells import Ablation, Cell, finished, grid, prepare, retrofit_config, run_cell
from paper_figures.rows import percent

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "ablate_window.yaml"
POLL = 2.0  # seconds between two looks at the cells that run
CAPTION = (
    f"Accuracy of one sampled chain a problem, mean of the seeds (each a retrofit of its own), with its 95% interval "
    f"({stats.METHOD}). Achieved CR: tokens seen over tokens live at the end of a chain, the window included."
)


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
    retrofit_config(settings, cells[0].dms, cells[0].seed)  # refuses ratios that no step reaches, before all the work
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
