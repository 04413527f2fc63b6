"""The commands of all tasks, run whole on a tiny model with random weights: options, stop strings, the table."""

import dataclasses
import json

import pytest

import dms_jax
from dms_jax.config import ConfigError
from experiments import chains, gpqa, gsm8k, humaneval, job, livecodebench, math500, run
from experiments.judge import Verdict
from experiments.stops import StopStrings
from experiments.tasks.base import Task
from experiments.tasks.gpqa import GpqaTask
from experiments.tasks.gsm8k import Gsm8kTask
from experiments.tasks.livecodebench import LiveCodeBenchTask
from experiments.tasks.math500 import MathTask
from tests.helpers.prompts import write_lines

TASKS = (Gsm8kTask, MathTask, GpqaTask, LiveCodeBenchTask)
GSM8K = [{"question": f"Let a = {n}.", "answer": f"So\n#### {n}"} for n in range(6)]


@pytest.fixture
def start(tiny_family, tmp_path, monkeypatch):
    """Runs a command in a folder of its own; returns the samples by source, problem and chain, and the results."""
    monkeypatch.setattr(dms_jax, "load", tiny_family, raising=False)
    for task in TASKS:
        monkeypatch.setattr(task, "shots", ())  # for short prompts

    def begin(module, rows, *arguments, status=0, name="run"):
        folder = tmp_path / name
        data = write_lines(tmp_path / "data.jsonl", *rows)
        common = f"--model x --run-dir {folder} --data {data} --max-length 24 --batch-size 8 --temperature 1 --top-p 1"
        assert module.main([*common.split(), *arguments]) == status
        samples = run.read_jsonl(folder / "samples.jsonl") if folder.exists() else []
        results = folder / "results.json"
        found = json.loads(results.read_text()) if results.exists() else None
        return {(s["source"], s["id"], s["chain"]): s for s in samples}, found

    return begin


def test_several_policies_and_budgets(tiny_family, monkeypatch):
    monkeypatch.setattr(dms_jax, "load", tiny_family, raising=False)
    given = job.Options(model="x", policy=("full", "dms", "tova"), cr=(1.0, 4.0), budget=(0.5, 16), chains=(2, 1))
    models, cells = job.load_models(gsm8k.EXPERIMENT, job.resolve(gsm8k.EXPERIMENT, given))
    assert [model.source for model in models] == ["base/full", "cr4/dms", "base/tova 0.5", "base/tova 16"]
    assert [dict(model.eviction) for model in models] == [{}, {}, {"budget": 0.5}, {"budget": 16}]
    assert {model.chains for model in models} == {2}
    assert [(cell.policy, cell.cr, cell.chains) for cell in cells] == [
        (policy, cr, chains) for policy, cr in (("full", 1), ("dms", 4), ("tova", 2), ("tova", 64)) for chains in (1, 2)
    ]
    given = dataclasses.replace(given, policy=("full", "snapkv", "quest"), cr=(), budget=(64,), evict_every=8)
    models, _ = job.load_models(gsm8k.EXPERIMENT, job.resolve(gsm8k.EXPERIMENT, given))
    assert {model.source: dict(model.eviction) for model in models} == {
        "base/full": {}, "base/snapkv 64 every 8": {"budget": 64, "evict_every": 8}, "base/quest 64": {"budget": 64}
    }  # fmt: skip
    one = job.resolve(gsm8k.EXPERIMENT, job.Options(model="x", policy=("full",), cr=(1.0, 4.0)))
    assert [model.source for model in job.load_models(gsm8k.EXPERIMENT, one)[0]] == ["base/full", "cr4/full"]


def test_problems_are_drawn_by_the_seed(start, capsys):
    few, _ = start(gsm8k, GSM8K, "--problems", "2", name="few")
    more, results = start(gsm8k, GSM8K, "--problems", "4", name="few")
    assert few.items() <= more.items() and len(more) == 4 and results["problems"] == 4
    other, _ = start(gsm8k, GSM8K, "--problems", "2", "--seed", "1", name="other")
    first, _ = start(gsm8k, GSM8K, "--limit", "2", name="first")
    assert {key[1] for key in first} == {"0", "1"}
    assert len({frozenset(key[1] for key in some) for some in (few, other, first)}) > 1
    assert all(first[key]["text"] == more[key]["text"] for key in first.keys() & more.keys())
    assert start(gsm8k, GSM8K, "--problems", "7", name="none", status=2)[0] == {}
    assert "problems=7: the data has only 6" in capsys.readouterr().err
    assert start(gsm8k, GSM8K, "--problems", "1", "--limit", "1", name="none", status=2)[0] == {}


def test_what_follows_a_stop_string_does_not_count(start):
    free, _ = start(gsm8k, GSM8K, "--chains", "3", name="free")
    ended, _ = start(gsm8k, GSM8K, "--chains", "3", "--stop", "7", " + ", name="ended")
    assert free.keys() == ended.keys()
    cut = 0
    for key, s in ended.items():
        whole = free[key]["text"]
        end = min((n for stop in ("7", " + ") if (n := whole.find(stop)) >= 0), default=len(whole))
        assert s["text"] == whole[:end] and s["tokens"] <= free[key]["tokens"]
        assert s["kv_reads"] == sum(s["prompt_tokens"] + n for n in range(1, s["tokens"]))
        if end < len(whole):
            cut += 1
            assert s["finished"] and s["tokens"] <= 24
            # By head the last chunk counts whole.
            assert s["achieved_cr"] == 1 and sum(map(sum, s["reads_by_head"])) >= s["kv_reads"]
    assert cut > 3


