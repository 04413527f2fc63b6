"""Several engines at the same time: an error of one loses nothing that was made before it."""

import threading
import time

import numpy as np
import pytest

from dms_jax.inference.engine import Engine
from dms_jax.inference.parallel import run_together
from dms_jax.inference.scheduler import Job


class Failed(Exception):
    pass


class Stand(Engine):
    """Stands where an engine is expected; a result for each job, whose name may be an error."""

    def __init__(self):
        self.begun, self.failed = False, threading.Event()

    def run(self, jobs, stop=None):
        self.begun = True
        for job in jobs:
            if job.name == "fail":
                self.failed.set()
                raise Failed
            yield job


def jobs(*names):
    return [Job([1], np.zeros((1, 2), np.uint32), 1, name) for name in names]


def test_an_error_comes_after_what_was_made_before_it():
    """The caller is slow; an engine that waits for a worker until then never begins."""
    first, last, got = Stand(), Stand(), []
    busy = Stand()
    busy.run = lambda jobs, stop: (stop.wait(10), iter(()))[1]
    with pytest.raises(Failed):
        for n, result in run_together([(first, jobs(1, 2, 3, "fail")), (busy, []), (last, jobs(4))], workers=2):
            got.append((n, result.name))
            assert first.failed.wait(10)
            time.sleep(0.05)
    assert got == [(0, 1), (0, 2), (0, 3)] and not last.begun
