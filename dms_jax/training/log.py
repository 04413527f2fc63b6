"""The log of a training run: a line of log.jsonl every few steps, a progress bar, and what watches the lines."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from dms_jax.config import require
from dms_jax.files import write_atomically

Watcher = Callable[[dict[str, Any]], None]


class Work(NamedTuple):
    """What a step does, for the speed in the log: tokens, model FLOPs, and the devices' FLOP/s (None: unknown)."""

    tokens: int
    flops: float
    peak: float | None

    def speed(self, steps_per_second: float) -> dict[str, float]:
        """Tokens and model FLOPs a second, and the share of the peak (model FLOPs utilisation)."""
        rate = steps_per_second * self.flops
        speed = {"tokens_per_second": steps_per_second * self.tokens, "tflops": rate / 1e12}
        return speed | ({"mfu": rate / self.peak} if self.peak else {})


def read_log(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of a log, and the numbers (from 1) of those that are damaged: cut off, or no JSON with a step."""
    lines, damaged = [], []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            value = json.loads(line)
            whole = line.endswith(b"\n") and isinstance(value["step"], int)
        except (ValueError, TypeError, KeyError, RecursionError):
            whole = False
        if whole:
            lines.append(value)
        else:
            damaged.append(number)
    return lines, damaged


def _drop_lines_after(path: Path, step: int) -> None:
    """Removes the lines of steps that will be run again, and damaged ones; says which."""
    if not path.exists():
        return
    require(path.is_file(), "log", str(path), "is no regular file")
    lines, damaged = read_log(path)
    kept = [line for line in lines if line["step"] <= step]
    dropped = [f"damaged line {number}" for number in damaged]
    if len(kept) < len(lines):
        dropped.append(f"{len(lines) - len(kept)} lines of steps after {step}, which run again")
    if dropped:
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        print(f"{path}: dropped {'; '.join(dropped)}", file=sys.stderr)


class Log:
    """log.jsonl and the progress bar of a run that goes on at step `start`; a context manager.

    Of several processes the first alone writes.
    """

    def __init__(self, path: Path, start: int, steps: int, work: Work | None, watchers: Iterable[Watcher]):
        self.path, self.start, self.steps, self.work, self.watchers = path, start, steps, work, tuple(watchers)
        self.first = jax.process_index() == 0
        self.mark: tuple[int, float] | None = None  # step and time of the last line; the first waits for compilation

    def __enter__(self):
        if self.first:
            _drop_lines_after(self.path, self.start)
            self.file = self.path.open("a")
        self.bar = tqdm(total=self.steps, initial=self.start, unit="step", disable=not self.first)
        return self

    def __exit__(self, *_):
        self.bar.close()
        if self.first:
            self.file.close()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """A line for a step that is done: its metrics, and the speed since the line before."""
        line = {"step": step, **jax.tree.map(lambda x: np.asarray(x).tolist(), metrics)}
        now = time.perf_counter()
        if self.mark is not None and self.work is not None:
            line |= self.work.speed((step - self.mark[0]) / (now - self.mark[1]))
        self.mark = (step, now)
        if self.first:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            for watch in self.watchers:
                watch(line)
        shown = ("loss", "kl", "target_cr", "achieved_cr", "tokens_per_second", "mfu")
        self.bar.set_postfix({key: f"{line[key]:.4g}" for key in shown if key in line})
