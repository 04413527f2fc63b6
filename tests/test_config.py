"""The boundary of every configuration: types, ranges and what YAML may say."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.config import (
    CacheConfig,
    ConfigError,
    Count,
    DMSConfig,
    LatentConfig,
    ModelConfig,
    RopeConfig,
    SamplingConfig,
    Within,
    described,
    fits,
    take,
)
from dms_jax.config_files import from_saved, load_yaml
from dms_jax.models import transformer
from dms_jax.training.config import RetrofitConfig

MODEL = {"family": "llama", "vocab_size": 9, "num_layers": 1, "model_dim": 8, "num_heads": 2, "num_kv_heads": 1,
         "head_dim": 4, "mlp_dim": 8}  # fmt: skip
VALUES = (None, True, 0, 1, -1, 10**400, 0.5, float("nan"), float("inf"), "", "x", b"x", (), (1, 2), [1], [1, "x"], {})


@pytest.mark.parametrize(
    ("kind", "fitting"),
    [
        (int, (0, 1, -1, 10**400)),
        (float, (0, 1, -1, 0.5)),
        (bool, (True,)),
        (str, ("", "x")),
        (int | None, (None, 0, 1, -1, 10**400)),
        (Literal["x", 1], (1, "x")),
        (Count, (0, 1)),
        (Annotated[float, Within(0.5, 2)], (1, 0.5)),
        (tuple[int, ...], ((), (1, 2))),
        (tuple[int, int], ((1, 2),)),
        (tuple[int, str], ()),
        (list[int], ([1],)),
        (dict, ({},)),
        (Any, VALUES),
    ],
)
def test_what_fits_an_annotation(kind, fitting):
    """True is no number, 1 is not True, NaN and infinity are no floats."""
    for value in VALUES:
        expected = any(value is other or type(value) is type(other) and value == other for other in fitting)
        assert fits(value, kind) == expected, (value, described(kind))
    assert described(kind)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("cls", "given", "field", "values"),
    [
        (DMSConfig, {}, "window", (-1, 1.0, True, "8", None, 2**31)),
        (DMSConfig, {}, "scale", (NAN, INF, 1e39, "1")),
        (DMSConfig, {}, "logit_bias", (NAN, -INF)),
        (DMSConfig, {}, "tau", (0.0, -1.0, NAN, INF, 1e-40)),
        (DMSConfig, {}, "neuron", (0.5, "0")),
        (DMSConfig, {}, "sinks", (-1, 0.0)),
        (DMSConfig, {}, "gate", ("none", None, 1)),
        (RopeConfig, {}, "theta", (0, -1.0, NAN, INF, None)),
        (RopeConfig, {"kind": "linear"}, "factor", (0.5, NAN, INF, "2")),
        (RopeConfig, {"kind": "yarn", "original_max_positions": 8}, "beta_fast", (0.0, -1.0, 0.5, NAN)),
        (RopeConfig, {"kind": "yarn", "original_max_positions": 8}, "attention_factor", (0.0, NAN, INF)),
        (RopeConfig, {"kind": "yarn", "original_max_positions": 8}, "theta", (1,)),
        (RopeConfig, {"kind": "llama3", "original_max_positions": 8}, "high_freq_factor", (1.0, 0.5, NAN)),
        (RopeConfig, {}, "factor", (8.0,)),
        (RopeConfig, {"kind": "linear"}, "original_max_positions", (4096,)),
        (RopeConfig, {"kind": "llama3", "original_max_positions": 8}, "mscale", (1.0,)),
        (RopeConfig, {"kind": "yarn", "original_max_positions": 8}, "short_factor", ((1.0, 2.0),)),
        (ModelConfig, MODEL, "num_layers", (0, 10**18, 1.0)),
        (ModelConfig, MODEL, "vocab_size", (0, -1, 10**18)),
        (ModelConfig, MODEL, "norm_eps", (0.0, NAN, 2.0, -1e-6)),
        (ModelConfig, MODEL, "max_positions", (0, 1.5, 2**40)),
        (ModelConfig, MODEL, "tie_embeddings", (1, None, "no")),
        (ModelConfig, MODEL, "bos_id", (9, -1, 1.0, True)),
        (ModelConfig, MODEL, "eos_ids", ((2, 9), (-1,), 2, [2], ("2",))),
        (ModelConfig, MODEL, "head_dim", (3,)),
        (ModelConfig, MODEL, "num_heads", (17,)),
        (ModelConfig, MODEL | {"latent": LatentConfig(2, 2, 2, 2)}, "num_heads", (129,)),
        (ModelConfig, MODEL | {"latent": LatentConfig(2, 2, 2, 2)}, "qk_norm", (True,)),
        (CacheConfig, {}, "capacity", (0, 1.0, 10**18)),
        (SamplingConfig, {}, "temperature", (-1.0, NAN, INF)),
        (SamplingConfig, {}, "top_p", (0.0, 1.5, NAN)),
        (SamplingConfig, {}, "top_k", (-1, 1.0)),
    ],
)
def test_impossible_values_are_refused_by_name(cls, given, field, values):
    config = cls(**given)
    for value in values:
        with pytest.raises(ConfigError, match=rf"(rope\.)?{field}="):
            dataclasses.replace(config, **{field: value})


def test_numbers_of_numpy_become_pythons():
    """Equal configs are one to jit, and are saved as JSON."""
    config = DMSConfig(window=np.int64(3), scale=np.float32(2))
    assert config == DMSConfig(window=3, scale=2.0) and hash(config) == hash(DMSConfig(window=3, scale=2.0))
    assert type(config.window) is int and type(config.scale) is float
    large = DMSConfig(scale=10**18, window=9)
    assert type(large.scale) is float and type(large.window) is int


def test_a_neuron_outside_the_head_is_refused():
    model = ModelConfig(**MODEL)
    for neuron in (-5, 4):
        with pytest.raises(ConfigError, match=f"neuron={neuron}: must be a dim of a head, -4 to 3"):
            transformer.init(jnp.zeros(2, jnp.uint32), model, DMSConfig(neuron=neuron))
    transformer.init(jnp.zeros(2, jnp.uint32), model, DMSConfig(gate="adapter", neuron=4))


def test_an_unknown_remat_is_refused():
    decoder, tokens = transformer.Decoder(ModelConfig(**MODEL), remat="blok"), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ConfigError, match="remat='blok': expected one of 'none', 'dots', 'block'"):
        decoder.init(jnp.zeros(2, jnp.uint32), tokens, tokens, transformer.causal)


@dataclasses.dataclass(frozen=True)
class Inner:
    size: Count
    path: Path | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    rate: float = 1.0
    flag: bool = False
    inner: Inner = Inner(1)
    more: tuple[Inner, ...] = ()
    mesh: tuple[int, int, int] = (1, 1, 1)


def test_what_yaml_can_say(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("rate: 1e-5\ninner: {size: 2, path: a/b}\nmore: [{size: 3}, {size: 4}]\nmesh: [1, 2, 3]\n")
    want = Outer(1e-5, inner=Inner(2, Path("a/b")), more=(Inner(3), Inner(4)), mesh=(1, 2, 3))
    assert load_yaml(Outer, file) == want, "YAML takes 1e-5 for text"
    for text, message in (
        ("", "settings=None: expected keys with values"),
        ("- 1", "settings=.1.: expected keys"),
        ("rate: .nan", "rate=nan"),
        ("rate: yes", "rate=True"),
        ("rate: nan", "rate=nan"),
        ("flag: 1", "flag=1: expected true or false"),
        ("inner: {}", "inner.size=None: is needed"),
        ("inner: {size: -1}", "inner.size=-1"),
        ("inner: 3", "inner=3"),
        ("more: [{size: 1, sise: 2}]", r"more\[0\].sise=2: no such key, there are size, path"),
        ("mesh: [1, 2, 3, 4]", "mesh="),
        ("3: 4", "3=4: no such key"),
        ("rate: [1", "cannot be read as YAML"),
        ("[" * 5000, "cannot be read as YAML"),
        ("rate: \x00", "cannot be read as YAML"),
        ("a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]", "a=.* no such key"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message) as error:
            load_yaml(Outer, file)
        assert str(error.value).startswith(str(file)) and len(str(error.value)) < 1000
    file.write_bytes(b"rate: \xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_yaml(Outer, file)
    with pytest.raises(FileNotFoundError):
        load_yaml(Outer, tmp_path / "none.yaml")


def test_settings_of_older_versions_still_load():
    saved = dataclasses.asdict(RetrofitConfig(dms=DMSConfig(window=7, logit_bias=2.5)))
    saved["dms"]["offset"] = saved["dms"].pop("logit_bias")
    saved["dms"]["cr"] = None
    del saved["dms"]["sinks"]
    assert from_saved(RetrofitConfig, saved, "run.json").dms == DMSConfig(window=7, logit_bias=2.5)
    with pytest.raises(ConfigError, match="run.json: dms.window=-1"):
        from_saved(RetrofitConfig, {"dms": {"window": -1}}, "run.json")


def test_keys_of_foreign_files():
    values = {"a": 3, "b": None, "c": "x"}
    assert (take(values, "a", int), take(values, "b", int, 7), take(values, "d", int, 8)) == (3, 7, 8)
    for key, message in (("b", "b=None: the file needs it"), ("d", "d=None"), ("c", "c='x': expected a whole number")):
        with pytest.raises(ConfigError, match=message):
            take(values, key, int)
