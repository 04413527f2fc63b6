"""Fidelity: forced decoding is the teacher-forced forward, and the measures are what numpy makes of its logits."""

import json

import numpy as np
import pytest
from scipy.special import log_softmax

import dms_jax
from dms_jax.config import ConfigError
from experiments import fidelity, run
from experiments.fidelity import Window
from experiments.forced import forced_logits
from experiments.variants import Loaded, Variant

T = 40
PROMPTS = np.array([9, 14], np.int32)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(4, 59, (2, T)).astype(np.int32)


@pytest.fixture(scope="module")
def dms_lm(tiny_family):
    """Large weights, so that attention is sharp and decisions are of both kinds."""
    import jax

    lm = tiny_family("mini", cr=4)
    params = jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, lm.params)
    return dms_jax.LM(lm.config, params, lm.tokenizer, lm.dms)


def all_logits(loaded, tokens, chunk, **options):
    forced = list(forced_logits(loaded, tokens, PROMPTS, chunk=chunk, **options))
    return np.concatenate([f.logits for f in forced]), np.concatenate([f.live for f in forced])


@pytest.mark.parametrize("policy, cache", [("dms", "paged"), ("full", "paged")])
def test_forced_decoding_is_the_teacher_forced_forward(dms_lm, tokens, policy, cache):
    loaded = Loaded(Variant(policy), dms_lm, dms_lm.dms if policy == "dms" else None)
    got, live = all_logits(loaded, tokens, 8, cache=cache)
    whole = np.asarray(dms_lm.logits(tokens, dms=loaded.dms))
    for b, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(got[: T - prompt, b], whole[b, prompt - 1 : T - 1], atol=1e-4, rtol=0)
        seen = prompt + np.arange(T - prompt)
        if policy == "full":
            np.testing.assert_array_equal(live[: T - prompt, b], seen)
        else:
            assert (live[: T - prompt, b] < seen).all()
    if policy == "dms":
        plain = np.asarray(dms_lm.logits(tokens))
        assert np.abs(whole - plain).max() > 0.1, "eviction must matter"


def test_a_prompt_as_long_as_the_text_leaves_nothing(dms_lm, tokens):
    with pytest.raises(ConfigError, match="prompt=14: leaves nothing of 14"):
        next(forced_logits(Loaded(Variant("full"), dms_lm, None), tokens[:, :14], PROMPTS))


def test_measures_against_numpy(dms_lm, tokens):
    """Unequal prompts and lengths; the padding behind the shorter window counts for nothing."""
    windows = [Window(tuple(tokens[0, :31]), 9), Window(tuple(tokens[1]), 14)]
    rows = fidelity.measure(Loaded(Variant("dms"), dms_lm, dms_lm.dms), dms_lm, windows, T)
    for n, (row, window) in enumerate(zip(rows, windows, strict=True)):
        ids = np.array([window.tokens])
        span = slice(window.prompt - 1, len(window.tokens) - 1)
        ours = log_softmax(np.asarray(dms_lm.logits(ids, dms=dms_lm.dms))[0, span].astype(np.float64), axis=-1)
        theirs = log_softmax(np.asarray(dms_lm.logits(ids))[0, span].astype(np.float64), axis=-1)
        target = ids[0, window.prompt :]
        steps = np.arange(len(target))
        assert row["tokens"] == len(target) == [22, 26][n]
        assert (
            row["kl"] == pytest.approx((np.exp(theirs) * (theirs - ours)).sum(-1).mean(), abs=1e-4) and row["kl"] > 1e-3
        )
        assert row["agreement"] == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).mean()) and row["agreement"] < 1
        assert row["nll"] == pytest.approx(-ours[steps, target].mean(), abs=1e-4)
        assert row["nll_reference"] == pytest.approx(-theirs[steps, target].mean(), abs=1e-4)
        live = all_logits(Loaded(Variant("dms"), dms_lm, dms_lm.dms), tokens, 8)[1]
        assert row["achieved_cr"] == pytest.approx((len(window.tokens) - 1) / live[len(target) - 1, n])


