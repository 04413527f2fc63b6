"""What ran on the GPUs while something was called, by the profiler's record."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax

Span = tuple[float, float]


class Event(NamedTuple):
    """A kernel or a copy; start, end: nanoseconds."""

    gpu: str
    name: str
    start: float
    end: float


def recorded(call: Callable[[], object]) -> list[Event]:
    """Everything that ran on a GPU until `call` returned; the call itself must wait for the GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        return [
            Event(plane.name, e.name, e.start_ns, e.start_ns + e.duration_ns)
            for plane in planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if "Stream" in line.name
            for e in line.events
        ]


def covered(spans: Iterable[Span]) -> float:
    """Nanoseconds in which at least one of the spans ran."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
