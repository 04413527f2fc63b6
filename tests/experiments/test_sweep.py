"""The sweep: its plan, a small one run whole on a tiny model, and parts of it put together."""

import json

import pytest

import dms_jax
from dms_jax.config import ConfigError
from experiments import aime, run, sweep

PLAN = """
policies: [full, dms, tova, quest]
max_lengths: [40]
chains: [1, 3]
dms_crs: [4.0]
budget_crs: [2.0]
page_size: 8
problems: 3
"""


@pytest.fixture
def job(tiny_family, tmp_path, monkeypatch):
    """Runs a sweep in a folder of its own; returns that folder, its samples in order and its results."""
    monkeypatch.setattr(dms_jax, "load", tiny_family, raising=False)
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN)

    def start(name, *arguments, status=0):
        folder = tmp_path / name
        common = ["--sweep", "--plan", str(plan), "--run-dir", str(folder), "--batch-size", "4"]
        assert aime.main([*common, *arguments]) == status
        samples = run.read_jsonl(folder / "samples.jsonl") if folder.exists() else []
        results = folder / "results.json"
        found = json.loads(results.read_text()) if results.exists() else None
        return folder, sorted(samples, key=lambda s: (s["source"], s["id"], s["chain"])), found

    return start


def test_parts_of_a_sweep_are_one_sweep(job, capsys):
    folder, whole, results = job("whole", "--workers", "2")
    rows = [(row["policy"], row["cr"], row["chains"], row["max_length"], row["config"]) for row in results["rows"]]
    assert rows == [
        (policy, cr, w, 40, f"0.039-{w}-{cr:g}")
        for policy, cr in (("full", 1), ("dms", 4), ("tova", 2), ("quest", 2))
        for w in (1, 3)
    ]
    assert all(row["problems"] == 3 for row in results["rows"]) and len(whole) == 4 * 3 * 3
    for s in whole:
        steps = s["tokens"] - 1
        if s["policy"] == "tova":  # half of 40 tokens; every prompt is longer
            assert s["prompt_tokens"] > 20 and s["kv_reads"] == 20 * steps
            assert s["achieved_cr"] == (s["prompt_tokens"] + steps) / 20
        if s["policy"] == "quest":  # everything is held; two pages of 8 are read, the newest not full, and summaries
            assert s["achieved_cr"] == 1 and 9 * steps < s["kv_reads"] <= (16 + -(-s["prompt_tokens"] // 8) + 5) * steps
    for name in ("pareto_fronts", "accuracy_vs_cr", "achieved_cr"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder.parent) not in json.dumps(results["config"])

    job("a", "--policies", "full", "dms", "--workers", "1")
    job("b", "--policies", "tova")
    parts = ["--merge", str(folder.with_name("a")), str(folder.with_name("b"))]
    capsys.readouterr()
    _, merged, again = job("all", *parts)
    assert "merged 27 chains of 2 runs" in capsys.readouterr().out, "Quest's are sampled"
    assert merged == whole and again["rows"] == results["rows"]
    other = job("other", *parts, "--seed", "1", status=2)
    assert not other[1] and "a: holds a run that differs in seed" in capsys.readouterr().err.replace("\n", "")
    plan = folder.with_name("plan.yaml")
    plan.write_text(PLAN + "evict_every: 4\n")
    other = job("slower", *parts, status=2)
    assert not other[1] and "a: holds a run that differs in evict_every" in capsys.readouterr().err.replace("\n", "")
    run.write_json(folder.with_name("a") / "config.json", {"model": "mini"})
    job("none", *parts, status=2)
    assert "a: holds a run that differs in " in capsys.readouterr().err


def test_the_shipped_plan():
    plan = sweep.read(sweep.PLAN)
    made = list(sweep.entries(plan))
    assert len(made) == len({entry.source for entry in made}) == 1 + 3 + 6 * 6
    budgets = {entry.cr: entry.budget for entry in made if entry.policy == "quest"}
    assert budgets == {1.1: 408, 1.25: 359, 1.5: 299, 2: 224, 4: 112, 8: 56}
    assert {entry.budget for entry in made if entry.policy in ("full", "dms")} == {None}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"policies": ("full", "best")}, "policies='best'"),
        ({"policies": ()}, r"policies=\(\): must not be empty"),
        ({"chains": (1, 1)}, "a value occurs twice"),
        ({"dms_crs": (1.0,)}, "must be above 1"),
        ({"problems": 0}, "problems=0: must be positive"),
    ],
)
def test_impossible_plans(change, message):
    plan = {"policies": ("full",), "max_lengths": (40,), "chains": (1,), "dms_crs": (), "budget_crs": ()}
    with pytest.raises(ConfigError, match=message):
        sweep.Sweep(**{**plan, **change})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sweep", "--chains", "4"], "chains=(4,): a sweep takes it from --plan"),
        (["--sweep", "--policies", "best"], "policies='best'"),
        (["--sweep", "--plan", "none.yaml"], "none.yaml': no such file"),
        (["--policies", "tova"], "is an option of --sweep"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, capsys, arguments, message):
    assert aime.main(["--runs", str(tmp_path / "runs"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error.replace("\n", " ")
