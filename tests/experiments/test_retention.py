"""Retention: what is counted as live is what masked storage still holds at the end."""

import json

import numpy as np
import pytest

import dms_jax
from experiments import retention
from experiments.fidelity import Window
from experiments.forced import forced_logits
from experiments.variants import Loaded, Variant


@pytest.fixture
def loaded(tiny_family):
    lm = tiny_family("mini", cr=4)
    return Loaded(Variant("dms", 4.0), lm, lm.dms)


def test_live_tokens_are_those_that_decoding_counts(loaded):
    """Windows of unequal length: shares against the live tokens that forced decoding reports at each end."""
    tokens = np.random.default_rng(1).integers(4, 59, (3, 40)).astype(np.int32)
    lengths = np.array([40, 25, 33])
    windows = [Window(tuple(row[:n]), 9) for row, n in zip(tokens, lengths, strict=True)]
    measured = retention.measure(loaded, windows, batch_size=2, bins=4)
    padded = np.pad(tokens, ((0, 0), (0, 1)))  # one token more, whose prediction comes after the last real one
    live = np.concatenate([f.live for f in forced_logits(loaded, padded, np.full(3, 9, np.int32), chunk=8)])
    at_end = live[lengths - 9, np.arange(3)]
    assert 0 < at_end.sum() < lengths.sum(), "both kinds of decision"
    (share,), (by_position,) = measured["by_layer_head"], measured["by_position"]["live_share"]
    assert share[0] == pytest.approx(at_end.sum() / lengths.sum())
    assert measured["achieved_cr"] == pytest.approx(lengths.sum() / at_end.sum())
    assert measured["by_position"]["edges"] == [0, 10, 20, 30, 40]
    counts = [30, 30, 5 + 20, 10 + 3]
    assert np.dot(by_position, counts) == pytest.approx(at_end.sum())
    alone = retention.measure(loaded, windows[:1], batch_size=1, bins=8)["by_position"]["live_share"][0]
    assert alone[-1] == 1, "the last 5 tokens of 40 lie inside the window of 4"


def test_the_job(tiny_family, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dms_jax, "load", tiny_family, raising=False)
    assert retention.main(["--limit", "3", "--batch-size", "2", "--run-dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["policy"] == "dms" and results["cr"] == 4 and results["problems"] == 3
    assert "layer   0" in capsys.readouterr().out
    for arguments, message in (
        (["--bins", "9999"], "bins=9999: more than the"),
        (["--model", "real"], "data=None: is needed"),
        (["--budget", "4"], "budget=(4,): only training-free"),
    ):
        assert retention.main([*arguments, "--runs", str(tmp_path / "runs")]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "runs").exists()
