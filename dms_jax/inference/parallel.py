"""Several engines at the same time, each in a thread of its own: on different devices, or sharing a CPU."""

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from dms_jax.inference.engine import Engine
from dms_jax.inference.scheduler import Job, Result


def run_together(
    work: Sequence[tuple[Engine, Sequence[Job]]], workers: int | None = None
) -> Iterator[tuple[int, Result]]:
    """Results of all engines as they come, each with the number of its engine.

    Args:
      work: an engine and its jobs; those named first start first.
      workers: engines at the same time; None for all.
    An exception of one engine, or a caller that stops early, stops the others at their next chunk; what was made by
    then comes before the exception.
    """
    if len(work) == 1 or workers == 1:
        for n, (engine, jobs) in enumerate(work):
            yield from ((n, result) for result in engine.run(jobs))
        return
    results: queue.Queue = queue.Queue()
    stop = threading.Event()

    def drain(n: int, engine: Engine, jobs: Sequence[Job]) -> None:
        try:
            for result in () if stop.is_set() else engine.run(jobs, stop):
                results.put((n, result))
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(workers or len(work)) as executor:
        futures = [executor.submit(drain, n, engine, jobs) for n, (engine, jobs) in enumerate(work)]
        try:
            while not (all(future.done() for future in futures) and results.empty()):
                try:
                    yield results.get(timeout=0.05)
                except queue.Empty:
                    continue
            for future in futures:
                future.result()
        finally:
            stop.set()
            for future in futures:
                future.cancel()
