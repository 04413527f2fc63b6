"""NVIDIA's and FastDMS's folders both ways. Their formats are written out here and compared key by key."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dms_jax
from dms_jax import dms as equations
from dms_jax.config import ConfigError, DMSConfig, ModelConfig, RopeConfig
from dms_jax.weights.dms_keys import cr_from_hf, dms_from_hf
from dms_jax.weights.safetensors import WeightError
from tests.helpers import tiny
from tests.helpers.models import random_params

ADAPTER, QUERY = DMSConfig(7, "adapter", 1), DMSConfig(300, "query", 1, scale=20.0, logit_bias=1.5)
FASTDMS = DMSConfig(7, "query", scale=20.0, logit_bias=1.5)


def config(family: str, **changes) -> ModelConfig:
    values = {
        "qk_norm": family == "qwen3",
        "qkv_bias": family == "qwen2",
        "rope": RopeConfig(theta=500.0),
        "eos_ids": (2,),
    }
    return ModelConfig(family, 53, 2, 24, 6, 2, 10, 40, **{**values, **changes})


def model(family: str, dms: DMSConfig | None, dtype="bfloat16", cr=3.0, **changes) -> dms_jax.LM:
    shape = config(family, **changes)
    return dms_jax.LM(shape, random_params(shape, dms, dtype=dtype), dms=dms, cr=cr)


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def assert_same_model(one: dms_jax.LM, other: dms_jax.LM):
    ids = tiny.tokens(2, 30, 53)
    assert (one.config, one.dms, one.cr) == (other.config, other.dms, other.cr)
    np.testing.assert_array_equal(one.logits(ids, dms=one.dms), other.logits(ids, dms=other.dms))


# Every key by which NVIDIA's configuration class differs from Qwen3's, and the type of its value.
NVIDIA_KEYS = {
    "dms_alpha_scale": float, "dms_initial_alpha_offset": float, "dms_window_size": int, "dms_cr": int,
    "dms_paged_attention_block_size": int, "dms_disable_eviction": bool, "dms_separate_alpha": bool,
    "dms_alpha_per": str, "dms_tau": float, "dms_compile_limit": int, "dms_manual_inference_mode": bool,
    "dms_chunked_prefill": int, "dms_preallocate_for_tokens": int,
}  # fmt: skip


@pytest.mark.parametrize("dms", [ADAPTER, QUERY], ids=["adapter", "query"])
def test_a_folder_for_nvidia(dms, tmp_path):
    """What their classes take as arguments, with the conditions that they assert, and the tensors of their modules."""
    lm = model("qwen3", dms)
    dms_jax.save(lm, tmp_path, format="nvidia")
    raw = read(tmp_path)
    said = {key: value for key, value in raw.items() if key.startswith("dms_")}
    assert all(type(value) is NVIDIA_KEYS[key] for key, value in said.items()), said
    assert said["dms_window_size"] == dms.window > said["dms_paged_attention_block_size"] > 0
    assert said["dms_alpha_per"] in ("head", "layer") and said["dms_disable_eviction"] is False and said["dms_cr"] == 3
    assert (said["dms_alpha_scale"], said["dms_initial_alpha_offset"]) == (dms.scale, dms.logit_bias)
    assert said["dms_separate_alpha"] is (dms.gate == "adapter") and said["dms_tau"] == 0.1
    assert raw["model_type"] == "qwen3" and "architectures" not in raw and raw["dtype"] == "bfloat16"
    assert raw["auto_map"] == {
        "AutoConfig": "configuration_qwen3_dms.Qwen3ConfigDMS",
        "AutoModel": "modeling_qwen3_dms.Qwen3ModelDMS",
        "AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLMDMS",
    }
    from transformers import Qwen3Config, Qwen3ForCausalLM

    plain = Qwen3ForCausalLM(Qwen3Config(**{key: value for key, value in raw.items() if key not in said}))
    shapes = {name: tuple(value.shape) for name, value in plain.state_dict().items()}
    if dms.gate == "adapter":
        shapes |= {f"model.layers.{n}.self_attn.dms_proj_alpha.weight": (2, 24) for n in range(2)}
        shapes |= {f"model.layers.{n}.self_attn.dms_proj_alpha_norm.weight": (24,) for n in range(2)}
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in tensors.items()} == shapes
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert_same_model(dms_jax.load(tmp_path), lm)


def test_what_is_done_while_weights_are_read(tmp_path):
    """It gets the model with shapes for its parameters; its errors are those of `load`."""
    lm = model("llama", QUERY)
    dms_jax.save(lm, tmp_path)
    seen = []
    loaded = dms_jax.load(tmp_path, meanwhile=seen.append)
    (early,) = seen
    assert (early.config, early.dms, early.cr) == (loaded.config, loaded.dms, loaded.cr)
    assert jax.eval_shape(lambda: loaded.params) == early.params

    def broken(_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        dms_jax.load(tmp_path, meanwhile=broken)


def nvidia_folder(folder, separate: bool, **keys):
    """A tiny Qwen3 as transformers and NVIDIA's recipe write it; returns its tensors by name."""
    hf = tiny.hf_model(tiny.hf_config("qwen3"))
    tensors = {name: value.contiguous() for name, value in hf.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    if separate:
        for n in range(2):
            prefix = f"model.layers.{n}.self_attn.dms_proj_alpha"
            tensors[f"{prefix}.weight"] = torch.randn((2, 48), generator=generator)
            tensors[f"{prefix}_norm.weight"] = 1 + 0.2 * torch.randn(48, generator=generator)
    folder.mkdir()
    raw = {**hf.config.to_dict(), "dms_separate_alpha": separate, **keys}
    raw.pop("architectures", None)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return tensors


RELEASED = {
    "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0, "dms_window_size": 12, "dms_cr": 8, "dms_tau": 0.1,
    "dms_paged_attention_block_size": 8, "dms_disable_eviction": False, "dms_alpha_per": "head",
    "dms_manual_inference_mode": False, "dms_chunked_prefill": None, "dms_preallocate_for_tokens": 4096,
}  # fmt: skip


@pytest.mark.parametrize("separate", [True, False], ids=["adapter", "query"])
def test_a_folder_by_nvidia(separate, tmp_path):
    nvidia_folder(tmp_path / "model", separate, **RELEASED)
    lm = dms_jax.load(tmp_path / "model", dtype="float32")
    assert lm.dms == DMSConfig(12, "adapter" if separate else "query", decision_offset=1) and lm.cr == 8
    ids = tiny.tokens()
    if not separate:  # neurons of a random model are large enough to evict by
        assert np.abs(lm.logits(ids, dms=lm.dms) - lm.logits(ids)).max() > 1e-2
    nvidia_folder(tmp_path / "short", separate)
    assert dms_jax.load(tmp_path / "short").dms == dataclasses.replace(lm.dms, window=512)


def test_what_nvidia_keys_may_not_say():
    ours = {**RELEASED, "dms_separate_alpha": True}
    for key, value in (("dms_disable_eviction", True), ("dms_merge", 2), ("dms_separate_alpha", "yes"), ("dms_cr", 0)):
        with pytest.raises(ConfigError, match=f"{key}="):
            dms_from_hf({**ours, key: value})
            cr_from_hf({**ours, key: value})
    assert dms_from_hf({**ours, "dms_compile_limit": 72, "dms_chunked_prefill": 512}) == dms_from_hf(ours)


def test_an_adapter_alone_over_a_base(tmp_path):
    """A community file: the adapter's tensors and nothing else, neither metadata nor a configuration."""
    tensors = nvidia_folder(tmp_path / "whole", True, **RELEASED)
    adapter = {name: value for name, value in tensors.items() if "dms_proj" in name}
    hf = tiny.hf_model(tiny.hf_config("qwen3"))
    hf.save_pretrained(tmp_path / "base")
    alone = tmp_path / "alone.safetensors"
    save_file(adapter, alone)
    lm = dms_jax.load(tmp_path / "base", dtype="float32", gate=alone)
    assert lm.dms == DMSConfig(512, "adapter", 1)
    save_file(adapter, alone, {"format": "pt", "window": "16"})
    with pytest.raises(WeightError, match=r"alone.safetensors: metadata \['window'\] but no 'dms'"):
        dms_jax.load(tmp_path / "base", gate=alone)
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    lm = dms_jax.load(tmp_path / "base", dtype="float32", gate=alone)
    assert_same_model(lm, dms_jax.load(tmp_path / "whole", dtype="float32"))
    for name in sorted(adapter)[:2]:
        save_file({key: value for key, value in adapter.items() if key != name}, alone)
        with pytest.raises(WeightError, match=f"missing tensor {name}"):
            dms_jax.load(tmp_path / "base", gate=alone)
    save_file({"other": torch.ones(3)}, alone)
    with pytest.raises(WeightError, match=r"alone.safetensors: no 'dms' .* not a gate"):
        dms_jax.load(tmp_path / "base", gate=alone)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_folder_for_fastdms(family, tmp_path):
    """A plain folder of its registry's model, all about the gate in dms_metadata.json."""
    lm = model(family, FASTDMS)
    dms_jax.save(lm, tmp_path, format="fastdms")
    raw = read(tmp_path)
    assert not any(key.startswith("dms_") or key == "auto_map" for key in raw)
    assert raw["model_type"] == family and raw["architectures"] == [f"{tiny.HF_CLASSES[family]}ForCausalLM"]
    assert read(tmp_path, "dms_metadata.json") == {
        "window_size": 7, "alpha_scale": 20.0, "alpha_offset": 1.5, "target_cr": 3, "context_len": 4096,
    }  # fmt: skip
    assert not any("dms" in name for name in load_file(tmp_path / "model.safetensors"))
    assert_same_model(dms_jax.load(tmp_path), lm)
    dms_jax.save(lm, tmp_path)  # in our own format again: the metadata would be believed first
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_where_fastdms_looks(tmp_path):
    """In dms_metadata.json, then in the log beside the folder, then in config.json."""
    folder = tmp_path / "final"
    dms_jax.save(dms_jax.LM(config("llama"), random_params(config("llama"))), folder)
    assert dms_jax.load(folder).dms is None

    def said():
        lm = dms_jax.load(folder)
        assert (lm.dms.gate, lm.dms.decision_offset) == ("query", 0)
        return lm.dms.window, lm.dms.scale, lm.dms.logit_bias, lm.cr

    raw = read(folder)
    (folder / "config.json").write_text(json.dumps({**raw, "dms_alpha_scale": 30.0, "dms_cr": 4}))
    assert said() == (256, 30.0, 5.0, 4)
    (tmp_path / "training_log.json").write_text(json.dumps({"config": {"lr": 1}, "log": []}))
    assert said() == (256, 30.0, 5.0, 4)
    log = {"window_size": 9, "alpha_scale": 40.0, "alpha_offset": 2.0, "target_cr": 6, "lr": 1e-5}
    (tmp_path / "training_log.json").write_text(json.dumps({"config": log, "log": [{"step": 1}]}))
    assert said() == (9, 40.0, 2.0, 6)
    for metadata in ({"window_size": 5, "dms_alpha_offset": 1}, {"config": {"dms_window_size": 5, "alpha_offset": 1}}):
        (folder / "dms_metadata.json").write_text(json.dumps(metadata))
        assert said() == (5, 100.0, 1, None)
    (folder / "dms_metadata.json").write_text('{"window_size": -5}')
    with pytest.raises(ConfigError, match=r"dms_metadata.json: window_size=-5"):
        dms_jax.load(folder)


@pytest.mark.parametrize(
    ("form", "family", "dms", "match"),
    [
        ("nvidia", "llama", ADAPTER, "family='llama'"),
        ("nvidia", "qwen3", DMSConfig(7, "adapter"), "decision_offset=0"),
        ("nvidia", "qwen3", DMSConfig(1, "adapter", 1), "window=1"),
        ("nvidia", "qwen3", DMSConfig(7, "adapter", 1, sinks=1), "sinks=1"),
        ("nvidia", "qwen3", DMSConfig(7, "query", 1, neuron=3), "neuron=3"),
        ("nvidia", "qwen3", None, "format='nvidia'"),
        ("fastdms", "qwen2", FASTDMS, "family='qwen2'"),
        ("fastdms", "llama", ADAPTER, "gate='adapter'"),
        ("fastdms", "llama", DMSConfig(7, "query", 1), "decision_offset=1"),
        ("fastdms", "llama", DMSConfig(7, "query", per="layer"), "per='layer'"),
        ("fastdms", "llama", DMSConfig(7, "query", neuron=0), "neuron=0"),
        ("gguf", "llama", FASTDMS, "format='gguf'"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_say(form, family, dms, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        dms_jax.save(model(family, dms, cr=None), tmp_path, format=form)
    assert not list(tmp_path.iterdir())


def test_a_bias_of_the_adapter_cannot_be_said(tmp_path):
    with pytest.raises(ConfigError, match="qkv_bias=True"):
        dms_jax.save(model("qwen3", ADAPTER, qkv_bias=True, out_bias=True), tmp_path, format="nvidia")


def test_the_gate_in_the_dtype_of_the_model():
    """0.05005 is a bfloat16 whose product with 100 is 5.0049, which bfloat16 rounds to 5: not above 0 any more."""
    x = jnp.full((1, 1, 1), 0.050048828125, jnp.bfloat16)
    exact, rounded = DMSConfig(gate="adapter"), DMSConfig(gate="adapter", gate_dtype="model")
    assert equations.affine(x, exact).item() == pytest.approx(0.0048828125)
    assert equations.affine(x, rounded).item() == 0.0
    rng = np.random.default_rng(0)
    for dtype, theirs in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        x = jnp.asarray(rng.normal(0.05, 0.01, (2, 50, 3)), dtype)
        want = torch.tensor(np.asarray(x, np.float32)).to(theirs) * 100.0 - 5.0
        got = equations.affine(x, rounded)
        np.testing.assert_array_equal(got, want.float().numpy().swapaxes(1, 2))
