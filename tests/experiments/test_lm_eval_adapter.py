"""The adapter for lm-evaluation-harness: its HF backend's scores for vanilla, and the cache's for every policy."""

import types

import numpy as np
import pytest

import dms_jax
from dms_jax.config import ConfigError
from tests.helpers.models import first_layers

TEXT = (
    "The lighthouse keeper climbed the stairs at dusk, as he had done for thirty years, and lit the lamp. Ships far "
    "out at sea saw its beam sweep over the water. In winter the wind howled around the tower; in summer gulls slept "
    "on the railing. Once a month a boat brought him bread, coffee, letters and news from the town. "
)


def instances(*arguments):
    """Requests as the harness makes them."""
    return [types.SimpleNamespace(args=given) for given in arguments]


def pairs(count: int, words: list[str]) -> list[tuple[str, str]]:
    """Contexts and continuations of many lengths."""
    made = []
    for n in range(count):
        length, start = 1 + (7 * n) % 60, (5 * n) % 40
        context = " ".join((words * 4)[start : start + length])
        continuation = " " + " ".join((words * 4)[start + length : start + length + 1 + n % 5])
        made.append((context if n % 9 else context + " ", continuation if n % 4 else " " + "wrong words entirely"))
    return [("", "Once upon a time"), *made][:count]


@pytest.mark.slow
def test_scores_and_texts_are_those_of_the_hf_backend(smollm2_file, tmp_path_factory):
    from lm_eval.models.huggingface import HFLM

    from experiments.lm_eval_adapter import DmsLM

    folder = tmp_path_factory.mktemp("smollm2")
    dms_jax.save(first_layers(dms_jax.load(smollm2_file, dtype="float32"), 4), folder)
    ours = DmsLM(model=str(folder), dtype="float32", batch_size=4, max_length=128)
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=4, max_length=128)
    counting = "1, 2, 3, 4,"
    (likely,) = ours.generate_until(instances((counting, {"until": [], "max_gen_toks": 4})), disable_tqdm=True)
    requests = instances((counting, likely), *pairs(19, TEXT.split()))
    mine, wanted = (np.array(m.loglikelihood(requests, disable_tqdm=True)) for m in (ours, theirs))
    np.testing.assert_allclose(mine[:, 0], wanted[:, 0], atol=1e-3)
    np.testing.assert_array_equal(mine[:, 1], wanted[:, 1])
    assert 0 < mine[:, 1].sum() < 20, "some continuations are the likeliest, some are not"
    long = instances((TEXT * 3,), (TEXT[:50],))
    mine, wanted = (m.loglikelihood_rolling(long, disable_tqdm=True) for m in (ours, theirs))
    np.testing.assert_allclose(mine, wanted, rtol=1e-5)
    kwargs = {"until": [".", "\n\n"], "max_gen_toks": 16, "do_sample": False}
    asked = instances((TEXT[:60], kwargs), (counting, {**kwargs, "until": ["7"]}))
    assert ours.generate_until(asked, disable_tqdm=True) == theirs.generate_until(asked, disable_tqdm=True)
    chat = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert ours.tok_encode(ours.apply_chat_template(chat)) == theirs.tok_encode(ours.apply_chat_template(chat))


@pytest.fixture
def tiny(tiny_family, monkeypatch):
    """Adapters on a tiny model with random weights, by their options."""
    monkeypatch.setattr(dms_jax, "load", tiny_family, raising=False)
    from experiments.lm_eval_adapter import DmsLM

    return lambda **options: DmsLM(model="x", **{"batch_size": 3, "max_length": 96, "page_size": 8, **options})


PROBLEM = "Let a = 123, b = 456, c = 789. Set d = a + b, e = d - c. Find e modulo 1000.\n"
BORDERS = (5, 20, 28, 36, 44, 54)  # between tokens
TINY = [(PROBLEM[:n], PROBLEM[n : n + 7]) for n in BORDERS] + [("", "Let "), ((PROBLEM * 3)[:-2], ".\nLet a")]


