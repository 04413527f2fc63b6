"""The configuration of a retrofit: what it refuses, what files it is read from, and its family."""

import dataclasses
import math

import pytest

from dms_jax.config import ConfigError, DMSConfig, load_yaml
from dms_jax.training.config import RetrofitConfig
from scripts import pretrain_mini
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
    ],
)
def test_config_names_the_field(field, value):
    with pytest.raises(ConfigError) as error:
        RetrofitConfig(**{field: value})
    assert str(error.value).startswith(f"{field}={value!r}: ")


def test_config_files_are_read_and_checked(tmp_path):
    settings = load_yaml(RetrofitConfig, "configs/mini_retrofit.yaml")
    assert settings.dms.gate == "query" and settings.learning_rate == 5e-4
    load_yaml(pretrain_mini.PretrainConfig, "configs/mini_pretrain.yaml")
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


def test_members_of_a_family():
    config = dataclasses.replace(CONFIG, max_cr=4.0, steps_per_cr=100, hold_steps=50)
    assert config.members() == {120: 2, 220: 3, 370: 4}
    assert dataclasses.replace(config, crs=(3.0, 1.5)).members() == {70: 1.5, 220: 3, 370: 4}
    assert dataclasses.replace(config, crs=(4.0,)).members() == {370: 4}
    adapter = dataclasses.replace(config, dms=DMSConfig(gate="adapter"), max_cr=2.5)
    assert adapter.members() == {100: 2, 200: 2.5}
