"""The window ablation, run whole on a tiny model: its cells, what they share, and what a second start repeats."""

import json

import jax
import numpy as np
import pytest

import dms_jax
from dms_jax import sharding
from dms_jax.config import ConfigError
from dms_jax.training import checkpoint
from dms_jax.training.step import initial_state
from experiments import ablate_window, run
from experiments.ablate_window import Ablation, Cell


def test_cells_and_modes():
    cells = ablate_window.grid(Ablation(windows=(0, 4), modes=("delayed", "immediate")))
    assert cells == [Cell(4, "immediate"), Cell(4, "delayed"), Cell(0, "delayed")], "window 0 is one model"
    assert [(c.dms.window, c.dms.decision_offset) for c in cells] == [(4, 4), (4, 0), (0, 0)]
    assert ablate_window.grid(Ablation(windows=(0,), modes=("immediate",))) == [Cell(0, "delayed")]


def test_the_full_grid_is_in_the_config():
    settings = ablate_window.load_settings(ablate_window.Config())
    assert settings == Ablation()
    assert len(ablate_window.grid(settings)) == 9 and settings.crs == (2, 4, 8)
    few = ablate_window.load_settings(ablate_window.Config(windows=(16,), crs=(3.0,), problems=5))
    assert (few.windows, few.crs, few.problems, few.batch_size) == ((16,), (3,), 5, settings.batch_size)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"windows": ()}, "windows=.*must not be empty"),
        ({"windows": (4, 4)}, "windows=.*occurs twice"),
        ({"windows": (-1,)}, "windows=.*from 0"),
        ({"crs": (1.0,)}, "crs=.*above 1"),
        ({"problems": 0}, "problems=0"),
        ({"pool": 3}, "pool=3: is less than batch_size=128"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        Ablation(**changes)


TINY = ["--crs", "2", "3", "--retire-steps", "2", "--steps-per-cr", "2", "--batch-size", "2", "--pool", "8"]
TINY += ["--problems", "3", "--max-length", "12"]


@pytest.fixture
def job(tiny_family, tmp_path, monkeypatch):
    """Runs the ablation of the tiny model in one folder; returns it and its results."""
    load = dms_jax.load
    mini = lambda source, **options: tiny_family(source) if source == "mini" else load(source, **options)  # noqa: E731
    monkeypatch.setattr(dms_jax, "load", mini, raising=False)

    def start(*arguments, status=0):
        assert ablate_window.main(["--out", str(tmp_path), *TINY, *arguments]) == status
        results = tmp_path / "results.json"
        return tmp_path, json.loads(results.read_text()) if results.exists() else None

    return start


def test_the_ablation_from_end_to_end(job, monkeypatch, capsys):
    folder, results = job("--windows", "3", "--modes", "immediate")
    rows = [(r["window"], r["mode"], r["cr"]) for r in results["rows"]]
    assert rows == [(3, "immediate", 2), (3, "immediate", 3)]
    samples = run.read_jsonl(folder / "w3-immediate" / "samples.jsonl")
    for row in results["rows"]:
        own = [s for s in samples if s["source"] == f"cr{row['cr']:g}"]
        assert row["problems"] == len(own) == 3
        assert row["accuracy"]["mean"] == np.mean([s["correct"] for s in own])
        assert row["achieved_cr"] == pytest.approx(np.mean([s["achieved_cr"] for s in own]))
        assert row["base_accuracy"] == results["base"]["accuracy"]
    steps = [json.loads(line)["step"] for line in (folder / "w3-immediate" / "log.jsonl").read_text().splitlines()]
    assert steps == [2 + 2 * 2], "2 shared steps, 2 for each unit of CR"
    member = dms_jax.load(folder / "w3-immediate" / "cr2", dtype="float32")
    assert (member.dms.window, member.dms.decision_offset, member.cr) == (3, 3, 2)

    trained = []
    monkeypatch.setattr(ablate_window, "train_cell", lambda *arguments, **options: trained.append(options))
    job("--windows", "1", "--modes", "delayed", status=2)
    assert "w1-delayed/cr2: neither" in capsys.readouterr().err
    assert [sorted(options) for options in trained] == [["until"], ["on_member"]]
    trained.clear()
    _, again = job("--windows", "3", "--modes", "immediate")
    assert again["rows"] == results["rows"], "finished cells are only read"
    assert [sorted(options) for options in trained] == [["until"]], "the shared start is looked at"
    job("--windows", "3", "--pool", "16", status=2)
    assert "pool was 8, is 16" in capsys.readouterr().err.replace("\n", " ")


def test_every_cell_begins_with_the_shared_start(job, tiny_family, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate_window, "run_cells", lambda *arguments: None)
    job()
    lm = tiny_family("mini")
    settings = ablate_window.load_settings(ablate_window.Config(crs=(2.0, 3.0), retire_steps=2, batch_size=2, pool=8))
    cell = Cell(3, "immediate")
    config = ablate_window.retrofit_config(settings, cell.dms)
    fresh, _ = initial_state(lm.params, lm.config, config, sharding.make_mesh(config.mesh))
    for _ in range(2):
        ablate_window.begin_cell(settings, tmp_path / "start", tmp_path / "cell")

    def newest(name):
        with checkpoint.Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            return checkpoints.restore(fresh)

    shared, own = newest("start"), newest("cell")
    assert shared[0] == own[0] == 2 == int(own[1].step)
    jax.tree.map(np.testing.assert_array_equal, shared[1], own[1])
    moved = [bool(np.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (shared[1].params, lm.params)), strict=True)]
    assert any(moved), "the shared steps train"


def test_window_0_stands_for_both_modes(tmp_path):
    (tmp_path / "w0-delayed").mkdir()
    run.write_json(tmp_path / "w0-delayed" / "config.json", {"window": 0, "mode": "delayed", "crs": [2.0]})
    run.write_json(tmp_path / "w0-delayed" / "results.json", {"rows": [{"window": 0, "mode": "delayed", "cr": 2.0}]})
    rows = list(ablate_window.merged(tmp_path, {"accuracy": {"mean": 0.5}}))
    assert [row["mode"] for row in rows] == ["delayed", "immediate"] and rows[0]["base_accuracy"] == {"mean": 0.5}


def test_nothing_to_run_is_no_mistake(tmp_path):
    ablate_window.run_cells(Ablation(), [], tmp_path, jobs=2)


def test_cells_made_with_other_settings_are_not_merged(tmp_path):
    row = {"window": 4, "mode": "delayed", "cr": 2.0}
    for name, pool in (("w1-delayed", 8), ("w4-delayed", 9)):
        (tmp_path / name).mkdir()
        run.write_json(tmp_path / name / "config.json", {"pool": pool, "window": 4, "mode": "delayed", "crs": [2.0]})
        run.write_json(tmp_path / name / "results.json", {"rows": [row]})
    with pytest.raises(run.RunError, match="w4-delayed: made with other settings"):
        list(ablate_window.merged(tmp_path, {"accuracy": {}}))
