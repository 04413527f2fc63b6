"""The main job and scripts/generate.py, run whole on a tiny model with random weights."""

import collections
import itertools
import json

import jax
import numpy as np
import pytest

import dms_jax
from dms_jax.inference import sampling
from experiments import aime, chains, run
from scripts import generate as generate_script


@pytest.fixture
def job(tiny_family, tmp_path, monkeypatch):
    """Runs the main job in a folder of its own and returns that folder, its samples and its results."""
    monkeypatch.setattr(dms_jax, "load", tiny_family, raising=False)
    monkeypatch.setattr(chains, "PROBLEMS_PER_BLOCK", 3)

    def start(name, *arguments, status=0):
        folder = tmp_path / name
        common = f"--run-dir {folder} --max-length 40 --batch-size 4 --cr 1 4 --chains 1 3".split()
        assert aime.main([*common, *arguments]) == status
        samples = run.read_jsonl(folder / "samples.jsonl")
        results = folder / "results.json"
        return folder, samples, json.loads(results.read_text()) if results.exists() else None

    return start


def in_order(samples):
    return sorted(samples, key=lambda s: (s["source"], s["id"], s["chain"]))


def recount(samples, source, width):
    """Accuracy and mean KV reads of a cell, counted afresh from the lines of samples.jsonl."""
    right, reads = [], []
    for problem in sorted({s["id"] for s in samples}):
        own = [s for s in in_order(samples) if s["source"] == source and s["id"] == problem][:width]
        assert [s["chain"] for s in own] == list(range(width))
        votes = collections.Counter(s["answer"] for s in own if s["answer"] is not None)
        best = [a for a, count in votes.items() if count == max(votes.values())]
        first = next((s for s in own if s["answer"] in best), None)
        right.append(bool(first and first["correct"]))
        reads.append(sum(s["kv_reads"] for s in own))
    return np.mean(right), np.mean(reads)