def test_few_shot_prompts_bring_their_stop_string(tiny_family):
    lm = tiny_family("x")
    model = chains.Model("base/full", "", lm, "full", None, 1, 8)
    task = Gsm8kTask("t", ())
    engines = chains.Engines(task, chains.Sampling(1.0, 1.0, 1, 0, stop=("END",)))
    assert engines.stops(model).strings == ("\nQuestion:", "END")


def test_stop_strings_are_found_where_they_are_completed():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", "replace")

    stops = StopStrings(Bytes(), ("\nQ:", "END"))
    tokens = list("a é\nQ: more END".encode())
    whole = tokens.index(ord(":")) + 1
    for seen in range(len(tokens)):
        for have in range(seen, len(tokens) + 1):
            if seen < whole:  # asked after each piece, so a string found before has ended the chain
                assert stops.chain_end(tokens[:have], have - seen) == (whole if have >= whole else None)
    assert stops.cut("a é\nQ: more END") == "a é" and stops.cut("none") == "none" and stops.cut("END\nQ:") == ""
    assert stops.ended(tokens) and not stops.ended(tokens[: whole - 1])


def test_math500_and_gpqa_run(start):
    rows = [{"problem": "Let a = 1.", "answer": r"\frac12"}, {"problem": "Let b = 2.", "answer": "5"}]
    samples, results = start(math500, rows)
    assert len(samples) == 2 and results["experiment"] == "math500"
    wrong = {f"Incorrect Answer {n}": f"{n}" for n in (1, 2, 3)}
    row = {"Record ID": "r", "Question": "Which?", "Correct Answer": "7", **wrong}
    samples, results = start(gpqa, [row], name="gpqa")
    assert {s["gold"] for s in samples.values()} <= set("ABCD") and "order fixed" in results["form"]


def test_programs_give_pass_at_k(start, monkeypatch, capsys):
    row = {"task_id": "t", "prompt": "Let a = 1.\n", "entry_point": "f", "test": "def check(f): pass"}
    samples, results = start(humaneval, [row], "--chains", "1", "4")
    assert len(samples) == 4 and all(s["answer"] and not s["correct"] and s["gold"] == "" for s in samples.values())
    one, four = results["rows"]
    assert set(one["pass_at"]) == {"1"} and set(four["pass_at"]) == {"1", "2", "4"}
    assert "pass@all" in results["caption"] and "pass@1" in capsys.readouterr().out


def test_livecodebench_names_release_and_dates(start, capsys):
    tests = json.dumps([{"input": "1", "output": "1"}])
    row = {
        "question_id": "q", "question_content": "Let a = 1.", "contest_date": "2024-12-01", "starter_code": "",
        "metadata": "{}", "public_test_cases": tests, "private_test_cases": tests,
    }  # fmt: skip
    _, results = start(livecodebench, [row], "--release", "release_v5", "--end", "2024-12-31")
    assert "release_v5, contests of 2024-08-01 to 2024-12-31" in results["task"]
    assert results["config"]["release"] == "release_v5" and results["problems"] == 1
    start(livecodebench, [row], "--start", "2024-13-01", status=2, name="none")
    assert "error: start='2024-13-01': is no date" in capsys.readouterr().err


def test_an_error_of_the_judge_ends_the_run_and_keeps_what_was_judged(start, monkeypatch):
    verdicts = iter([Verdict("1", True)] * 2)
    monkeypatch.setattr(Task, "verdict", lambda *_: next(verdicts))
    with pytest.raises(StopIteration):
        start(gsm8k, GSM8K, "--limit", "4")
    monkeypatch.setattr(Task, "verdict", lambda *_: Verdict("2", False))
    samples, results = start(gsm8k, GSM8K, "--limit", "4")
    assert len(samples) == 4 and sorted(s["answer"] for s in samples.values()) == ["1", "1", "2", "2"]
    assert results["rows"][0]["accuracy"]["mean"] == 0.5


def test_unknown_policies_and_impossible_options(start, capsys):
    mistakes = {
        "policy='nonsense'": "--policy nonsense",
        "needs --budget": "--policy full tova",
        "an empty string": "--stop ",
        "a sweep takes it": "--sweep --chains 2",
    }
    for message, arguments in mistakes.items():
        start(gsm8k, GSM8K, *arguments.split(" "), status=2, name="none")
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_sweep_runs_on_any_task(start, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("{policies: [full], max_lengths: [24], chains: [1, 2], dms_crs: [], budget_crs: [], problems: 2}")
    folder = tmp_path / "swept"
    data = write_lines(tmp_path / "data.jsonl", *GSM8K)
    arguments = f"--model x --data {data} --sweep --plan {plan} --run-dir {folder} --batch-size 4"
    assert gsm8k.main(arguments.split()) == 0
    results = json.loads((folder / "results.json").read_text())
    assert [row["chains"] for row in results["rows"]] == [1, 2] and results["problems"] == 2


def test_nominal_ratios(tiny_family):
    from experiments.variants import Variant

    original, retrofitted = tiny_family("x"), tiny_family("x", cr=8.0)

    assert job.nominal_cr(Variant("full", 4.0), 4.0, original, 100) == 1
    assert job.nominal_cr(Variant("tova", None, 0.25), None, original, 100) == 4
    assert job.nominal_cr(Variant("tova", None, 50), None, original, 100) == 2
    assert job.nominal_cr(Variant("dms", 4.0), 4.0, retrofitted, 100) == 4
    assert job.nominal_cr(Variant("dms"), None, retrofitted, 100) == 8
    with pytest.raises(ConfigError):
        job.chosen_problems(gsm8k.job.Options(model="x", problems=3), 2)
