"""Parity with Hugging Face transformers (torch, float32) and the configuration both ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import dms_jax
from dms_jax.config import ConfigError, DMSConfig, ModelConfig, RopeConfig
from dms_jax.models.transformer import Block, Decoder, arange_positions, causal
from dms_jax.weights.dms_keys import cr_from_hf, dms_from_hf, dms_to_hf
from dms_jax.weights.huggingface import config_from_hf, config_to_hf
from tests.helpers import tiny

SHAPE_NAMES = tuple(tiny.SHAPES)
CASES = [
    (family, rope, SHAPE_NAMES[(n + m) % 3], (n + m) % 2 == 0, m % 2 == 0)
    for n, family in enumerate(tiny.HF_CLASSES)
    for m, rope in enumerate(tiny.ROPES)
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def pair(request, tmp_path):
    """A random HF model and its folder loaded by us."""
    family, rope, shape, tied, biased = request.param
    changes = {"tie_word_embeddings": tied}
    if family != "qwen2":
        changes["attention_bias"] = biased
    if family == "llama":
        changes["mlp_bias"] = biased
    model = tiny.hf_model(tiny.hf_config(family, shape, rope, **changes))
    model.save_pretrained(tmp_path / "hf")
    return model, dms_jax.load(tmp_path / "hf", dtype="float32"), tmp_path


def hidden_states(lm, ids):
    """Embeddings, each block's output (the last after the final norm), logits."""
    model, ids = Decoder(lm.config), jnp.asarray(ids)

    @jax.jit
    def run(params):
        positions = arange_positions(ids)
        return model.apply(
            {"params": params}, ids, positions, causal, method="logits", mutable=["intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, Block),
        )  # fmt: skip

    (logits, _), state = run(lm.params)
    blocks = [state["intermediates"][f"layers_{n}"]["__call__"][0][0] for n in range(lm.config.num_layers)]
    return [lm.config.embed_scale * lm.params["embed"]["embedding"][ids], *blocks], logits


def test_hidden_states_and_logits_equal_transformers_and_back(pair):
    model, lm, folder = pair
    ids = tiny.tokens()
    with torch.no_grad():
        want = model(torch.tensor(ids), output_hidden_states=True)
    ours, logits = hidden_states(lm, ids)
    assert want.logits.std() > 0.3, "weights too small to tell models apart"
    for mine, theirs in zip(ours[:-1], want.hidden_states[:-1], strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits, want.logits.numpy(), atol=1e-4, rtol=0)

    dms_jax.save(lm, folder / "ours")
    cls = type(model)
    again, info = cls.from_pretrained(folder / "ours", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    np.testing.assert_array_equal(tiny.hf_logits(again.eval(), ids), want.logits.numpy())


@pytest.mark.parametrize("family", tiny.HF_CLASSES)
def test_rope_kinds_differ_in_these_tests(family):
    """If two kinds gave equal logits, parity above would prove nothing about them."""
    ids = tiny.tokens(1)
    kinds = [k for k in tiny.ROPES if k != "default"]
    state = tiny.hf_model(tiny.hf_config(family)).state_dict()
    seen = []
    for rope in ("default", *kinds):
        model = tiny.hf_model(tiny.hf_config(family, rope=rope))
        model.load_state_dict(state)
        seen.append(tiny.hf_logits(model, ids))
    for n, one in enumerate(seen):
        for other in seen[:n]:
            assert np.abs(one - other).max() > 1e-2


def test_lm_logits_equal_transformers(tmp_path):
    model = tiny.hf_model(tiny.hf_config("qwen2", rope="yarn"))
    model.save_pretrained(tmp_path)
    ids = tiny.tokens(3, 200)  # longer than a block of attention
    with pytest.warns(UserWarning, match=r"sequences of up to 200 tokens, beyond the model's max_positions=128"):
        logits = dms_jax.load(tmp_path, dtype="float32").logits(ids)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, tiny.hf_logits(model, ids), atol=1e-4, rtol=0)


LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 128256,
}  # fmt: skip
R1_QWEN_15B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1536, "intermediate_size": 8960,
    "max_position_embeddings": 131072, "max_window_layers": 21, "model_type": "qwen2",
    "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False, "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip


def test_configs_as_released():
    llama = config_from_hf(LLAMA_32_1B)
    assert llama == ModelConfig(
        "llama", 128256, 16, 2048, 32, 8, 64, 8192, 1e-5,
        RopeConfig("llama3", 500000.0, 32.0, 1.0, 4.0, 8192),
        tie_embeddings=True, max_positions=131072, bos_id=128000, eos_ids=(128001, 128008, 128009),
    )  # fmt: skip
    r1 = config_from_hf(R1_QWEN_15B)
    assert (r1.qkv_bias, r1.out_bias, r1.qk_norm, r1.head_dim, r1.eos_ids) == (
        True,
        False,
        False,
        128,
        (151643,),
    )
    qwen3 = config_from_hf(QWEN3_8B)
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim, qwen3.rope.theta) == (True, False, 128, 1e6)
    llama2 = config_from_hf(LLAMA_2_7B)
    assert (llama2.head_dim, llama2.group_size, llama2.rope) == (128, 1, RopeConfig())


