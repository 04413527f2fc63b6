"""Needles and variable tracking, run whole on a tiny model with random weights; what a set of variants is."""

import itertools
import json

import numpy as np
import pytest

import dms_jax
from dms_jax.config import ConfigError
from dms_jax.weights.text import encode
from experiments import niah, recall, run, variable_tracking, variants
from experiments.variants import Variant
from tests.helpers.tokenizers import TEMPLATE, letters

# ---- variants


def test_variants():
    made = variants.variants(("full", "dms", "tova", "h2o"), (4.0, 8.0), (256, 0.25))
    assert [v.name for v in made] == [
        "full", "dms CR4", "dms CR8", "tova 256", "tova 0.25", "h2o 256", "h2o 0.25",
    ]  # fmt: skip
    assert variants.variants(("dms",), (), ()) == [Variant("dms")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((("full", "full"), (), ()), "policy=.*occurs twice"),
        ((("tova",), (), ()), "policy=.*needs --budget"),
        ((("full",), (), (4,)), "budget=.*only training-free"),
        ((("full",), (4.0,), ()), "cr=.*only policy dms"),
        ((("dms",), (1.0,), ()), "cr=.*must be above 1"),
        ((("tova",), (), (0,)), "budget=0: is tokens"),
        ((("tova",), (), (1.5,)), "budget=1.5: is tokens"),
    ],
)
def test_impossible_variants(arguments, message):
    with pytest.raises(ConfigError, match=message):
        variants.variants(*arguments)


def test_batches_are_filled_with_copies():
    assert list(variants.batches("abc", 2)) == [(["a", "b"], ["a", "b"]), (["c"], ["c", "c"])]


def test_loading_shares_weights_and_gives_dms_its_window(tiny_family, monkeypatch):
    monkeypatch.setattr(dms_jax, "load", tiny_family, raising=False)
    full, four = variants.load("x", variants.variants(("full", "dms"), (4.0,), ()), "float32", window=3)
    assert full.dms is None and four.dms.window == 3 and four.lm.dms.window == 4
    assert four.options == {"policy": "dms", "dms": four.dms}
    one, other = variants.load("x", [Variant("full"), Variant("full")], "float32")
    assert one.lm is other.lm
    with pytest.raises(ConfigError, match="never retrofitted; is a --cr missing"):
        variants.load("x", [Variant("dms")], "float32")
    with pytest.raises(ConfigError, match="policy='nonsense'"):
        variants.load("x", [Variant("nonsense")], "float32")
    with pytest.raises(ConfigError, match="window=3: only policy dms"):
        variants.load("x", [Variant("full")], "float32", window=3)


# ---- the runner


@pytest.fixture
def job(tiny_family, tmp_path, monkeypatch):
    """Runs an experiment in a folder of its own; returns that folder, its samples and its results."""
    monkeypatch.setattr(dms_jax, "load", tiny_family, raising=False)

    def start(name, *arguments, experiment=niah, status=0):
        folder = tmp_path / name
        assert experiment.main(["--run-dir", str(folder), "--batch-size", "2", *arguments]) == status
        results = folder / "results.json"
        samples = run.read_jsonl(folder / "samples.jsonl") if folder.exists() else []
        return folder, samples, json.loads(results.read_text()) if results.exists() else None

    return start


REAL = ["--model", "real", "--task", "niah_single_1", "niah_multikey_2", "--length", "768"]
TWO = [*REAL, "--policy", "full", "dms", "--cr", "4", "--limit"]


def test_niah_from_end_to_end(job, capsys):
    folder, samples, results = job("one", *TWO, "3")
    assert len(samples) == 2 * 2 * 3 == len({(s["task"], s["variant"], s["id"]) for s in samples})
    rows = [(row["task"], row["length"], row["policy"], row["cr"]) for row in results["rows"]]
    assert rows == [
        (t, 768, p, cr) for t in ("niah_single_1", "niah_multikey_2") for p, cr in (("full", None), ("dms", 4))
    ]
    for row in results["rows"]:
        own = [s for s in samples if (s["task"], s["variant"].split()[0]) == (row["task"], row["policy"])]
        assert row["samples"] == 3 == len(own)
        assert row["score"]["mean"] == np.mean([s["answers"][0] in s["text"] for s in own])
        assert row["kv_reads"] == pytest.approx(np.mean([s["kv_reads"] for s in own]))
        assert (row["achieved_cr"] == 1) == (row["policy"] == "full")
    for s in samples:
        assert s["prompt_tokens"] + 128 <= 768 and s["tokens"] <= 128 and 0 < s["position"] < s["prompt_tokens"]
        if s["variant"] == "full":  # the token drawn last is never read
            assert s["kv_reads"] == sum(s["prompt_tokens"] + n for n in range(1, s["tokens"]))
    assert json.loads((folder / "metadata.json").read_text())[0]["limit"] == 3
    assert "niah_multikey_2" in capsys.readouterr().out


