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
from experiments import ablate_window, run, window_cells
from experiments.window_cells import Ablation, Cell


def test_cells_and_modes():
    cells = window_cells.grid(Ablation(windows=(0, 4), modes=("delayed", "immediate"), seeds=(1,)))
    assert cells == [Cell(4, "immediate", 1), Cell(4, "delayed", 1), Cell(0, "delayed", 1)], "window 0 is one model"
    assert [(c.dms.window, c.dms.decision_offset) for c in cells] == [(4, 4), (4, 0), (0, 0)]
    two = window_cells.grid(Ablation(windows=(0,), modes=("immediate",), seeds=(3, 5)))
    assert two == [Cell(0, "delayed", 5), Cell(0, "delayed", 3)]


def test_the_full_grid_is_in_the_config():
    settings = ablate_window.load_settings(ablate_window.Config())
    assert settings == Ablation()
    assert len(window_cells.grid(settings)) == 27 and settings.crs == (2, 4, 8)
    few = ablate_window.load_settings(ablate_window.Config(windows=(16,), crs=(3.0,), problems=5))
    assert (few.windows, few.crs, few.problems, few.batch_size) == ((16,), (3,), 5, settings.batch_size)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"windows": ()}, "windows=.*must not be empty"),
        ({"windows": (4, 4)}, "windows=.*occurs twice"),
        ({"windows": (-1,)}, "windows=.*from 0"),
        ({"seeds": (1, 1)}, "seeds=.*occurs twice"),
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


def test_ratios_that_no_step_reaches_are_refused_before_any_work(job, capsys):
    folder, _ = job("--crs", "2.25", status=2)
    assert "no whole step reaches it with steps_per_cr=2" in capsys.readouterr().err.replace("\n", " ")
    assert not list(folder.iterdir())


def test_the_ablation_from_end_to_end(job, monkeypatch, capsys):
    folder, results = job("--windows", "3", "--modes", "immediate", "--seeds", "1", "2")
    rows = [(r["window"], r["mode"], r["cr"]) for r in results["rows"]]
    assert rows == [(3, "immediate", 2), (3, "immediate", 3)]
    cells = [folder / f"w3-immediate-seed{seed}" for seed in (1, 2)]
    samples = [sample for cell in cells for sample in run.read_jsonl(cell / "samples.jsonl")]
    for row in results["rows"]:
        own = [s for s in samples if s["source"] == f"cr{row['cr']:g}"]
        assert 2 * row["problems"] == len(own) == 6 and [s["seed"] for s in row["by_seed"]] == [1, 2]
        assert row["accuracy"]["mean"] == pytest.approx(np.mean([s["correct"] for s in own]))
        assert row["achieved_cr"] == pytest.approx(np.mean([s["achieved_cr"] for s in own]))
        assert row["base_accuracy"] == results["base"]["accuracy"]
    steps = [json.loads(line)["step"] for line in (cells[0] / "log.jsonl").read_text().splitlines()]
    assert steps == [2 + 2 * 2], "2 shared steps, 2 for each unit of CR"
    members = [dms_jax.load(cell / "cr2", dtype="float32") for cell in cells]
    member = members[0]
    same = [np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(m.params) for m in members), strict=True)]
    assert not all(same), "each seed has training of its own"
    assert (member.dms.window, member.dms.decision_offset, member.cr) == (3, 3, 2)

    trained = []
    monkeypatch.setattr(window_cells, "train_cell", lambda *arguments, **options: trained.append(options))
    job("--windows", "1", "--modes", "delayed", "--seeds", "1", status=2)
    assert "w1-delayed-seed1/cr2: neither" in capsys.readouterr().err
    assert [sorted(options) for options in trained] == [["until"], ["on_member"]]
    trained.clear()
    _, again = job("--windows", "3", "--modes", "immediate", "--seeds", "1")
    assert again["rows"] == results["rows"], "finished cells are only read"
    assert [sorted(options) for options in trained] == [["until"]], "the shared start is looked at"
    job("--windows", "3", "--pool", "16", status=2)
    assert "pool was 8, is 16" in capsys.readouterr().err.replace("\n", " ")


def test_every_cell_begins_with_the_shared_start(job, tiny_family, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate_window, "run_cells", lambda *arguments: None)
    job("--seeds", "1")
    lm = tiny_family("mini")
    settings = ablate_window.load_settings(ablate_window.Config(crs=(2.0, 3.0), retire_steps=2, batch_size=2, pool=8))
    cell = Cell(3, "immediate", 1)
    config = window_cells.retrofit_config(settings, cell.dms, cell.seed)
    fresh, _ = initial_state(lm.params, lm.config, config, sharding.make_mesh(config.mesh))
    for _ in range(2):
        window_cells.begin_cell(settings, tmp_path / cell.start, tmp_path / "cell")

    def newest(name):
        with checkpoint.Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            return checkpoints.restore(fresh)

    shared, own = newest(cell.start), newest("cell")
    assert shared[0] == own[0] == 2 == int(own[1].step)
    jax.tree.map(np.testing.assert_array_equal, shared[1], own[1])
    moved = [bool(np.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (shared[1].params, lm.params)), strict=True)]
    assert any(moved), "the shared steps train"


def finished_cell(folder, window, mode, seed, right, **config):
    """Writes what a finished cell leaves, for CR 2; right: whether each problem was answered."""
    path = folder / Cell(window, mode, seed).name
    path.mkdir()
    run.write_json(path / "config.json", {"window": window, "mode": mode, "seed": seed, "crs": [2.0], **config})
    row = {"window": window, "mode": mode, "seed": seed, "cr": 2.0, "achieved_cr": 1.5 + seed, "accuracy": {}}
    run.write_json(path / "results.json", {"rows": [row]})
    lines = [json.dumps({"source": "cr2", "id": str(n), "correct": value}) for n, value in enumerate(right)]
    (path / "samples.jsonl").write_text("\n".join(lines) + "\n")


def test_a_row_is_the_mean_of_its_seeds_and_window_0_stands_for_both_modes(tmp_path):
    finished_cell(tmp_path, 0, "delayed", 1, [True, True, False, False])
    finished_cell(tmp_path, 0, "delayed", 2, [True, False, False, False])
    rows = list(ablate_window.merged(tmp_path, {"accuracy": {"mean": 0.5}}))
    assert [row["mode"] for row in rows] == ["delayed", "immediate"]
    for row in rows:
        assert row["accuracy"]["mean"] == 3 / 8 and row["achieved_cr"] == 3.0 and row["problems"] == 4
        assert [s["seed"] for s in row["by_seed"]] == [1, 2] and row["base_accuracy"] == {"mean": 0.5}


def test_nothing_to_run_is_no_mistake(tmp_path):
    ablate_window.run_cells(Ablation(), [], tmp_path, jobs=2)


def test_cells_made_with_other_settings_are_not_merged(tmp_path):
    finished_cell(tmp_path, 1, "delayed", 1, [True], pool=8)
    finished_cell(tmp_path, 4, "delayed", 1, [True], pool=9)
    with pytest.raises(run.RunError, match="w4-delayed-seed1: made with other settings"):
        list(ablate_window.merged(tmp_path, {"accuracy": {}}))
