"""bench_retrofit's profile, on a made-up record of two GPUs."""

import pytest

from scripts.benchmarks import bench_retrofit
from scripts.benchmarks.device_events import Event, covered


def test_overlapping_spans_are_counted_once():
    assert covered([(5, 7), (0, 4), (1, 2), (3, 5.5)]) == 7
    assert covered([]) == 0


def test_the_profile_tells_hidden_collectives_from_lone_ones(monkeypatch):
    milli = 1e6
    first = [("matmul", 0, 10), ("ncclAllReduce", 8, 14), ("add", 16, 20), ("ncclAllReduce", 18, 20)]
    other = [("matmul", 0, 40)]
    events = [
        Event(f"/device:GPU:{gpu}", name, start * milli, end * milli)
        for gpu, part in ((1, other), (0, first))
        for name, start, end in part
    ]
    monkeypatch.setattr(bench_retrofit, "recorded", lambda call: events)
    profile = bench_retrofit.Training(None, None, {}, None).profile(count=2)
    assert profile == pytest.approx({"all": 10, "busy": 9, "collectives": 4, "collectives_alone": 2})
