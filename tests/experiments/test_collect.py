"""Runs collected into one table: rows over common problems, gains paired with the first row, and what is refused."""

import json

import pytest

from experiments import collect, run, stats

CONFIG = {"problems": "abc", "seed": 0, "temperature": 0.6, "top_p": 0.95, "stop": [], "gate": None}
COUNTS = ("kv_reads", "prefill_reads", "peak_tokens", "tokens", "achieved_cr", "finished")


def finished_run(folder, source, answers, chains=(1,), metric="vote", **changes):
    """A finished run of one model; answers: problem -> whether each of its chains is right."""
    folder.mkdir()
    config = {**CONFIG, "chains": list(chains), "max_length": 64, **changes}
    samples = [
        {
            **{"source": source, "id": p, "chain": n, "answer": str(right), "correct": right, "policy": "full"},
            **{"config": f"1-{max(chains)}-1", **dict.fromkeys(COUNTS, 1.0)},
        }
        for p, verdicts in answers.items()
        for n, right in enumerate(verdicts)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    run.write_json(folder / "config.json", config)
    run.write_json(folder / "metadata.json", [{"command": "x"}])
    cells = [stats.Cell(f"1-{w}-1", source, "full", 1.0, w, 64) for w in chains]
    about = dict.fromkeys(("experiment", "task", "form", "interval", "caption", "command", "environment"), "x")
    run.write_json(folder / "results.json", {**about, "seed": 0, "rows": stats.table(samples, cells, metric)})
    return folder


def test_rows_are_over_the_common_problems_and_gains_are_paired(tmp_path):
    one = finished_run(
        tmp_path / "one", "base/full", {"1": [True, False], "2": [False, False], "3": [True, True]}, (1, 2)
    )
    two = finished_run(tmp_path / "two", "base/full", {"1": [True], "2": [True]}, gate="g", protect_prompt=True)
    assert collect.main((one, two), tmp_path / "all.json") == 0
    outcome = json.loads((tmp_path / "all.json").read_text())
    assert outcome["problems"] == 2 and [row["run"] for row in outcome["rows"]] == ["one", "one", "two"]
    assert {row["source"] for row in outcome["rows"]} == {"base/full"}
    assert [row["accuracy"]["mean"] for row in outcome["rows"]] == [0.5, 0.5, 1.0]
    assert [row["gain"]["mean"] for row in outcome["rows"]] == [0.0, 0.0, 0.5]
    assert outcome["runs"]["two"]["gate"] == "g" and outcome["runs"]["two"]["protect_prompt"] is True


def test_fewer_chains_vote_where_a_run_has_more(tmp_path):
    """Of a run with rows for 1 and 4 chains, 3 chains are the first three; a run of one chain gets no row."""
    many = finished_run(tmp_path / "many", "base/full", {"1": [False, True, True, False]}, (1, 4))
    one = finished_run(tmp_path / "one", "base/full", {"1": [True]})
    assert collect.main((many, one), tmp_path / "all.json", chains=(3, 4, 8)) == 0
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert [(row["run"], row["config"], row["chains"]) for row in rows] == [
        ("many", "1-1-1", 1),
        ("many", "1-3-1", 3),
        ("many", "1-4-1", 4),
        ("one", "1-1-1", 1),
    ]
    assert [row["accuracy"]["mean"] for row in rows] == [0, 1, 0, 1] and rows[1]["kv_reads"] == 3


def test_programs_keep_pass_at_k(tmp_path):
    one = finished_run(tmp_path / "one", "base/full", {"1": [True, False]}, (2,), "pass")
    assert collect.main((one, one), tmp_path / "all.json") == 0
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert [row["pass_at"]["1"]["mean"] for row in rows] == [0.5, 0.5]


@pytest.mark.parametrize(
    "changes, message",
    [({"problems": "other"}, "problems: not as in"), ({"temperature": 1.0}, "temperature: not as in")],
)
def test_other_problems_or_other_sampling_are_refused(tmp_path, capsys, changes, message):
    runs = (
        finished_run(tmp_path / "one", "a", {"1": [True]}),
        finished_run(tmp_path / "b", "a", {"1": [True]}, **changes),
    )
    assert collect.main(runs, tmp_path / "all.json") == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "all.json").exists()


def test_unfinished_runs_are_named(tmp_path, capsys):
    folder = finished_run(tmp_path / "one", "a", {"1": [True]})
    (folder / "results.json").unlink()
    assert collect.main((folder,), tmp_path / "all.json") == 2
    assert "one: this run is not finished" in capsys.readouterr().err
    assert collect.main((tmp_path / "none",), tmp_path / "all.json") == 2
    assert "none: not a run folder" in capsys.readouterr().err
    run.write_json(folder / "config.json", {"model": "mini"})
    assert collect.main((folder,), tmp_path / "all.json") == 2
    assert "one: holds no chains of a task's problems" in capsys.readouterr().err