def test_text_windows():
    class Tokenizer:
        bos_token_id = 1

        def __call__(self, texts, add_special_tokens=True):
            if isinstance(texts, str):
                return {"input_ids": [1] * add_special_tokens + [int(word) for word in texts.split()]}
            return {"input_ids": [self(text, add_special_tokens)["input_ids"] for text in texts]}

    text = " ".join(map(str, range(10, 21)))
    windows = fidelity.text_windows(text, Tokenizer(), length=5, prompt=2, limit=9)
    assert windows == [Window((1, 10, 11, 12, 13), 2), Window((1, 14, 15, 16, 17), 2)], "a part window is left out"
    assert fidelity.text_windows(text, Tokenizer(), 5, 2, limit=1) == windows[:1]
    with pytest.raises(ConfigError, match="length=20: the text has only 11 tokens"):
        fidelity.text_windows(text, Tokenizer(), 20, 2, 1)
    with pytest.raises(ConfigError, match="chat='7': the model's tokenizer has no chat template"):
        fidelity.text_windows(text, Tokenizer(), 5, 2, 1, chat="7")

    class Chats(Tokenizer):
        chat_template = "a template"

        def apply_chat_template(self, turns, add_generation_prompt, tokenize):
            assert add_generation_prompt and not tokenize and [turn["role"] for turn in turns] == ["user"]
            return f"2 {turns[0]['content']} 3"

    chats = fidelity.text_windows(text, Chats(), 6, 4, 9, chat="7")
    assert chats[0] == Window((2, 7, 3, 10, 11, 12), 4) and chats[1].tokens[3:] == (13, 14, 15)
    with pytest.raises(ConfigError, match="prompt=2: 3 tokens stand before the text"):
        fidelity.text_windows(text, Chats(), 6, 2, 9, chat="7")


@pytest.fixture
def job(tiny_family, tmp_path, monkeypatch):
    """Runs the experiment on a text of its own; returns its samples and its results."""
    monkeypatch.setattr(dms_jax, "load", tiny_family, raising=False)
    text = tmp_path / "text.txt"
    text.write_text("Let q = 482, m = 157, c = 309. Set d = q + m, x = d - c. Find x modulo 1000.\n" * 6)

    def start(*arguments, status=0):
        folder = tmp_path / "run"
        common = ["--model", "real", "--data", str(text), "--run-dir", str(folder), "--batch-size", "2"]
        assert fidelity.main([*common, *arguments]) == status
        if status:
            return folder
        return run.read_jsonl(folder / "samples.jsonl"), json.loads((folder / "results.json").read_text())

    return start


FEW = ["--length", "40", "--prompt", "20", "--policy", "full", "dms", "--cr", "4", "--limit"]


def test_the_job(job, capsys):
    samples, results = job(*FEW, "2")
    full, dms = results["rows"]
    assert [len(samples), full["windows"], full["tokens"]] == [4, 2, 40]
    assert abs(full["kl"]["mean"]) < 1e-6 and full["agreement"]["mean"] == 1 and full["achieved_cr"] == 1
    assert dms["kl"]["mean"] > 1e-6 and dms["achieved_cr"] > 1 and dms["cr"] == 4
    mean = np.mean([s["nll"] for s in samples if s["variant"] == "dms CR4"])
    assert dms["perplexity"]["mean"] == pytest.approx(np.exp(mean))
    assert dms["perplexity"]["low"] <= dms["perplexity"]["mean"] <= dms["perplexity"]["high"]
    more, _ = job(*FEW, "3")
    assert more[:4] == samples and len(more) == 6, "the run is continued with another limit"
    assert "KL, nats" in capsys.readouterr().out


def test_another_end_of_the_text_is_another_run(job, tmp_path, capsys):
    job(*FEW, "1")
    with (tmp_path / "text.txt").open("a") as file:
        file.write("Set d = q.\n")
    job(*FEW, "2", status=2)
    assert "holds a run of another configuration (text was" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--length", "40", "--prompt", "40"], "prompt=40: must lie in 1..length-1=39"),
        (["--length", "9000"], "the text has only"),
        (["--model", "mini"], "the mini model has its own problems"),
        (["--policy", "tova"], "needs --budget"),
        (["--chat", "Hello"], "has no chat template"),
    ],
)
def test_mistakes_end_with_one_line(job, capsys, arguments, message):
    folder = job(*arguments, status=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error.replace("\n", " ") and not folder.exists()


def test_mini_windows_are_held_out_problems_with_their_chains(tiny_family):
    lm = tiny_family("mini")
    for window in fidelity.mini_windows(lm.tokenizer, 3):
        text = lm.tokenizer.decode(window.tokens, skip_special_tokens=True)
        prompt = lm.tokenizer.decode(window.tokens[: window.prompt], skip_special_tokens=True)
        assert prompt.endswith("modulo 1000.\n") and text.endswith("}.") and text.startswith(prompt)


def test_a_share_does_not_depend_on_the_other_windows(tiny_family, tmp_path, monkeypatch):
    """The mini model's problems differ in length; a run that goes on with more of them keeps its budget."""
    monkeypatch.setattr(dms_jax, "load", tiny_family, raising=False)
    budget = ["--policy", "tova", "--budget", "0.02", "--batch-size", "1"]
    lengths = [len(window.tokens) for window in fidelity.mini_windows(tiny_family("mini").tokenizer, 4)]
    assert max(lengths) > lengths[0] + 100
    first = []
    for limit in ("1", "4"):
        assert fidelity.main([*budget, "--limit", limit, "--run-dir", str(tmp_path / limit)]) == 0
        first.append(run.read_jsonl(tmp_path / limit / "samples.jsonl")[0]["kl"])
    assert first[0] == pytest.approx(first[1], rel=1e-3)