def brute_score(adapter, context: str, continuation: str) -> tuple[float, bool]:
    """One request, token by token, from the logits of the whole text under the hard mask."""
    lm, dms = adapter.loaded.lm, adapter.loaded.dms
    if context:
        whole = adapter.tok_encode(context + continuation)
        own = len(whole) - len(adapter.tok_encode(context))
    else:
        own = len(adapter.tok_encode(continuation, add_special_tokens=False))
        whole = [adapter.prefix_token_id, *adapter.tok_encode(continuation, add_special_tokens=False)]
    whole = whole[-(adapter.max_length + 1) :]
    total, best = 0.0, True
    every = np.asarray(lm.logits(np.array([whole + [0] * (100 - len(whole))]), dms=dms), np.float64)[0]
    for n in range(len(whole) - own, len(whole)):
        logits = every[n - 1]
        total += logits[whole[n]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        best &= logits.argmax() == whole[n]
    return total, best


@pytest.mark.parametrize("options", [{}, {"cr": 4.0}, {"cr": 4.0, "window": 2}], ids=["full", "dms", "window"])
def test_scores_are_those_of_the_forward_pass(tiny, options):
    lm = tiny(**options)
    found = lm.loglikelihood(instances(*TINY), disable_tqdm=True)
    for (context, continuation), (score, best) in zip(TINY, found, strict=True):
        wanted, likeliest = brute_score(lm, context, continuation)
        assert score == pytest.approx(wanted, abs=1e-3) and best == likeliest


def test_a_request_depends_on_no_other_and_a_budget_matters(tiny):
    full, roomy, tight = tiny(), tiny(policy="tova", budget=64), tiny(policy="tova", budget=4)
    requests = instances(*TINY)
    wanted = np.array(full.loglikelihood(requests, disable_tqdm=True))
    same = np.array(roomy.loglikelihood(requests[:6], disable_tqdm=True))
    np.testing.assert_allclose(same[:, 0], wanted[:6, 0], atol=1e-3)
    found = np.array(tight.loglikelihood(requests, disable_tqdm=True))
    assert np.abs(found - wanted)[:, 0].max() > 1e-3
    alone = [tight.loglikelihood([request], disable_tqdm=True)[0][0] for request in requests[2:4]]
    np.testing.assert_allclose(alone, found[2:4, 0], atol=1e-4)


def test_rolling_scores_are_sums_over_windows(tiny):
    lm = tiny(max_length=16)
    tokens = lm.tok_encode(PROBLEM)
    assert len(tokens) > 2 * 16
    total, context = 0.0, [lm.prefix_token_id]
    for start in range(0, len(tokens), 16):
        piece = tokens[start : start + 16]
        whole = (context + tokens)[max(0, start + len(piece) - 16) : start + 1 + len(piece)]
        logits = np.asarray(lm.loaded.lm.logits(np.array([whole[:-1]])))[0].astype(np.float64)
        likelihood = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total += sum(likelihood[n - len(piece), token] for n, token in enumerate(piece))
    assert lm.loglikelihood_rolling(instances((PROBLEM,)), disable_tqdm=True) == [pytest.approx(total, abs=1e-3)]


def test_generation_stops_where_it_should(tiny):
    lm = tiny(policy="tova", budget=0.5)
    greedy = {"until": [], "max_gen_toks": 24}
    sampled, hot = {**greedy, "do_sample": True}, {**greedy, "do_sample": True, "temperature": 9.0}
    asked = instances((PROBLEM, greedy), (PROBLEM[:40], greedy), (PROBLEM, sampled), (PROBLEM, hot))
    free = lm.generate_until(asked, disable_tqdm=True)
    assert free == lm.generate_until(asked, disable_tqdm=True) and len({free[0], free[2], free[3]}) > 1
    stop = free[3][len(free[3]) // 2]
    ended = lm.generate_until(instances((PROBLEM, {**hot, "until": [stop]})), disable_tqdm=True)
    direct = dms_jax.generate(lm.loaded.lm, [PROBLEM], 24, policy="tova", budget=0.5, page_size=8)
    assert free[0] == direct.text[0][0]
    assert stop not in ended[0]


def test_what_a_task_may_ask_for():
    from experiments.lm_eval_adapter import generation_options, groups

    stops, tokens, sampling = generation_options({"until": "\n", "do_sample": False, "temperature": 0.0})
    assert (stops, tokens, sampling.temperature) == (("\n",), 256, 0.0)
    given = {"until": ["a", ""], "max_gen_toks": 7, "temperature": 0.5, "top_p": 0.9}
    stops, tokens, sampling = generation_options(given)
    assert (stops, tokens, sampling.temperature, sampling.top_p) == (("a",), 7, 0.5, 0.9)
    assert list(groups([3, 1, 2, 0], [64, 64, 128, 64], 2)) == [[3, 1], [2], [0]]


def test_what_a_task_may_ask_for_as_text():
    """What the harness hands on of a command line, or of a YAML file with quotes."""
    from experiments.lm_eval_adapter import generation_options

    texts = {"until": 5, "do_sample": "False", "temperature": "0.7", "max_completion_tokens": "9", "num_beams": 1}
    stops, tokens, sampling = generation_options(texts)
    assert (stops, tokens, sampling.temperature) == (("5",), 9, 0.0)
    _, _, sampling = generation_options({"temperature": "0.7", "top_p": "0.9", "top_k": "3"})
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.9, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.2},
        {"num_beams": 4},
        {"max_gen_toks": 0},
        {"max_gen_toks": "many"},
        {"temperature": "hot"},
        {"do_sample": "perhaps"},
        {"temperature": 1.0, "top_p": 0.0},
    ],
)
def test_what_a_task_may_not_ask_for(options):
    from experiments.lm_eval_adapter import generation_options

    *_, name = options
    with pytest.raises(ConfigError, match=f"^{name}="):
        generation_options(options)


