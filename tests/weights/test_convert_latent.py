"""Latent attention: parity with Hugging Face transformers (torch, float32), and the configuration both ways."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import dms_jax
from dms_jax.config import ConfigError, ModelConfig, RopeConfig
from dms_jax.config_files import load_yaml
from dms_jax.training import flops
from dms_jax.weights.huggingface import config_from_hf, config_to_hf
from tests.helpers import tiny
from tests.weights.test_convert_hf import hidden_states

YARN_KINDS = ("default", "yarn", "yarn-mscale", "yarn-attention")
CASES = [
    (family, rope, ("ranked", "whole")[(n + m) % 2], m % 2 == 0)
    for n, family in enumerate(tiny.LATENT_CLASSES)
    for m, rope in enumerate((*YARN_KINDS, "linear"))
] + [("minicpm3", "longrope", "ranked", False)]


def hf_model(family, rope, shape, biased):
    changes = {"attention_bias": biased, "tie_word_embeddings": not biased}
    if family == "minicpm3":
        changes |= {"scale_emb": 3.0, "scale_depth": 1.7, "dim_model_base": 11, "mlp_bias": biased}
    if family == "deepseek_v2":
        changes["mlp_bias"] = biased
    if family in ("deepseek_v3", "youtu"):
        changes["rope_interleave"] = shape == "ranked"
    return tiny.hf_model(tiny.hf_config(family, shape, rope, **changes))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_hidden_states_and_logits_equal_transformers_and_back(case, tmp_path):
    model = hf_model(*case)
    model.save_pretrained(tmp_path / "hf")
    lm, ids = dms_jax.load(tmp_path / "hf", dtype="float32"), tiny.tokens()
    with torch.no_grad():
        want = model(torch.tensor(ids), output_hidden_states=True)
    ours, logits = hidden_states(lm, ids)
    assert want.logits.std() > 0.1, "weights too small to tell models apart"
    for mine, theirs in zip(ours[:-1], want.hidden_states[:-1], strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits, want.logits.numpy(), atol=1e-4, rtol=0)

    dms_jax.save(lm, tmp_path / "ours")
    again, info = type(model).from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    np.testing.assert_array_equal(tiny.hf_logits(again.eval(), ids), want.logits.numpy())
    assert dms_jax.load(tmp_path / "ours", dtype="float32").config == lm.config


def test_absent_keys_mean_what_transformers_takes_them_to_mean():
    import transformers

    needed = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 80}  # fmt: skip
    for family, name in tiny.LATENT_CLASSES.items():
        dense = {"first_k_dense_replace": 2} if family.startswith("deepseek") else {}
        if family == "youtu":
            needed["vocab_size"] = 128256  # its ids lie at the end
        full = getattr(transformers, f"{name}Config")(num_key_value_heads=4, **needed, **dense).to_dict()
        assert config_from_hf({"model_type": family, **needed, **dense}) == config_from_hf(full)


def test_configs_as_released():
    """Youtu-LLM-2B and MiniCPM3-4B; what is not said here the classes of transformers have as defaults."""
    youtu = config_from_hf({
        "model_type": "youtu", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 16, "rope_theta": 1600000,
        "rope_interleave": True, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    })  # fmt: skip
    assert (youtu.head_dim, youtu.value_dim, youtu.entry_numbers, youtu.group_size) == (576, 512, 576, 16)
    rope = {"type": "longrope", "short_factor": [1.1] * 16, "long_factor": [4.0] * 16,
            "original_max_position_embeddings": 32768}  # fmt: skip
    minicpm = config_from_hf({
        "model_type": "minicpm3", "vocab_size": 73448, "hidden_size": 2560, "intermediate_size": 6400,
        "num_hidden_layers": 62, "num_attention_heads": 40, "num_key_value_heads": 40, "rope_scaling": rope,
    })  # fmt: skip
    assert (minicpm.head_dim, minicpm.value_dim, minicpm.latent.value_dim) == (288, 256, 64)
    assert (minicpm.rope.short_factor, minicpm.depth_scale, minicpm.logit_dim) == ((1.1,) * 16, 1.4, 256)
    assert (youtu.latent.query_rank, youtu.tie_embeddings, youtu.rope.theta) == (1536, True, 1.6e6)


def test_the_shape_of_youtu_in_configs_is_that_of_its_class():
    import transformers

    with torch.device("meta"):
        whole = transformers.YoutuForCausalLM(transformers.YoutuConfig())
    model = load_yaml(ModelConfig, "configs/models/youtu_llm_2b.yaml")
    assert flops.num_params(model) == whole.num_parameters()
    assert model.entry_numbers == whole.config.kv_lora_rank + whole.config.qk_rope_head_dim


def raw(family="deepseek_v3", **changes):
    found = config_to_hf(config_from_hf(tiny.hf_config(family, "ranked").to_dict()))
    return {**found, **changes}


@pytest.mark.parametrize(
    "base, key",
    [
        (raw(first_k_dense_replace=1), "first_k_dense_replace=1: of 2 layers"),
        (raw("deepseek_v2", first_k_dense_replace=None), "first_k_dense_replace=None"),
        (raw(num_key_value_heads=2), "num_key_value_heads=2"),
        (raw("youtu", kv_lora_rank=0), "kv_lora_rank=0"),
        (raw("youtu", qk_rope_head_dim=7), "rope_dim=7"),
        (raw(rope_parameters={"rope_type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}, rope_scaling=None),
         "mscale_all_dim=1.0"),
    ],
)  # fmt: skip
def test_unsupported_configs_name_key_and_value(base, key):
    with pytest.raises(ConfigError, match=key):
        config_from_hf(base)


def test_a_file_is_named_with_its_own_key(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw("youtu", qk_rope_head_dim=7)))
    with pytest.raises(ConfigError, match="config.json: qk_rope_head_dim=7: RoPE needs an even dim"):
        dms_jax.load(tmp_path)


@pytest.mark.parametrize("family", tiny.LATENT_CLASSES)
def test_config_round_trip(family):
    config = config_from_hf(raw(family))
    rope = RopeConfig("yarn", 1e6, 4.0, original_max_positions=64, mscale=1.0, mscale_all_dim=0.5)
    whole = dataclasses.replace(config.latent, query_rank=None)
    for one in (config, dataclasses.replace(config, rope=rope, latent=whole)):
        assert config_from_hf(config_to_hf(one)) == one


def test_what_a_family_cannot_express_is_refused():
    youtu, minicpm = config_from_hf(raw("youtu")), config_from_hf(raw("minicpm3"))
    pairs = dataclasses.replace(minicpm.latent, interleaved=True)
    for config, key in (
        (dataclasses.replace(youtu, depth_scale=1.4), "depth_scale"),
        (dataclasses.replace(minicpm, latent=pairs), "latent.interleaved=True"),
        (dataclasses.replace(youtu, family="llama"), "latent="),
    ):
        with pytest.raises(ConfigError, match=key):
            config_to_hf(config)
