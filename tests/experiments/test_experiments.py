"""What the main job is made of: votes, pass@k, intervals, run folder, figure."""

import hashlib
import itertools
import json

import numpy as np
import pytest

from experiments import run, stats
from paper_figures import accuracy_vs_reads
from paper_figures.rows import pareto

# ---- statistics


@pytest.mark.parametrize(
    "answers, winner",
    [
        (["7", "9", None, "9"], 1),
        (["7", "9"], 0),
        ([None, "9", "7", "7", "9"], 1),
        ([None, None], None),
        ([], None),
        (["3", "1", "2", "2", "1"], 1),
    ],
)
def test_majority(answers, winner):
    assert stats.majority(answers) == winner


@pytest.mark.parametrize("n, p", [(500, 0.6), (2000, 0.05), (40, 0.5)])
def test_bootstrap_agrees_with_the_binomial(n, p):
    values = np.arange(n) < round(n * p)
    estimate = stats.bootstrap(values)
    counts = np.random.default_rng(1).binomial(n, values.mean(), 400_000) / n
    assert estimate.mean == values.mean()
    step = 1.01 / n  # quantiles of a count may fall on either side
    np.testing.assert_allclose(estimate[1:], np.quantile(counts, (0.025, 0.975)), atol=step)
    assert stats.bootstrap(values) == estimate


def test_bootstrap_of_nothing_and_of_one_value():
    assert stats.bootstrap([1.0]) == (1, 1, 1)
    with pytest.raises(ValueError, match="no problems"):
        stats.bootstrap([])


def made_up_sample(source, problem, chain, answer, correct, **changes):
    sample = {"source": source, "id": problem, "chain": chain, "answer": answer, "correct": correct}
    costs = {"kv_reads": 10.0, "prefill_reads": 3.0, "peak_tokens": 5.0, "tokens": 4, "achieved_cr": 2.0}
    return {**sample, **costs, "finished": True, **changes}


def test_table_counts_votes_costs_and_common_problems_only():
    cells = [stats.Cell("1-1-1", "base", "full", 1, 1, 1024), stats.Cell("1-3-4", "small", "dms", 4, 3, 1024)]
    samples = [
        made_up_sample("small", "b", 2, "5", True, kv_reads=1.0, achieved_cr=5.0),
        made_up_sample("small", "b", 0, "4", False),
        made_up_sample("small", "b", 1, "5", True),
        made_up_sample("base", "a", 0, "1", True),
        made_up_sample("base", "b", 0, None, False),
        made_up_sample("base", "c", 0, "1", True),
        *(made_up_sample("small", "a", n, "2", False) for n in range(3)),
        *(made_up_sample("small", "c", n, "1", True) for n in range(2)),  # a chain is missing
    ]
    base_row, small = stats.table(samples, cells)
    assert base_row["problems"] == small["problems"] == 2
    assert base_row["accuracy"]["mean"] == small["accuracy"]["mean"] == 0.5
    assert small["gain"]["mean"] == 0 and (small["gain"]["low"], small["gain"]["high"]) == (-1, 1)
    assert small["kv_reads"] == (30 + 21) / 2 and small["peak_tokens"] == 15 and small["tokens"] == 12
    assert small["achieved_cr"] == 15 / 6 and small["max_length"] == 1024
    assert stats.table(samples[:3], cells) == []
    others = [sample for sample in samples if sample["source"] == "base" or sample["chain"]]
    assert stats.table(others, [cells[0], cells[1]._replace(chains=1)]) == [], "of two chains the first is missing"


@pytest.mark.parametrize("chains, right, k", [(4, 1, 2), (5, 2, 3), (3, 0, 1), (3, 3, 2), (6, 5, 2), (1, 1, 1)])
def test_pass_at_k_counts_the_draws_that_hold_a_right_one(chains, right, k):
    draws = list(itertools.combinations(range(chains), k))
    share = sum(any(n < right for n in draw) for draw in draws) / len(draws)
    assert stats.pass_at(right, chains, k) == pytest.approx(share)