def test_an_empty_prompt(tiny, monkeypatch):
    """Of a tokenizer that puts nothing before a text: what begins a text without a context begins the answer."""
    lm = tiny()
    encode = lm.tok_encode
    monkeypatch.setattr(lm, "tok_encode", lambda text: encode(text, add_special_tokens=False))
    (text,) = lm.generate_until(instances(("", {"max_gen_toks": 8})), disable_tqdm=True)
    assert text == dms_jax.generate(lm.loaded.lm, [[lm.prefix_token_id]], 8).text[0][0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budgets": 1}, "budgets=1: no option of this model"),
        ({"policy": "nonsense"}, "policy='nonsense'"),
        ({"policy": "dms"}, "never retrofitted"),
        ({"policy": "tova"}, "budget=None: policy 'tova' needs one"),
        ({"budget": 0.5}, "budget=0.5: policy 'full' takes none"),
        ({"max_length": 0}, "max_length=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "many"}, "batch_size='many'"),
        ({"seed": "x"}, "seed='x'"),
        ({"cache": "x"}, "cache='x'"),
    ],
)
def test_impossible_options(tiny, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**options)


def test_no_room_for_a_prompt(tiny):
    with pytest.raises(ConfigError, match="leaves nothing of 10 tokens"):
        tiny(max_length=10).generate_until(instances((PROBLEM, {"max_gen_toks": 10})), disable_tqdm=True)


def test_the_harness_finds_the_model(tiny):
    from lm_eval.api.registry import get_model

    given = "model=x,batch_size=2,policy=tova,budget=0.5,cr=4"
    lm = get_model("dms_jax").create_from_arg_string(given, {"device": None})
    assert lm.settings.budget == 0.5 and lm.settings.rows == 2 and lm.loaded.variant.policy == "tova"