def test_absent_keys_mean_what_transformers_takes_them_to_mean():
    import transformers

    for raw, cls in ((LLAMA_2_7B, "LlamaConfig"), (QWEN3_8B, "Qwen3Config"), (R1_QWEN_15B, "Qwen2Config")):
        needed = ["model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
        needed += ["intermediate_size", *([] if cls == "LlamaConfig" else ["num_key_value_heads"])]
        short = {key: raw[key] for key in needed}
        full = getattr(transformers, cls)(**short).to_dict()
        assert config_from_hf(short) == config_from_hf(full)


def test_old_and_new_spelling_of_rope_agree():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    old = {**R1_QWEN_15B, "rope_scaling": yarn}
    new = {k: v for k, v in R1_QWEN_15B.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_theta": 10000, **yarn, "rope_type": "yarn"}
    nested = {**new, "rope_parameters": {"full_attention": new["rope_parameters"]}}
    assert config_from_hf(old) == config_from_hf(new) == config_from_hf(nested)
    assert config_from_hf(old).rope == RopeConfig("yarn", 10000, 4.0, original_max_positions=32768)
    without = {**old, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert config_from_hf(without).rope.original_max_positions == 131072


@pytest.mark.parametrize(
    ("base", "change", "key"),
    [
        (LLAMA_2_7B, {"model_type": "mistral"}, "model_type='mistral'"),
        (LLAMA_2_7B, {"model_type": None}, "model_type=None"),
        (LLAMA_2_7B, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LLAMA_2_7B, {"sliding_window": 4096}, "sliding_window=4096"),
        (LLAMA_2_7B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA_2_7B, {"quantization_config": {"bits": 4}}, "quantization_config="),
        (LLAMA_2_7B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        (LLAMA_2_7B, {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "short_factor=None"),
        (
            LLAMA_2_7B,
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 64,
                    "original_max_position_embeddings": 99,
                }
            },
            "max_position_embeddings=4096: longrope beyond",
        ),
        (LLAMA_2_7B, {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 2.0]}}, "rope.short_factor="),
        (LLAMA_2_7B, {"rope_scaling": {"rope_type": "linear"}}, "factor=None"),
        (LLAMA_2_7B, {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "rope.factor=0.5"),
        (
            LLAMA_32_1B,
            {"rope_scaling": {**LLAMA_32_1B["rope_scaling"], "low_freq_factor": 4.0}},
            "high_freq_factor",
        ),
        (LLAMA_2_7B, {"hidden_size": None}, "hidden_size=None"),
        (LLAMA_2_7B, {"num_key_value_heads": 5}, "num_kv_heads=5"),
        (R1_QWEN_15B, {"use_sliding_window": True}, "use_sliding_window=True"),
        (QWEN3_8B, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
    ],
)
def test_unsupported_configs_name_key_and_value(base, change, key):
    with pytest.raises(ConfigError, match=key):
        config_from_hf({**base, **change})


def test_sliding_window_that_no_layer_uses_is_fine():
    unused = {**R1_QWEN_15B, "use_sliding_window": True, "max_window_layers": 28}
    assert config_from_hf(unused) == config_from_hf(R1_QWEN_15B)


@pytest.mark.parametrize("raw", [LLAMA_32_1B, R1_QWEN_15B, QWEN3_8B, LLAMA_2_7B])
def test_config_round_trip(raw):
    config = config_from_hf(raw)
    rope = RopeConfig("yarn", 1e6, 4.0, original_max_positions=64, mscale=1.0, mscale_all_dim=0.5, truncate=False)
    for one in (config, dataclasses.replace(config, rope=rope, pad_id=7, eos_ids=(), bos_id=None)):
        written = config_to_hf(one)
        assert config_from_hf(written) == one
        old = {k: v for k, v in written.items() if k != "rope_parameters"}
        new = {k: v for k, v in written.items() if k not in ("rope_scaling", "rope_theta")}
        assert config_from_hf(old) == config_from_hf(new) == one


def test_biases_that_a_family_cannot_express_are_refused():
    config = dataclasses.replace(config_from_hf(LLAMA_2_7B), qkv_bias=True)
    with pytest.raises(ConfigError, match="qkv_bias"):
        config_to_hf(config)


@pytest.mark.parametrize(
    "dms",
    [
        DMSConfig(),
        DMSConfig(window=16, gate="adapter", decision_offset=1, per="layer"),
        DMSConfig(window=7, decision_offset=8, scale=3.5, logit_bias=-1.0, neuron=4, tau=0.3, sinks=3),
    ],
)
def test_dms_config_round_trip(dms):
    config = config_from_hf(QWEN3_8B)
    written = {**config_to_hf(config), **dms_to_hf(dms, 2.5)}
    assert dms_from_hf(written) == dms and cr_from_hf(written) == 2.5
    assert config_from_hf(written) == config


def test_dms_config_of_the_authors():
    assert dms_from_hf(QWEN3_8B) is None
    authors = {"dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0, "dms_window_size": 512,
               "dms_separate_alpha": True, "dms_alpha_per": "head", "dms_tau": 0.1, "dms_cr": 8,
               "dms_paged_attention_block_size": 256}  # fmt: skip
    assert dms_from_hf(authors) == DMSConfig(512, "adapter", decision_offset=1) and cr_from_hf(authors) == 8
    assert dms_from_hf({"dms_window_size": 256}) == DMSConfig(256, "query", decision_offset=1)