def test_a_table_of_programs_has_pass_at_k_and_pass_at_all():
    assert [stats.powers(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]
    cells = [stats.Cell("1-1-1", "base", "full", 1, 1, 1024), stats.Cell("1-4-1", "base", "full", 1, 4, 1024)]
    outcomes = {"a": (False, True, False, False), "b": (False, False, False, False), "c": (True, True, True, True)}
    samples = [
        made_up_sample("base", problem, n, "passed" if right else "wrong output", right)
        for problem, own in outcomes.items()
        for n, right in enumerate(own)
    ]
    one, four = stats.table(samples, cells, "pass")
    assert one["accuracy"]["mean"] == pytest.approx(1 / 3) == one["pass_at"]["1"]["mean"]
    assert four["accuracy"]["mean"] == pytest.approx(2 / 3) == four["pass_at"]["4"]["mean"]
    assert four["pass_at"]["1"]["mean"] == pytest.approx(5 / 12)
    assert four["pass_at"]["2"]["mean"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert "pass_at" not in stats.table(samples, cells)[0], "votes have none"


def test_pareto_front():
    rows = [
        {"kv_reads": reads, "accuracy": {"mean": mean}}
        for reads, mean in ((5, 0.5), (1, 0.2), (2, 0.1), (3, 0.5), (9, 0.9))
    ]
    assert [row["kv_reads"] for row in pareto(rows)] == [1, 3, 9]


# ---- the run folder


def test_a_run_folder_resumes_and_drops_half_a_line(tmp_path, capsys):
    first = run.open_run(tmp_path, "x", {"a": (1, 2)})
    first.append([{"n": 0}, {"n": 1}])
    first.close()
    with first.samples_path.open("ab") as file:
        file.write(b'{"n": 2, "te')
    again = run.open_run(tmp_path, "x", {"a": (1, 2)})
    assert again.path == first.path and again.samples == [{"n": 0}, {"n": 1}]
    assert f"{first.samples_path}: dropped its last line, which was cut off" in capsys.readouterr().err
    with first.samples_path.open("ab") as file:
        file.write(b'{"n": 2')  # another process is writing
    assert run.read_jsonl(again.samples_path) == again.samples
    first.samples_path.write_bytes(b'{"n": 0}\n{"n": 1}\n')
    again.append([{"n": 2}])
    assert run.read_jsonl(again.samples_path) == [{"n": 0}, {"n": 1}, {"n": 2}] == again.samples
    again.close()


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"n"', "not a line of JSON"),
        ("[" * 9999, "not a line of JSON"),
        ("[1]", "not a sample like that of the first line"),
        ('{"m": 1}', "not a sample like that of the first line"),
        ('{"n": "1"}', "n='1' is of another kind than in the first line"),
        ('{"n": null}', "n=None is of another kind than in the first line"),
    ],
)
def test_damage_in_the_middle_is_an_error(tmp_path, line, message):
    opened = run.open_run(tmp_path, "x", {})
    opened.samples_path.write_text(f'{{"n": 0}}\n{line}\n{{"n": 2}}\n')
    opened.close()
    with pytest.raises(run.RunError, match=f"samples.jsonl:2: {message}"):
        run.Run(opened.path, {})


@pytest.mark.parametrize("text", ["", "{", "{}", "7", "[" * 9999])
def test_damaged_metadata_is_named(tmp_path, text):
    opened = run.open_run(tmp_path, "x", {})
    (opened.path / "metadata.json").write_text(text)
    with pytest.raises(run.RunError, match="metadata.json: "):
        opened.started()
    opened.close()


def test_which_folder_is_opened(tmp_path):
    def opened(config, **options):
        with_lock = run.open_run(tmp_path, "x", config, **options)
        with_lock.close()
        return with_lock.path

    first = opened({"a": 1})
    assert opened({"a": 1}) == first
    assert opened({"a": 2}) != first
    fresh = opened({"a": 1}, fresh=True)
    assert fresh != first and opened({"a": 1}) == fresh, "the newest is resumed"
    (fresh / "results.json").write_text("{}")
    assert opened({"a": 1}) == first, "a finished one is not"
    assert opened({"a": 1}, run_dir=fresh) == fresh, "unless it is named"
    with pytest.raises(run.RunError, match="another configuration.*a was 1, is 2"):
        opened({"a": 2}, run_dir=first)
    assert opened({"a": 2}, run_dir=first, extendable=("a",)) == first
    assert json.loads((first / "config.json").read_text()) == {"a": 1}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(run.RunError, match="not a run folder"):
        opened({"a": 1}, run_dir=tmp_path / "other")


def test_an_option_that_was_not_known_was_not_given():
    assert run.differences({"a": 1}, {"a": 1, "stop": [], "problems": None}) == []
    assert run.differences({"a": 1, "b": 0}, {"a": 2}) == ["a", "b"]
    assert run.differences({"a": 1, "b": 0}, {"a": 2}, ("a",)) == ["b"]


def test_the_hash_of_local_weights(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    assert run.file_digest(file) == hashlib.sha256(b"weights").hexdigest()
    assert run.file_digest("org/name") is None
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    first = run.file_digest(folder)
    (folder / "config.json").write_text("{}")
    assert run.file_digest(folder) == first
    (folder / "model.safetensors").write_bytes(b"others")
    assert run.file_digest(folder) != first


def test_two_processes_do_not_share_a_folder(tmp_path):
    first = run.open_run(tmp_path, "x", {})
    with pytest.raises(run.RunError, match="another process"):
        run.open_run(tmp_path, "x", {}, run_dir=first.path)
    second = run.open_run(tmp_path, "x", {})
    assert second.path != first.path
    first.close()
    second.close()


# ---- figure


def test_the_figure_script(tmp_path, capsys):
    def row(policy, cr, width, reads, mean):
        estimate = {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}
        name = f"0.5-{width}-{cr}"
        return {
            "config": name,
            "policy": policy,
            "cr": cr,
            "kv_reads": reads,
            "accuracy": estimate,
            "problems": 9,
        }

    rows = [row("full", 1, 1, 9e4, 0.5), row("dms", 4, 1, 3e4, 0.5), row("dms", 4, 4, 1.2e5, 0.7)]
    assert list(accuracy_vs_reads.series(rows)) == ["vanilla", "DMS CR4"]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    accuracy_vs_reads.main([str(tmp_path / "results.json"), str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    axes = accuracy_vs_reads.draw(rows).axes[0]
    assert {text.get_text() for text in axes.texts} == {r["config"] for r in rows}