def test_the_job_from_end_to_end(job, capsys):
    folder, samples, results = job("one", "--limit", "5")
    assert len(samples) == 2 * 5 * 3 == len({(s["source"], s["id"], s["chain"]) for s in samples})
    assert [row["config"] for row in results["rows"]] == ["0.039-1-1", "0.039-3-1", "0.039-1-4", "0.039-3-4"]
    sources = ["base/full", "base/full", "cr4/dms", "cr4/dms"]
    for row, source in zip(results["rows"], sources, strict=True):
        accuracy, reads = recount(samples, source, row["chains"])
        assert row["problems"] == 5
        assert row["accuracy"]["mean"] == accuracy and row["kv_reads"] == pytest.approx(reads)
    full, dms = results["rows"][1], results["rows"][3]
    assert full["achieved_cr"] == 1 < dms["achieved_cr"]
    for s in samples:
        if s["policy"] == "full":  # the token drawn last is never read
            assert s["kv_reads"] == sum(s["prompt_tokens"] + n for n in range(1, s["tokens"]))
        assert s["finished"] or s["tokens"] == 40
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata[0]["jax"] == jax.__version__ and metadata[0]["limit"] == 5
    assert (folder / "accuracy_vs_reads.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "0.039-3-4" in printed and str(folder / "accuracy_vs_reads.png") in printed.replace("\n", "")


def test_an_interrupted_job_goes_on_and_ends_with_the_same_samples(job, monkeypatch):
    _, whole, results = job("whole", "--limit", "5", "--workers", "1")
    row, calls = chains.Sampler._row, itertools.count()

    def interrupted(*arguments):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return row(*arguments)

    monkeypatch.setattr(chains.Sampler, "_row", interrupted)
    folder, some, nothing = job("parts", "--limit", "5", "--workers", "1", status=130)
    monkeypatch.setattr(chains.Sampler, "_row", row)
    assert 0 < len(some) < len(whole) and nothing is None
    path = folder / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # killed while writing
    _, resumed, same_results = job("parts", "--limit", "5", "--workers", "2")
    assert in_order(resumed) == in_order(whole)
    assert same_results["rows"] == results["rows"]


def test_a_chain_depends_on_neither_batch_nor_number_of_chains(job):
    _, many, _ = job("many", "--limit", "4")
    folder, few, _ = job("few", "--limit", "2", "--batch-size", "3", "--seed", "0")
    texts = {(s["source"], s["id"], s["chain"]): s["text"] for s in many}
    assert all(texts[s["source"], s["id"], s["chain"]] == s["text"] for s in few)
    _, more, results = job("few", "--limit", "4", "--batch-size", "3", "--seed", "0")
    assert {(s["source"], s["id"], s["chain"]): s["text"] for s in more} == texts
    assert results["rows"][0]["problems"] == 4 and len(more) == len(many)
    assert len(json.loads((folder / "metadata.json").read_text())) == 2
    _, same, fewer = job("few", "--limit", "2", "--batch-size", "3", "--seed", "0")
    assert same == more and fewer["samples"] == len(more) and fewer["rows"][0]["problems"] == 2, "those asked for"
    _, other, _ = job("seed", "--limit", "2", "--seed", "1")
    assert [s["text"] for s in in_order(other)] != [s["text"] for s in in_order(few)]


def test_the_time_budget_ends_between_blocks(job):
    _, samples, results = job("brief", "--minutes", "0.0001")
    assert results["rows"][0]["problems"] == 3 and len(samples) == 2 * 3 * 3


def test_a_data_file_is_run_and_judged(job, tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{n}", "answer": n}) + "\n" for n in range(3)))
    _, samples, results = job("file", "--model", "real", "--data", str(path), "--policy", "full", "--limit", "2")
    assert {s["gold"] for s in samples} == {"0", "1"} and {s["policy"] for s in samples} == {"full"}
    assert results["config"]["temperature"] == 0.6


def test_another_model_on_the_problems_of_the_mini_model(job):
    _, mini, _ = job("mini", "--policy", "full", "--limit", "2")
    _, other, results = job("other", "--model", "real", "--data", "mini", "--policy", "full", "--limit", "2")
    assert {s["gold"] for s in other} == {s["gold"] for s in mini} and results["config"]["temperature"] == 1.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "none.jsonl", "--model", "real"], "none.jsonl: no such file"),
        (["--data", "a/b"], "the mini model has its own problems"),
        (["--limit", "0"], "limit=0: must be positive"),
        (["--chains", "2", "2"], "a value occurs twice"),
        (["--policy", "nonsense", "--limit", "1"], "nonsense"),
        (["--cr", "1", "--policy", "dms", "--limit", "1"], "never retrofitted"),
    ],
)
def test_mistakes_end_with_one_line(job, tmp_path, capsys, arguments, message):
    assert aime.main(["--runs", str(tmp_path / "runs"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error.replace("\n", " ")
    assert not (tmp_path / "runs").exists()


def test_another_training_is_another_run(tiny_family):
    one, two = tiny_family("mini", cr=4), tiny_family("mini", cr=8)
    assert chains.fingerprint(one) == chains.fingerprint(tiny_family("mini", cr=4)) != chains.fingerprint(two)
    changed = jax.tree.map(lambda x: x + 1e-6, one.params)
    assert chains.fingerprint(dms_jax.LM(one.config, changed, one.tokenizer, one.dms)) != chains.fingerprint(one)


def test_chain_keys_extend_sequence_keys():
    grid = np.array(sampling.sequence_keys(3, 4, 5)).reshape(4, 5, 2)
    np.testing.assert_array_equal(sampling.chain_keys(3, [2, 0], [4, 1]), [grid[2, 4], grid[0, 1]])
    assert len(np.unique(grid.reshape(-1, 2), axis=0)) == 20


def test_streamed_text_is_the_whole_text():
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode("utf-8", errors="replace")

    text, pieces = "naïve → 7", []
    shown = generate_script.TextStream(Bytes(), pieces.append)
    for byte in text.encode():
        shown.push([byte])
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    shown.push([0xE2])
    shown.push([], last=True)
    assert "".join(pieces) == text + "\ufffd"


def test_generate_script(tiny_family, monkeypatch, capsys):
    monkeypatch.setattr(dms_jax, "load", tiny_family, raising=False)
    options = ["--max-new-tokens", "12"]
    assert generate_script.main(["--prompt", "Let a = 1", "--cr", "4", *options]) == 0
    printed = capsys.readouterr().out
    assert "KV reads" in printed and "6 prompt tokens" in printed, "bos, four pieces and the newline"
    assert generate_script.main(["--demo", *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("achieved CR") == 2 and "the right answer is" in printed
    assert generate_script.main(options) == 2
    assert generate_script.main(["--prompt", "a", "--window", "3", *options]) == 2
    assert "never retrofitted" in capsys.readouterr().err
