"""GGUF: weights and tokenizers against llama.cpp's conventions as transformers reads them."""

import json
import math
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

import dms_jax
from dms_jax.config import ConfigError, RopeConfig
from dms_jax.weights.gguf import config_from_gguf
from dms_jax.weights.huggingface import config_from_hf, config_to_hf
from dms_jax.weights.safetensors import Source, WeightError
from tests.helpers import tiny
from tests.helpers.gguf_files import write_gguf


def gguf_model(tmp_path, family, shape="G3", rope="default", **changes):
    """A random HF torch model, our ModelConfig of it and its tensors."""
    model = tiny.hf_model(tiny.hf_config(family, shape, rope, **changes))
    config = config_from_hf(json.loads(model.config.to_json_string()))
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    if config.tie_embeddings:
        del tensors["lm_head.weight"]
    return model, config, tensors


CASES = [
    (family, shape, (n + m) % 2 == 0) for n, family in enumerate(tiny.HF_CLASSES) for m, shape in enumerate(tiny.SHAPES)
]


@pytest.mark.parametrize(("family", "shape", "tied"), CASES)
def test_weights_equal_transformers(tmp_path, family, shape, tied):
    bias = {"attention_bias": True, "mlp_bias": True} if family == "llama" and shape == "G7" else {}
    model, config, tensors = gguf_model(tmp_path, family, shape, tie_word_embeddings=tied, **bias)
    write_gguf(tmp_path / "m.gguf", config, tensors)
    lm = dms_jax.load(tmp_path / "m.gguf", dtype="float32")
    assert lm.config == config
    ids = tiny.tokens()
    np.testing.assert_allclose(lm.logits(ids), tiny.hf_logits(model, ids), atol=1e-4, rtol=0)
    half = dms_jax.load(tmp_path / "m.gguf", dtype="bfloat16").params
    for one, other in zip(jax.tree.leaves(half), jax.tree.leaves(lm.params), strict=True):
        np.testing.assert_array_equal(one, other.astype("bfloat16"))


