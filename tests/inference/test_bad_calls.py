"""What `generate` and a conversation refuse by name, before anything runs."""

import dataclasses

import jax
import numpy as np
import pytest

from dms_jax.config import ConfigError, DMSConfig
from dms_jax.inference import generation, sampling
from dms_jax.inference.chat import Conversation
from dms_jax.policies import TOVA
from tests.helpers.models import random_lm, tiny
from tests.helpers.tokenizers import letters

NASTY = (
    None, True, -1, 0, 1.5, 53, 2**31, 2**64, float("nan"), float("inf"), -0.5, "", "x", b"x", (), [[1]], [1.5], [True],
    [53], [-1], ["a"], [None], [2**70], {}, {1: 2}, Ellipsis, np.float32(0.5), np.zeros((2, 2)), np.float64("nan"),
)  # fmt: skip
BUDGETED = ("budget", "protect_prompt", "evict_every")  # options of policies with a budget
PROMPTS = [value for value in NASTY if not isinstance(value, str) and repr(value) not in ("[[1]]", "['a']")]


@pytest.fixture(scope="module")
def lm():
    return dataclasses.replace(random_lm(tiny()), tokenizer=letters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"policy": "dms"}, "policy='dms'"),
        ({"policy": "nope"}, "policy='nope'"),
        ({"dms": DMSConfig()}, "never retrofitted"),
        ({"cache": "nope"}, "cache='nope'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"budget": 0.5}, "budget=0.5: policy 'full' takes none"),
        ({"budget": 1.5, "policy": "tova"}, "budget=1.5: a share"),
        ({"cache": "masked", "quant": "int8"}, "quant='int8': masked storage does not quantize"),
        ({"stop": [1.5]}, r"stop=\[1.5\]"),
        ({"stop": [53]}, "stop=53: is outside the vocabulary, 0 to 52"),
        ({"policy": TOVA(((8, 8),))}, r"budget=.*, \(2, 2\)"),
        ({"seed": 2**64}, "seed="),
        ({"temperature": float("inf"), "seed": 1}, "temperature=inf"),
        ({"keys": np.zeros((1, 4), np.uint32)}, r"keys.shape=\(1, 4\): expected \(1, 2\)"),
    ],
)
def test_options(lm, options, message):
    with pytest.raises(ConfigError, match=message):
        generation.generate(lm, [[1]], **options)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(generation.GenerationConfig)])
def test_every_option_with_every_kind_of_value(lm, field):
    """Refused with the option's name, or good enough to build an engine with."""
    related = {"temperature", "top_k", "top_p", "storage", "stop", field}
    for value in NASTY:
        options = {"policy": "tova", "budget": 16} if field in BUDGETED else {}
        try:
            config = generation.GenerationConfig(**{**options, field: value})
            sampling.root_key(config.seed)
            generation.build(lm, 32, config)
        except ConfigError as error:
            assert str(error).partition("=")[0] in related, f"{field}={value!r}: {error}"
        else:
            fallback = field in ("stop", "policy", "dms", "engine", "devices", *BUDGETED[1:]) and value is None
            number = isinstance(value, (int, float, np.floating)) and 0 <= float(value) < 1e300
            assert fallback or number or field == "stop" and value == (), f"{field}={value!r} was accepted"
            assert isinstance(value, bool) == (field == "protect_prompt") or fallback, f"{field}={value!r} was accepted"


@pytest.mark.parametrize("prompts", [*PROMPTS, *([p] for p in PROMPTS)], ids=repr)
def test_prompts_that_are_none(lm, prompts):
    with pytest.raises(ConfigError, match=r"^prompts"):
        generation.encode(lm, prompts)


def test_one_string_is_one_prompt(lm):
    assert generation.encode(lm, "abc d") == generation.encode(lm, ["abc d"]) == [[1, 15, 13, 7]]
    assert generation.encode(lm, (np.array([1, 2]), [np.int64(3)])) == [[1, 2], [3]]
    with pytest.raises(ConfigError, match="tokenizer=None: this model has none: pass token ids"):
        generation.encode(random_lm(tiny()), ["text"])


def test_bad_turns(lm):
    talk = Conversation(lm, 32, page_size=4)
    for value in NASTY:
        with pytest.raises(ConfigError, match="^(max_new_tokens|length)="):
            talk.say([1], value)
    for value in PROMPTS:
        with pytest.raises(ConfigError, match="^prompt"):
            talk.say(value, 2)
    assert talk.tokens == []


def test_a_budget_of_numpy_is_a_share(lm):
    for share in (0.5, np.float32(0.5), np.float64(0.5)):
        config = generation.GenerationConfig(policy="tova", budget=share)
        assert generation.resolve_policy(config, None, 64) == TOVA(32)


def test_lengths_beyond_the_model_are_told_once(lm):
    short = dataclasses.replace(lm, config=dataclasses.replace(lm.config, max_positions=16))
    with pytest.warns(UserWarning) as told:
        generation.generate(short, [[1, 2]], 15, stop=[])
    (warning,) = told
    assert str(warning.message) == (
        "sequences of up to 17 tokens, beyond the model's max_positions=16 (max_position_embeddings)"
    )
    generation.generate(short, [[1, 2]], 14, stop=[])


def test_other_generators_of_jax_change_nothing(lm):
    want = generation.generate(lm, [[1, 2]], 4, temperature=1.0, stop=[]).tokens
    with jax.default_prng_impl("unsafe_rbg"):
        assert generation.generate(lm, [[1, 2]], 4, temperature=1.0, stop=[]).tokens == want
