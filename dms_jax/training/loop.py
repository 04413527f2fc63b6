"""The loop of a training run: batches, checkpoints, the log, and what to do when something goes wrong."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from dms_jax.training.checkpoint import Checkpoints
from dms_jax.training.data import Stream, prefetch
from dms_jax.types import State

FINITE = ("loss", "grad_norm")  # the loss is of the state before a step, the gradient made the one behind it


class Work(NamedTuple):
    """What a step does, for the speed in the log: tokens, model FLOPs, and the devices' FLOP/s (None: unknown)."""

    tokens: int
    flops: float
    peak: float | None


class Taken(NamedTuple):
    """A step that was started: its batch on the host, the cursor behind it, and its metrics."""

    step: int
    batch: Any
    cursor: Any
    metrics: dict


def _unchanged(step: int, state: State) -> State:
    return state


def _as_it_is(batch):
    return batch


def fit(
    step_fn: Callable[[int, State, Any], tuple[State, dict]],
    state: State,
    stream: Stream,
    steps: int,
    folder: Path,
    save_every: int = 200,
    log_every: int = 10,
    always: tuple[int, ...] = (),
    on_step: Callable[[int, State], State] = _unchanged,
    put: Callable[[Any], Any] = _as_it_is,
    work: Work | None = None,
    watchers: Iterable[Callable[[dict], None]] = (),
) -> State:
    """Runs `step_fn(step, state, batch)` up to step `steps`, from the newest whole checkpoint in `folder`.

    Metrics are looked at a step late, so that the device never waits for the host. The state is saved every
    `save_every` steps, at the steps `always` (which are kept) and at the end, in the background, and only once the
    loss and the gradient that made it were seen to be finite. A line of the log is written every `log_every` steps.

    Args:
      on_step: called before each step, and at the end; may change the state (to snapshot or reset something).
      put: brings a batch to the devices.
      work: what a step does; then the log says tokens a second and model FLOPs utilisation.
      watchers: called with each line of the log.
    Raises:
      FloatingPointError: the loss or the gradient is not finite. Nothing is saved, and the batch is left in `folder`.
      SystemExit: code 0, after SIGTERM and a checkpoint.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder / "checkpoints", always=always)
    with checkpoints, _terminated() as terminated, contextlib.ExitStack() as stack:
        start, state, cursor = checkpoints.restore(state)
        batches = ((batch, put(batch), after) for batch, after in stream(cursor))
        batches = stack.enter_context(contextlib.closing(prefetch(batches)))
        log = stack.enter_context(Log(folder / "log.jsonl", start, steps, work, watchers))
        last = None
        for step in range(start, steps):
            state = on_step(step, state)
            batch, on_device, cursor = next(batches)
            state, metrics = step_fn(step, state, on_device)
            last = _seen(last, folder, checkpoints)
            last = Taken(step, batch, cursor, metrics)
            ends = step + 1 == steps or terminated(step)
            if (step + 1) % log_every == 0 or ends:
                last = log.write(_seen(last, folder, checkpoints))
            if (step + 1) % save_every == 0 or step + 1 in always or ends:
                _seen(last, folder, checkpoints)
                checkpoints.save(step + 1, state, cursor)
            log.bar.update()
            if ends and step + 1 < steps:
                checkpoints.wait()
                print(f"terminated at step {step + 1}, which is saved: the same command goes on", file=sys.stderr)
                raise SystemExit(0)
        return on_step(steps, state)


def _seen(taken: Taken | None, folder: Path, checkpoints: Checkpoints) -> Taken | None:
    """The step, once it is known that its loss and gradient are finite."""
    if taken is None:
        return None
    for name in FINITE:
        value = float(taken.metrics[name])
        if not np.isfinite(value):
            checkpoints.wait()
            file = folder / f"batch_of_step_{taken.step}.npz"
            if jax.process_index() == 0 and hasattr(taken.batch, "_asdict"):
                np.savez_compressed(file, cursor=json.dumps(taken.cursor), **taken.batch._asdict())
            raise FloatingPointError(
                f"{name}={value} at step {taken.step}; its batch is in {file}, the data behind it starts at "
                f"{taken.cursor}; last good checkpoint: {checkpoints.good}"
            )
    return taken


@contextlib.contextmanager
def _terminated() -> Iterator[Callable[[int], bool]]:
    """A function that says whether SIGTERM came; processes of one run agree on the step."""
    if jax.process_count() > 1:  # jax's coordination service has the signal
        from jax.experimental import multihost_utils

        yield multihost_utils.reached_preemption_sync_point
        return
    came = []
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    except ValueError:  # not in the main thread, which alone may handle signals
        yield lambda step: False
        return
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


class Log:
    """log.jsonl and the progress bar; of several processes the first alone writes. A context manager."""

    def __init__(self, path: Path, start: int, steps: int, work: Work | None, watchers):
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

    def write(self, taken: Taken) -> Taken:
        """A line for a step: its metrics, and the speed since the line before."""
        metrics = jax.tree.map(lambda x: np.asarray(x).tolist(), taken.metrics)
        line = {"step": taken.step + 1, **metrics, **self._speed(taken.step + 1)}
        if self.first:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            for watch in self.watchers:
                watch(line)
        shown = ("loss", "kl", "target_cr", "achieved_cr", "tokens_per_second", "mfu")
        self.bar.set_postfix({k: f"{line[k]:.4g}" for k in shown if k in line})
        return taken

    def _speed(self, step: int) -> dict[str, float]:
        now, mark = time.perf_counter(), self.mark
        self.mark = (step, now)
        if mark is None or self.work is None:
            return {}
        rate = (step - mark[0]) / (now - mark[1])
        speed = {"tokens_per_second": rate * self.work.tokens, "tflops": rate * self.work.flops / 1e12}
        return speed | ({"mfu": rate * self.work.flops / self.work.peak} if self.work.peak else {})


SPEED = ("tokens_per_second", "tflops", "mfu")  # what differs between two runs of the same


def _drop_lines_after(path: Path, step: int) -> None:
    """Forgets log lines of steps that will be run again, and a last line that was cut off."""
    if not path.exists():
        return
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    new = path.with_suffix(".new")
    new.write_text("".join(kept))
    new.replace(path)


def _whole_lines(path: Path) -> Iterable[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
