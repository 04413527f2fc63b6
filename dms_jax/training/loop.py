"""The loop of a training run: batches, checkpoints, the log, and what happens when something goes wrong."""

import contextlib
import functools
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dms_jax.config import ConfigError
from dms_jax.files import write_atomically
from dms_jax.training.checkpoint import Checkpoints
from dms_jax.training.data import Stream, prefetch
from dms_jax.training.log import Log, Watcher, Work
from dms_jax.types import State

FINITE = ("loss", "grad_norm")  # the loss is of the state before a step, the gradient made the one behind it


class Taken(NamedTuple):
    """A step that was started: its batch on the host, the cursor behind it, and its metrics."""

    step: int
    batch: Any
    cursor: Any
    metrics: dict[str, Any]


def unchanged(step: int, state: State) -> State:
    return state


def on_host(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class Loop:
    """How a training run goes on, in a folder with its checkpoints and its log.

    steps: the step to stop at.
    save_every, log_every: steps between checkpoints and between lines of the log.
    keep: steps of which a checkpoint is saved and kept; of the others the newest two are.
    work: what a step does; then the log says tokens a second and model FLOPs utilisation.
    watchers: called with each line of the log.
    """

    folder: Path
    steps: int
    save_every: int = 200
    log_every: int = 10
    keep: tuple[int, ...] = ()
    work: Work | None = None
    watchers: tuple[Watcher, ...] = ()

    def run(
        self,
        step_fn: Callable[[int, State, Any], tuple[State, dict[str, Any]]],
        state: State,
        stream: Stream,
        before_step: Callable[[int, State], State] = unchanged,
        put: Callable[[Any], Any] = on_host,
    ) -> State:
        """Runs `step_fn(step, state, batch)` from the newest whole checkpoint in the folder; returns the last state.

        Metrics are looked at a step late, so that the device never waits for the host. States are saved in the
        background, the last one too, and only once the loss and the gradient that made them were seen to be finite.

        Args:
          before_step: called before each step, and at the end; may change the state (to snapshot or reset something).
          put: brings a batch to the devices.
        Raises:
          ConfigError: data that cannot be read. The state before it is saved.
          FloatingPointError: the loss or the gradient is not finite. Nothing is saved, and the batch is left in the
            folder.
          SystemExit: code 0, after SIGTERM and a checkpoint.
          KeyboardInterrupt: after Ctrl-C, at the end of the step; a second one ends it at once.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(self.folder / "checkpoints", always=self.keep)
        with checkpoints, _terminated() as terminated, contextlib.ExitStack() as stack:
            start, state, cursor = checkpoints.restore(state)
            batches = prefetch((batch, put(batch), after) for batch, after in stream(cursor))
            stack.enter_context(contextlib.closing(batches))
            log = Log(self.folder / "log.jsonl", start, self.steps, self.work, self.watchers)
            stack.enter_context(log)
            last, saved = None, start
            for step in range(start, self.steps):
                state = before_step(step, state)
                try:
                    batch, on_device, cursor = next(batches)
                except ConfigError:  # on every process, as all read the same rows
                    if step > saved:
                        self._check_finite(last, checkpoints)
                        checkpoints.save(step, state, cursor)
                    raise
                state, metrics = step_fn(step, state, on_device)
                self._check_finite(last, checkpoints)
                last = Taken(step, batch, cursor, metrics)
                done, ends = step + 1, step + 1 == self.steps or terminated(step)
                logs, saves = ends or done % self.log_every == 0, ends or done % self.save_every == 0
                if logs or saves or done in self.keep:
                    self._check_finite(last, checkpoints)
                if logs:
                    log.write(done, metrics)
                if saves or done in self.keep:
                    checkpoints.save(done, state, cursor)
                    saved = done
                log.bar.update()
                if ends and done < self.steps:
                    checkpoints.wait()
                    print(f"terminated at step {done}, which is saved: the same command goes on", file=sys.stderr)
                    raise SystemExit(0)
            return before_step(self.steps, state)

    def _check_finite(self, taken: Taken | None, checkpoints: Checkpoints) -> None:
        """Raises FloatingPointError where a step's loss or gradient is not finite."""
        if taken is None:
            return
        for name in FINITE:
            value = float(taken.metrics[name])
            if np.isfinite(value):
                continue
            checkpoints.wait()
            file = self.folder / f"batch_of_step_{taken.step}.npz"
            if jax.process_index() == 0 and hasattr(taken.batch, "_asdict"):
                arrays = {"cursor": json.dumps(taken.cursor), **taken.batch._asdict()}
                write_atomically(file, functools.partial(np.savez_compressed, **arrays))
            raise FloatingPointError(
                f"{name}={value} at step {taken.step}; its batch is in {file}, the data behind it starts at "
                f"{taken.cursor}; last good checkpoint: {checkpoints.good}"
            )


@contextlib.contextmanager
def _terminated() -> Iterator[Callable[[int], bool]]:
    """A function that says whether SIGTERM came, and raises KeyboardInterrupt after a Ctrl-C.

    Raised where it comes, inside a library's callback, Python would drop it; a second Ctrl-C is. Processes of one run
    agree on the step.
    """
    if jax.process_count() > 1:  # jax's coordination service has the signal
        from jax.experimental import multihost_utils

        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield lambda step: False
        return
    came: set[int] = set()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, _) -> None:
        came.add(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    def terminated(step: int) -> bool:
        if signal.SIGINT in came:
            raise KeyboardInterrupt
        return signal.SIGTERM in came

    for number in before:
        signal.signal(number, note)
    try:
        yield terminated
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
