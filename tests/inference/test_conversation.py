"""A conversation answers as one long sequence would, though no turn is read twice."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.config import ConfigError, DMSConfig
from dms_jax.inference import decode
from dms_jax.inference.chat import Conversation
from dms_jax.inference.generation import generate
from dms_jax.inference.scheduler import EngineConfig
from dms_jax.weights.text import encode_turn
from tests.helpers.models import full_forward, random_lm, tiny, tiny_latent
from tests.helpers.tokenizers import TEMPLATE, letters

DMS = DMSConfig(window=3, scale=3.0, logit_bias=0.3)


LATENT = dataclasses.replace(DMS, gate="adapter", decision_offset=1)


@pytest.mark.parametrize("cache, model, rule", [
    ("paged", tiny(), DMS), ("masked", tiny(), DMS), ("paged", tiny_latent(), LATENT)
])  # fmt: skip
def test_three_turns_are_one_sequence(cache, model, rule):
    lm = dataclasses.replace(random_lm(model, rule), cr=8.0)  # more than it does: caches have to grow
    talk = Conversation(lm, 64, cache=cache, page_size=4, stop=[3, 11, 30], engine=EngineConfig(prefill_chunk=4))
    size = 0 if cache == "masked" else talk.runner.spec.kv_cache.pool(talk.runner.state.cache).size
    for turn in ([5, 6, 7, 8, 9], [12], [2] * 9):
        begun = len(talk.tokens) + len(turn)
        answer = talk.say(turn, 8)
        assert talk.tokens[begun:] == answer and len(answer) <= 8
    tokens = np.array([(talk.tokens + [0] * 64)[:64]])
    logits, alpha = full_forward(lm, tokens)
    greedy = logits[0].argmax(-1)
    assert talk.tokens[begun:] == greedy[begun - 1 : len(talk.tokens) - 1].tolist()
    assert 0.2 < alpha.mean() < 0.8
    # What lives is what the last token in the cache could see: evicted tokens of earlier turns are gone.
    last = len(talk.tokens) - 2
    seen = (np.arange(64) <= last) & ((last - np.arange(64) <= DMS.window) | ~alpha[:, 0])
    live = talk.runner.spec.kv_cache.live(talk.runner.state.cache)[:, 0]
    np.testing.assert_array_equal(jnp.stack(live), seen.sum(-1))
    # Of one head a page each is enough for all turns.
    assert cache == "masked" or model.latent or talk.runner.spec.kv_cache.pool(talk.runner.state.cache).size > size


def test_a_turn_that_is_too_long_loses_nothing():
    lm = dataclasses.replace(random_lm(tiny(), DMS), cr=8.0)  # more than it does: caches have to grow
    talk = Conversation(lm, 20, stop=[])
    first = talk.say([5, 6], 4)
    with pytest.raises(ConfigError, match="length=20: this turn may make 32 tokens"):
        talk.say([1, 2], 24)
    with pytest.raises(ValueError, match="not empty"):
        talk.say([], 4)
    assert talk.tokens == [5, 6, *first] and len(talk.say([7], 4)) == 4


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ("prompt", "first", "chunk"))
def test_a_turn_broken_off_is_read_on(where, monkeypatch):
    """What the cache had not seen of it comes before the next turn."""
    lm = dataclasses.replace(random_lm(tiny(), DMS), cr=8.0)  # more than it does: caches have to grow
    talk = Conversation(lm, 320, page_size=4, stop=[], engine=EngineConfig(prefill_chunk=4))
    calls = {"prompt": 0, "first": 0, "chunk": 0}

    def count(part):
        calls[part] += 1
        if part == where and calls[part] == (1 if part == "first" else 2):
            raise Broken

    def hear(tokens):
        count("first" if len(tokens) == 1 else "chunk")

    prefill = decode.prefill
    with monkeypatch.context() as patch:
        patch.setattr(decode, "prefill", lambda *given: (count("prompt"), prefill(*given))[1])
        with pytest.raises(Broken):
            talk.say([5, 6, 7, 8, 9, 10, 11], 150, hear)
    begun = len(talk.tokens) + 2
    assert begun == {"prompt": 9, "first": 10, "chunk": 42}[where]
    answer = talk.say([12, 13], 8)
    assert talk.tokens[begun:] == answer and len(answer) == 8
    logits, _ = full_forward(lm, np.array([talk.tokens]))
    assert answer == logits[0].argmax(-1)[begun - 1 : -1].tolist()


def test_several_devices_are_refused():
    with pytest.raises(ConfigError, match="devices=.*one device"):
        Conversation(random_lm(tiny(), DMS), 20, devices=(1, 2))


@pytest.mark.parametrize("before", ["<b>", ""])
@pytest.mark.parametrize("template", [TEMPLATE, "<b>" + TEMPLATE, None])
def test_turns_are_a_chat_with_one_beginning(before, template):
    """All turns together are what the template writes of the whole chat, but for the tokens of the answers."""
    lm = dataclasses.replace(random_lm(tiny()), tokenizer=letters(before, "", template))
    talk, texts, shown = Conversation(lm, 64, page_size=4, stop=[]), ("ab c", "d", "gh"), []
    for text in texts:
        begun = len(talk.tokens)
        assert talk.say(text, 3) == lm.tokenizer.decode(talk.tokens[-3:], skip_special_tokens=True)
        turn = encode_turn(lm.tokenizer, text, first=not shown)
        assert talk.tokens[begun:-3] == turn[bool(shown) and len(turn) > 1 and talk.tokens[begun - 1] == turn[0] :]
        shown += talk.tokens[begun:-3]
    assert shown[:1] == [1] if template != TEMPLATE and (template or before) else shown[:1] != [1]
    assert 1 not in shown[1:]


def test_the_end_of_an_answer_is_there_once():
    """The model made the token that ends its turn; the template writes it, too."""
    lm = dataclasses.replace(random_lm(tiny()), tokenizer=letters("", "", TEMPLATE))
    talk = Conversation(lm, 64, page_size=4, stop=[])
    talk.say("ab", 3)
    for last, closes in ((2, 0), (5, 1)):
        talk.tokens[-1] = last
        begun, closing = len(talk.tokens), encode_turn(lm.tokenizer, "c", first=False)
        talk.say("c", 2)
        assert closing[0] == 2 and talk.tokens[begun:-2] == closing[1 - closes :]


def test_a_conversation_draws_as_generate_does():
    """From all bits of the seed, whatever jax's default generator is."""
    lm = random_lm(tiny())
    for seed in (3, 2**32 + 3):
        alone = generate(lm, [[5, 6]], 6, temperature=1.0, seed=seed, stop=[]).tokens[0][0]
        assert Conversation(lm, 64, temperature=1.0, seed=seed, stop=[]).say([5, 6], 6) == alone