def test_a_finished_run_that_was_continued_and_interrupted_is_refused(tmp_path, capsys):
    """Of the problems that are there beyond its table, those with short chains ended first."""
    folder = finished_run(tmp_path / "one", "a", {"1": [True], "2": [True]})
    results = json.loads((folder / "results.json").read_text())
    run.write_json(folder / "results.json", {**results, "samples": 1})
    assert collect.main((folder,), tmp_path / "all.json") == 2
    assert "one: results.json is not of all chains there" in capsys.readouterr().err
    run.write_json(folder / "results.json", {**results, "samples": 2, "rows": []})
    assert collect.main((folder,), tmp_path / "all.json") == 2


def test_two_runs_of_one_name_are_refused(tmp_path, capsys):
    """Rows and settings of a run are found by the name of its folder."""
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
    runs = [finished_run(tmp_path / parent / "one", "a", {"1": [True]}) for parent in ("x", "y")]
    assert collect.main(tuple(runs), tmp_path / "all.json") == 2
    assert "has the same name" in capsys.readouterr().err


def test_of_an_interrupted_run_what_is_complete_counts(tmp_path):
    one = finished_run(tmp_path / "one", "a", {"1": [True], "2": [False]})
    whole = finished_run(tmp_path / "whole", "b", {"1": [True, True], "2": [True, False]}, (1, 2))
    part = finished_run(tmp_path / "part", "c", {"1": [True, True], "2": [True]}, (1, 2))
    for folder in (whole, part):
        (folder / "results.json").unlink()
    assert collect.main((one, whole), tmp_path / "all.json") == 0
    outcome = json.loads((tmp_path / "all.json").read_text())
    assert [(r["run"], r["chains"], r["accuracy"]["mean"]) for r in outcome["rows"]] == [
        ("one", 1, 0.5), ("whole", 1, 1.0), ("whole", 2, 1.0)
    ]  # fmt: skip
    assert [row["config"] for row in outcome["rows"]] == ["1-1-1", "1-1-1", "1-2-1"]
    assert [outcome["runs"][name]["finished"] for name in ("one", "whole")] == [True, False]
    assert collect.main((one, part), tmp_path / "none.json") == 2


def test_an_interrupted_run_says_itself_how_many_chains_it_makes(tmp_path):
    """The mini model's job takes them from no option, and a model may be of no ratio that is known."""
    one = finished_run(tmp_path / "one", "a", {"1": [True], "2": [False]})
    two = finished_run(tmp_path / "two", "b", {"1": [True, True], "2": [False, True]}, (2,))
    (two / "results.json").unlink()
    run.write_json(two / "config.json", {**CONFIG, "chains": [], "max_length": 64})
    samples = (two / "samples.jsonl").read_text().replace('"1-2-1"', '"1-2-?"').splitlines(keepends=True)
    (two / "samples.jsonl").write_text("".join([*samples, '{"source": "b", "id"']))  # killed while it wrote
    assert collect.main((one, two), tmp_path / "all.json", chains=(1,)) == 0
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert [(row["config"], row["cr"]) for row in rows] == [("1-1-1", 1.0), ("1-1-?", None), ("1-2-?", None)]
    assert [row["accuracy"]["mean"] for row in rows] == [0.5, 0.5, 0.5]
    (two / "samples.jsonl").write_text("".join(samples[:2] + samples[3:]))  # without the first chain of problem 2
    assert collect.main((one, two), tmp_path / "none.json", chains=(1,)) == 2
    assert collect.main((one, two), tmp_path / "common.json", common=True, chains=(1,)) == 0
    assert json.loads((tmp_path / "common.json").read_text())["problems"] == 1
    run.write_json(two / "config.json", {**CONFIG, "chains": [], "sweep": {"max_lengths": [64, 128]}})
    assert collect.main((one, two), tmp_path / "none.json") == 2


def test_common_counts_an_interrupted_run_over_the_problems_that_all_finished(tmp_path):
    one = finished_run(tmp_path / "one", "base/full", {"1": [True], "2": [False], "3": [True]})
    two = finished_run(tmp_path / "two", "base/dms", {"1": [True, True], "2": [True, True], "3": [False]}, (1, 2))
    (two / "results.json").unlink()
    assert collect.main((one, two), tmp_path / "all.json") == 2  # its model has not all chains of all problems
    assert collect.main((one, two), tmp_path / "all.json", common=True) == 0
    outcome = json.loads((tmp_path / "all.json").read_text())
    assert (outcome["problems"], outcome["all_problems"]) == (2, 3)
    assert outcome["runs"]["two"]["finished"] is False
    assert [(row["run"], row["chains"]) for row in outcome["rows"]] == [("one", 1), ("two", 1), ("two", 2)]
    assert [row["accuracy"]["mean"] for row in outcome["rows"]] == [0.5, 1.0, 1.0]
