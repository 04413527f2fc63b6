"""The configuration of a retrofit: what it refuses, what files it is read from, and its family."""

import dataclasses
import math

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dms_jax.config import ConfigError, DMSConfig, ModelConfig
from dms_jax.config_files import load_yaml
from dms_jax.inference.scheduler import EngineConfig
from dms_jax.policies import RKV, TOVA, Quest, RandomAttention, VaSEAttnV, VaSEDKV
from dms_jax.training.config import LoraConfig, RetrofitConfig, SourceConfig
from experiments.window_cells import Ablation
from scripts import pretrain_mini
from scripts.pretrain_mini import PretrainConfig
from tests.helpers.training import CONFIG


@pytest.mark.parametrize(
    "field, value",
    [
        ("kl", "both"),
        ("max_cr", 1.0),
        ("max_cr", 1e300),
        ("max_cr", math.inf),
        ("learning_rate", math.nan),
        ("learning_rate", 0.0),
        ("clip", -1.0),
        ("steps_per_cr", 0),
        ("batch_size", 0),
        ("retire_steps", -1),
        ("crs", (2.0, 9.0)),
        ("crs", (1.0,)),
        ("crs", (2.0, 2.001)),
        ("crs", (2.005,)),
        ("max_cr", 3.001),
    ],
)
def test_config_names_the_field(field, value):
    with pytest.raises(ConfigError) as error:
        RetrofitConfig(**{field: value})
    assert str(error.value).startswith(f"{field}={value!r}: ")


VALUES = (None, True, "", "x", -1, 0, 0.5, 1.5, 10**18, 1e300, math.nan, math.inf, np.float32(2), (), (1,), (-1, 2, 3),
          ("q",), ((),), ((9,), (9, 9)), [1], {}, object())  # fmt: skip
NUMBERS = (int, float, np.float32)


@pytest.mark.parametrize(
    "config",
    [RetrofitConfig(), LoraConfig(), SourceConfig("a.jsonl"), EngineConfig(), PretrainConfig(), Ablation(), TOVA(9),
     Quest(64), RKV(16), RandomAttention(16), VaSEAttnV(16), VaSEDKV(16)],
    ids=lambda config: type(config).__name__,
)  # fmt: skip
def test_every_field_with_every_kind_of_value(config):
    """Refused, with the name of the field or of one that it has to agree with; or of the default's kind, and finite."""
    for field in dataclasses.fields(config):
        default = getattr(config, field.name)
        for value in VALUES:
            try:
                changed = dataclasses.replace(config, **{field.name: value})
            except ConfigError as error:
                key, related = (
                    str(error).partition("=")[0].split(".")[-1],
                    {"accumulate", "pool", "max_cr", "text", "response", "budget"},
                )
                assert key in {field.name, *related}, f"{field.name}={value!r}: {error}"
                continue
            except TypeCheckError:  # the tests' own check of annotations, which comes first
                continue
            got, number = getattr(changed, field.name), isinstance(value, NUMBERS) and not isinstance(value, bool)
            assert isinstance(got, type(default)) or None in (got, default) or number, f"{field.name}={value!r}"
            if number:
                assert 0 <= got < (1e38 if isinstance(default, float) else 2**32), f"{field.name}={value!r}"
                assert type(got) in (int, float), f"{field.name}={value!r}"
            assert value is not True or isinstance(default, bool) or default is None, f"{field.name}={value!r}"


def test_config_files_are_read_and_checked(tmp_path):
    settings = load_yaml(RetrofitConfig, "configs/mini_retrofit.yaml")
    assert settings.dms.gate == "query" and settings.learning_rate == 5e-4
    load_yaml(pretrain_mini.PretrainConfig, "configs/mini_pretrain.yaml")
    for name in ("mini_latent_retrofit", "youtu_llm_2b"):
        assert load_yaml(RetrofitConfig, f"configs/{name}.yaml").mode == "adapter"
    mini, other = pretrain_mini.MODEL, load_yaml(ModelConfig, "configs/models/mini_latent.yaml")
    per_layer = mini.num_kv_heads * mini.entry_numbers
    assert other.entry_numbers == per_layer and other.vocab_size == mini.vocab_size, "as its header says"
    file = tmp_path / "config.yaml"
    for text, message in (
        ("learning_rat: 1", "learning_rat"),
        ("batch_size: many", "batch_size"),
        ("dms: {window: -3}", "window=-3"),
        ("kl: both", "kl='both'"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message) as error:
            load_yaml(RetrofitConfig, file)
        assert str(file) in str(error.value)


def test_a_low_rank_update_that_cannot_learn_to_evict():
    """The query gate's logits are made by q; an adapter is trained beside whatever projections there are."""
    lora = LoraConfig(targets=("k", "v"))
    with pytest.raises(ConfigError, match=r"lora.targets=\('k', 'v'\): gate='query' is learnt by q alone"):
        RetrofitConfig(mode="lora", lora=lora)
    assert RetrofitConfig(mode="lora", lora=lora, dms=DMSConfig(gate="adapter")).lora == lora


def test_members_of_a_family():
    config = dataclasses.replace(CONFIG, max_cr=4.0, steps_per_cr=100, hold_steps=50)
    assert config.members() == {120: 2, 220: 3, 370: 4}
    assert dataclasses.replace(config, crs=(3.0, 1.5)).members() == {70: 1.5, 220: 3, 370: 4}
    assert dataclasses.replace(config, crs=(4.0,)).members() == {370: 4}
    adapter = dataclasses.replace(config, dms=DMSConfig(gate="adapter"), max_cr=2.5)
    assert adapter.members() == {100: 2, 200: 2.5}