@pytest.mark.parametrize("family", tiny.HF_CLASSES)
def test_transformers_reads_the_same_from_our_test_files(tmp_path, family):
    """The files these tests write follow llama.cpp's conventions: transformers' own GGUF loader agrees."""
    model, config, tensors = gguf_model(tmp_path, family, "G3", tie_word_embeddings=False)
    write_gguf(tmp_path / "m.gguf", config, tensors, metadata={"tokenizer.ggml.tokens": ["a"] * 97})
    again = tiny.hf_from_gguf(tmp_path / "m.gguf", config_to_hf(config))
    ids = tiny.tokens()
    np.testing.assert_allclose(tiny.hf_logits(again, ids), tiny.hf_logits(model, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_tensors(tmp_path, kind):
    _, config, tensors = gguf_model(tmp_path, "llama", "G1", hidden_size=64, head_dim=32, intermediate_size=96)
    write_gguf(tmp_path / "m.gguf", config, tensors, kind=kind)
    lm = dms_jax.load(tmp_path / "m.gguf", dtype="float32")
    qtype = gguf.GGMLQuantizationType[kind]

    def rounded(name):
        return gguf.quants.dequantize(gguf.quants.quantize(tensors[name], qtype), qtype)

    params = lm.params["layers_1"]
    np.testing.assert_array_equal(params["mlp"]["down"]["kernel"], rounded("model.layers.1.mlp.down_proj.weight").T)
    q = rounded("model.layers.1.self_attn.q_proj.weight")  # rows are quantised one by one, so order is no matter
    np.testing.assert_array_equal(params["attn"]["q"]["kernel"].reshape(64, -1), q.T)
    assert np.abs(q - tensors["model.layers.1.self_attn.q_proj.weight"]).max() < 0.1
    np.testing.assert_array_equal(lm.params["embed"]["embedding"], rounded("model.embed_tokens.weight"))


@pytest.mark.parametrize("rope", ["linear", "yarn", "yarn-attention"])
def test_rope_scaling_in_metadata(tmp_path, rope):
    model, config, tensors = gguf_model(tmp_path, "qwen2", rope=rope)
    kind = config.rope.kind
    metadata = {"qwen2.rope.scaling.type": kind, "qwen2.rope.scaling.factor": float(config.rope.factor)}
    if kind == "yarn":
        metadata["qwen2.rope.scaling.original_context_length"] = config.rope.original_max_positions
    if config.rope.attention_factor:  # llama.cpp multiplies what the factor implies
        metadata["qwen2.rope.scaling.attn_factor"] = config.rope.attention_factor / (0.1 * math.log(4) + 1)
    write_gguf(tmp_path / "m.gguf", config, tensors, metadata=metadata)
    ids = tiny.tokens()
    got = dms_jax.load(tmp_path / "m.gguf", dtype="float32").logits(ids)
    np.testing.assert_allclose(got, tiny.hf_logits(model, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_rope_factor_without_a_type_is_linear(tmp_path, key):
    """As in llama.cpp; 1 scales nothing, and beside rope_freqs.weight nobody has written it."""
    _, config, tensors = gguf_model(tmp_path, "llama", "G1")
    for factor, rope in ((2.5, RopeConfig("linear", 500.0, 2.5)), (1.0, RopeConfig(theta=500.0))):
        write_gguf(tmp_path / "m.gguf", config, tensors, metadata={f"llama.{key}": factor})
        assert dms_jax.load(tmp_path / "m.gguf").config.rope == rope
    extra = {"rope_freqs.weight": np.ones(4, np.float32)}
    write_gguf(tmp_path / "m.gguf", config, tensors, metadata={f"llama.{key}": 2.5}, extra=extra)
    with pytest.raises(ConfigError, match="m.gguf: rope.scaling.type='linear'"):
        dms_jax.load(tmp_path / "m.gguf")


def test_an_odd_alignment_is_refused_by_file_and_key(tmp_path, small):
    write_gguf(tmp_path / "m.gguf", *small, metadata={"general.alignment": "x"})
    with pytest.raises(ConfigError, match="m.gguf: general.alignment='x'"):
        dms_jax.load(tmp_path / "m.gguf")


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_rope_freqs(tmp_path, factor):
    parameters = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    model, config, tensors = gguf_model(
        tmp_path,
        "llama",
        "G1",
        hidden_size=64,
        head_dim=32,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    plain = 1 / 500000.0 ** (np.arange(0, 32, 2) / 32)
    divisors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    write_gguf(tmp_path / "m.gguf", config, tensors, extra={"rope_freqs.weight": divisors})
    assert dms_jax.load(tmp_path / "m.gguf", dtype="float32").config == config

    ones = np.ones(16, np.float32)
    write_gguf(tmp_path / "ones.gguf", config, tensors, extra={"rope_freqs.weight": ones})
    assert dms_jax.load(tmp_path / "ones.gguf").config.rope == RopeConfig(theta=500000.0)
    write_gguf(tmp_path / "odd.gguf", config, tensors, extra={"rope_freqs.weight": divisors[::-1].copy()})
    with pytest.raises(ConfigError, match="rope_freqs.weight=.* matches no llama3 scaling"):
        dms_jax.load(tmp_path / "odd.gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return gguf_model(tmp_path_factory.mktemp("small"), "qwen2", "G1", tie_word_embeddings=True)[1:]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("qwen2.expert_count", 4, "qwen2.expert_count=4"),
        ("qwen2.rope.scaling.type", "longrope", "rope.scaling.type='longrope'"),
        ("qwen2.rope.dimension_count", 4, "qwen2.rope.dimension_count=4"),
        ("split.count", 2, "split.count=2"),
    ],
)
def test_unsupported_models_name_key_and_value(small, key, value, message):
    sizes = {"embedding_length": 48, "feed_forward_length": 40, "block_count": 2, "context_length": 64}
    sizes |= {"attention.head_count": 4, "attention.key_length": 8, "attention.layer_norm_rms_epsilon": 1e-6}
    metadata = {"general.architecture": "qwen2", **{f"qwen2.{key}": size for key, size in sizes.items()}}
    source = Source("token_embd.weight", (97, 48), Path("x"), lambda start, stop: np.zeros((0, 48)))
    sources = {source.name: source}
    assert config_from_gguf(metadata, sources).num_kv_heads == 4
    with pytest.raises(ConfigError, match=message):
        config_from_gguf({**metadata, key: value}, sources)
    with pytest.raises(ConfigError, match="general.architecture='gemma'"):
        config_from_gguf({**metadata, "general.architecture": "gemma"}, sources)
    with pytest.raises(ConfigError, match=r"attention.head_count=\[4, 2\]"):
        config_from_gguf({**metadata, "qwen2.attention.head_count": [4, 2]}, sources)
    del metadata["qwen2.block_count"]
    with pytest.raises(ConfigError, match="qwen2.block_count=None"):
        config_from_gguf(metadata, sources)


def test_tensors_that_do_not_fit_are_named(tmp_path, small):
    config, tensors = small
    file = tmp_path / "m.gguf"
    write_gguf(file, config, tensors, drop=["model.layers.1.mlp.up_proj.weight"])
    with pytest.raises(WeightError, match="m.gguf: missing tensor blk.1.ffn_up.weight"):
        dms_jax.load(file)
    write_gguf(file, config, tensors, extra={"blk.2.ffn_up.weight": np.ones(3, np.float32)})
    with pytest.raises(WeightError, match="unexpected tensor blk.2.ffn_up.weight"):
        dms_jax.load(file)
    wrong = {**tensors, "model.norm.weight": np.ones(7, np.float32)}
    write_gguf(file, config, wrong)
    with pytest.raises(WeightError, match=r"tensor output_norm.weight has shape \(7,\), expected \(48,\)"):
        dms_jax.load(file)


def test_truncated_files_are_named(tmp_path, small):
    file = tmp_path / "m.gguf"
    write_gguf(file, *small)
    data = file.read_bytes()
    for cut in (3, 20, 300, len(data) // 2, len(data) - 4):
        file.write_bytes(data[:cut])
        with pytest.raises(WeightError, match="m.gguf: .*(truncated|GGUF)"):
            dms_jax.load(file)
    file.write_bytes(b"")
    with pytest.raises(WeightError, match="m.gguf"):
        dms_jax.load(file)