def in_order(samples):
    return sorted(samples, key=lambda s: (s["task"], s["variant"], s["id"]))


def test_an_interrupted_run_goes_on(job, monkeypatch):
    _, whole, results = job("whole", *TWO, "3")
    answer, calls = recall.answer, itertools.count()

    def interrupted(*arguments):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(recall, "answer", interrupted)
    _, some, nothing = job("parts", *TWO, "3", status=130)
    assert len(some) == 7 and nothing is None
    _, resumed, again = job("parts", *TWO, "3")
    assert in_order(resumed) == in_order(whole) and again["rows"] == results["rows"]
    before = next(calls)
    _, more, longer = job("parts", *TWO, "4")
    assert more[: len(whole)] == resumed and len(more) == 16 and longer["rows"][0]["samples"] == 4
    assert next(calls) - before == 4 + 1, "of each cell the missing answer alone"


def test_a_budget_is_a_share_of_the_cells_length(job):
    """A head holds so many tokens once the prompt was read, however long the prompt happens to be."""
    _, (s,), _ = job("budget", *REAL[:4], "--length", "768", "--limit", "1", "--policy", "tova", "--budget", "0.25")
    assert s["kv_reads"] == 192 * (s["tokens"] - 1)
    assert s["achieved_cr"] == (s["prompt_tokens"] + s["tokens"] - 1) / 192


def test_the_mini_model_has_its_own_tasks(job, capsys):
    _, samples, results = job("copy", "--limit", "2", "--policy", "full")
    assert [s["task"] for s in samples] == ["mini_copy"] * 2 and all(s["tokens"] <= 3 for s in samples)
    assert results["rows"][0]["length"] is None and "own" in capsys.readouterr().out
    _, samples, _ = job("chain", "--limit", "2", "--policy", "full", experiment=variable_tracking)
    assert [s["task"] for s in samples] == ["mini_chain"] * 2
    assert all(len(s["answers"]) in (7, 8) and s["tokens"] <= 448 for s in samples)


def test_defaults():
    mini = recall.resolve(niah.EXPERIMENT, recall.Config())
    assert (mini.task, mini.length, mini.policy, mini.cr) == (("mini_copy",), (), ("full", "dms"), (4.0, 8.0))
    real = recall.resolve(niah.EXPERIMENT, recall.Config(model="real"))
    assert real.task == ("niah_single_1", "niah_multikey_2", "niah_multikey_3")
    assert (real.length, real.policy, real.cr, real.dtype) == ((1024,), ("full",), (), "float32")
    with_text = recall.resolve(variable_tracking.EXPERIMENT, recall.Config(model="real", data="essays.txt"))
    assert with_text.task == ("vt", "vt_essay", "vt_two_chains")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--length", "64"], "the mini model has its own questions"),
        (["--model", "real", "--task", "niah_single_2"], "needs a text to hide the needles in: --data FILE"),
        (["--model", "real", "--data", "none.txt"], "none.txt"),
        (["--model", "real", "--task", "vt"], "task='vt'"),
        (["--model", "real", "--length", "100"], "too short for niah_single_1"),
        (["--limit", "0"], "limit=0: must be positive"),
        (["--policy", "tova"], "needs --budget"),
    ],
)
def test_mistakes_end_with_one_line(job, capsys, arguments, message):
    folder, _, _ = job("mistake", *arguments, status=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error.replace("\n", " ")
    assert not folder.exists()


def test_a_chat_model_is_given_a_turn_and_the_prefix_begins_its_answer():
    chat = letters("<b>", "", TEMPLATE)
    assert recall.encode_with(chat, "abc", " d") == encode(chat, "<t>uabc<e> <t>a d", begins=False)
    assert recall.encode_with(chat, "abc", "") == encode(chat, "abc"), "a part of a prompt, to be counted"
