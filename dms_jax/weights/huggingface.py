"""Hugging Face folders: config.json and safetensors. Reads raw dicts, needs no transformers.

The tensor names are the "hf" column of table.py.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dms_jax.config import (
    DMSConfig,
    Layers,
    ModelConfig,
    RopeConfig,
    Size,
    in_file,
    one_of,
    require,
    take,
)
from dms_jax.models.gates import gate_of
from dms_jax.types import Params
from dms_jax.weights import latent_keys
from dms_jax.weights.dms_keys import DMS_KEYS, cr_from_hf, dms_from_hf, with_fastdms
from dms_jax.weights.json_files import read_json
from dms_jax.weights.safetensors import Source, WeightError, open_safetensors, write_safetensors
from dms_jax.weights.table import Spec, read_params, saved, specs

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    **latent_keys.ARCHITECTURES,
}
MLP_BIASED = ("llama", *latent_keys.MLP_BIASED)
HEAD_DIM = {"qwen3": 128}  # what Qwen3 means by an absent head_dim
LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2}  # what Llama means by absent ids
# Derived from the configuration by old exporters: never read.
DERIVED = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")

# ModelConfig or RopeConfig field -> HF's key, for what goes wrong when several are compared.
HF_KEYS = {
    "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "bos_id": "bos_token_id",
    "eos_ids": "eos_token_id",
    "pad_id": "pad_token_id",
    "rope.theta": "rope_theta",
    **{f"latent.{field}": key for field, key in latent_keys.DIMS.items()},
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json; ConfigError names the key and value of anything unsupported or impossible."""
    family = take(raw, "model_type", Literal[*ARCHITECTURES])
    raw = {**latent_keys.DEFAULTS.get(family, {}), **raw}
    _check_supported(raw, family)
    heads, width = take(raw, "num_attention_heads", Size), take(raw, "hidden_size", Size)
    bias = take(raw, "attention_bias", bool, False) and family != "qwen2"
    ids = {**LLAMA_IDS, **raw} if family == "llama" else raw
    pad = take(raw, "pad_token_id", int, None)
    return ModelConfig(
        family=family,
        vocab_size=take(raw, "vocab_size", Size),
        num_layers=take(raw, "num_hidden_layers", Layers),
        model_dim=width,
        num_heads=heads,
        mlp_dim=take(raw, "intermediate_size", Size),
        norm_eps=_given(raw, "rms_norm_eps", float, 1e-6),
        rope=_rope_from_hf(raw),
        qk_norm=family == "qwen3",
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=take(raw, "mlp_bias", bool, False) and family in MLP_BIASED,
        tie_embeddings=take(raw, "tie_word_embeddings", bool, False),
        max_positions=_max_positions(raw),
        bos_id=take(ids, "bos_token_id", int, None),
        eos_ids=eos_ids(ids),
        pad_id=None if pad == -1 else pad,  # Llama's first conversions wrote -1 for none
        **_attention_from_hf(raw, family),
    )


def _attention_from_hf(raw: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Fields of ModelConfig that say what kind of attention it is."""
    if family in latent_keys.ARCHITECTURES:
        return latent_keys.latent_from_hf(raw, family)
    if family != "llama":  # Llama means "as many as query heads", Qwen always writes it
        require("num_key_value_heads" in raw, "num_key_value_heads", None, "the file needs it")
    heads = raw["num_attention_heads"]
    derived = raw["hidden_size"] // heads
    derived = HEAD_DIM.get(family, derived) if "head_dim" not in raw else derived
    kv_heads = take(raw, "num_key_value_heads", Size, heads)
    return {"num_kv_heads": kv_heads, "head_dim": take(raw, "head_dim", Size, derived)}


def eos_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """HF writes one id as a number, several as a list."""
    ids = take(raw, "eos_token_id", int | list[int], [])
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _given(raw: Mapping[str, Any], key: str, kind: Any, default: Any) -> Any:
    """The value of a key that may be absent, but not null."""
    return take(raw, key, kind) if key in raw else default


def _max_positions(raw: Mapping[str, Any]) -> int:
    return _given(raw, "max_position_embeddings", Size, 2048 if raw["model_type"] == "llama" else 32768)


def _check_supported(raw: Mapping[str, Any], family: str) -> None:
    """Raises ConfigError for a key that would change what the model computes in a way not implemented."""
    one_of("hidden_act", raw.get("hidden_act", "silu"), ("silu",))
    quantised = raw.get("quantization_config")
    require(not quantised, "quantization_config", quantised, "quantized weights are not supported")
    _check_full_rotation(raw)
    window = take(raw, "sliding_window", int, None)
    kinds = take(raw, "layer_types", list[str], None)
    if kinds is not None:
        require(set(kinds) <= {"full_attention"}, "layer_types", kinds, "only full_attention is supported")
    elif family not in ("qwen2", "qwen3"):
        require(window is None, "sliding_window", window, "sliding-window attention is not supported")
    elif take(raw, "use_sliding_window", bool, False) and raw.get("sliding_window", 4096) is not None:
        # Layers from max_window_layers on would slide.
        full = take(raw, "max_window_layers", int, 28)
        reason = f"sliding-window layers are not supported (max_window_layers={full})"
        require(full >= take(raw, "num_hidden_layers", Layers), "use_sliding_window", True, reason)


def _check_full_rotation(raw: Mapping[str, Any]) -> None:
    factor = raw.get("partial_rotary_factor")
    require(factor in (None, 1), "partial_rotary_factor", factor, "only full rotation is supported")


def _rope_from_hf(raw: Mapping[str, Any]) -> RopeConfig:
    """`rope_scaling` with `rope_theta` beside it (old), or `rope_parameters` with everything inside (new), or both."""
    maps = [take(raw, key, dict, {}) for key in ("rope_scaling", "rope_parameters")]
    old, *new = [_rope_from_map(raw, rope) for rope in maps if rope] or [_rope_from_map(raw, {})]
    require(new in ([], [old]), "rope_parameters", maps[1], "say something else than rope_scaling and rope_theta")
    return old


def _rope_from_map(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> RopeConfig:
    rope = take(rope, "full_attention", dict, rope)  # spelled once for each kind of layer
    place = rope if "rope_theta" in rope else raw
    theta = _given(place, "rope_theta", float, 10000.0)
    kind = rope.get("rope_type", rope.get("type", None if "factor" in rope else "default"))
    one_of("rope_type", kind, ("default", "linear", "llama3", "yarn", "longrope"))
    _check_full_rotation(rope)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind, theta, take(rope, "factor", float))
    original = take(rope, "original_max_position_embeddings", Size, _max_positions(raw))
    original = take(raw, "original_max_position_embeddings", Size, original)
    if kind == "longrope":
        return _longrope(raw, rope, theta, original)
    if kind == "llama3":
        low, high = take(rope, "low_freq_factor", float), take(rope, "high_freq_factor", float)
        return RopeConfig(kind, theta, take(rope, "factor", float), low, high, original)
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=take(rope, "factor", float, _max_positions(raw) / original),
        original_max_positions=original,
        beta_fast=take(rope, "beta_fast", float, 32.0),
        beta_slow=take(rope, "beta_slow", float, 1.0),
        attention_factor=take(rope, "attention_factor", float, None),
        mscale=take(rope, "mscale", float, None),
        mscale_all_dim=take(rope, "mscale_all_dim", float, None),
        truncate=take(rope, "truncate", bool, True),
    )


def _longrope(raw: Mapping[str, Any], rope: Mapping[str, Any], theta: float, original: int) -> RopeConfig:
    """Longrope of a model whose context was not lengthened, where the other factors and a scale do not matter."""
    longest, scale = _max_positions(raw), take(rope, "attention_factor", float, 1.0)
    beyond = "longrope beyond the original_max_position_embeddings is not supported"
    require(longest <= original, "max_position_embeddings", longest, beyond)
    require(scale == 1, "attention_factor", scale, beyond)
    return RopeConfig("longrope", theta, short_factor=tuple(take(rope, "short_factor", list[float])))


def _rope_to_hf(rope: RopeConfig, max_positions: int) -> dict[str, Any]:
    """`rope_parameters` without theta; a field that HF would derive is left out."""
    if rope.kind == "default":
        return {"rope_type": "default"}
    if rope.kind == "longrope":
        factors = {key: list(rope.short_factor) for key in ("short_factor", "long_factor")}
        return {"rope_type": "longrope", **factors, "original_max_position_embeddings": max_positions}
    out: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        out |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "yarn":
        out |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(rope, key) is not None:
                out[key] = getattr(rope, key)
        if not rope.truncate:
            out["truncate"] = False
    return out


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model, in the old and the new spelling of RoPE, so that every transformers reads it.

    Raises:
      ConfigError: biases that HF's class of this family cannot express.
    """
    c, family = config, config.family
    require(c.qk_norm == (family == "qwen3"), "qk_norm", c.qk_norm, f"cannot be said in a {family} config")
    plain = c.qkv_bias and not c.out_bias if family == "qwen2" else c.qkv_bias == c.out_bias
    require(plain, "qkv_bias", c.qkv_bias, f"with out_bias={c.out_bias} cannot be said in a {family} config")
    require(family in MLP_BIASED or not c.mlp_bias, "mlp_bias", c.mlp_bias, f"cannot be said in a {family} config")
    rope = _rope_to_hf(c.rope, c.max_positions)
    out = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.model_dim,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope.theta,
        "rope_scaling": None if c.rope.kind == "default" else rope,
        "rope_parameters": {**rope, "rope_theta": c.rope.theta},
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": c.bos_id,
        "eos_token_id": c.eos_ids[0] if len(c.eos_ids) == 1 else list(c.eos_ids) or None,
        "pad_token_id": c.pad_id,
    }
    if family != "qwen2":
        out["attention_bias"] = c.qkv_bias
    if family in MLP_BIASED:
        out["mlp_bias"] = c.mlp_bias
    return out | latent_keys.latent_to_hf(c)


def read_config(folder: Path) -> tuple[ModelConfig, DMSConfig | None, float | None]:
    """What an HF folder's config.json and generation_config.json say: the model, its gate, and its CR.

    Raises:
      ConfigError: an unsupported or impossible configuration; names the file and its key.
    """
    file, generation = folder / "config.json", folder / "generation_config.json"
    raw = with_fastdms(read_json(file), folder)
    with in_file(file, HF_KEYS | DMS_KEYS):
        config, dms, cr = config_from_hf(raw), dms_from_hf(raw), cr_from_hf(raw)
        if dms is not None:
            gate_of(dms).check(config)
    if generation.exists():  # some instruction-tuned models name their further end-of-turn tokens only there
        more = read_json(generation)
        with in_file(generation, HF_KEYS):
            ids = tuple(dict.fromkeys((*config.eos_ids, *eos_ids(more))))
            config = dataclasses.replace(config, eos_ids=ids)
    return config, dms, cr


def read_weights(folder: Path, config: ModelConfig, dms: DMSConfig | None, dtype: str, nonfinite: bool) -> Params:
    """The parameters of an HF folder, from model.safetensors or from shards and their index.

    Raises:
      WeightError: tensors that are damaged or do not fit the configuration.
    """
    sources = _drop_redundant(config, open_folder(folder))
    return read_params(specs(config, dms), sources, dtype, str(folder), nonfinite=nonfinite)


def open_folder(folder: Path) -> dict[str, Source]:
    """Every tensor of the folder by name; one in two shards, or not where the index says, is an error."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return open_safetensors(single)[0]
    if not index.exists():
        found = sorted(file.name for file in folder.glob("*.bin")) or sorted(f.name for f in folder.iterdir())
        raise WeightError(f"{folder}: no model.safetensors or index of shards among {', '.join(found[:8])}")
    with in_file(index):
        places = take(read_json(index), "weight_map", dict)
    for name, shard in places.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise WeightError(f"{index}: tensor {name} is said to be in {shard!r}, which is no file of this folder")
    sources: dict[str, Source] = {}
    for shard in sorted(set(places.values())):
        if not (folder / shard).is_file():
            raise WeightError(f"{folder}: shard {shard} named by {index.name} is missing")
        for name, source in open_safetensors(folder / shard)[0].items():
            if name in sources:
                raise WeightError(f"{folder}: tensor {name} is in {sources[name].file.name} and in {shard}")
            if places.get(name) != shard:
                raise WeightError(f"{folder}: tensor {name} is in {shard}, the index says {places.get(name)}")
            sources[name] = source
    absent = places.keys() - sources.keys()
    if absent:
        name = min(absent)
        raise WeightError(f"{folder}: tensor {name} is not in {places[name]}, where the index says it is")
    return sources


def _drop_redundant(config: ModelConfig, sources: dict[str, Source]) -> dict[str, Source]:
    """Leaves out what the configuration already says: RoPE tables, and lm_head equal to a tied embedding."""
    kept = {name: source for name, source in sources.items() if not DERIVED.fullmatch(name)}
    embedding = kept.get("model.embed_tokens.weight")
    if config.tie_embeddings and embedding and "lm_head.weight" in kept:
        head = kept.pop("lm_head.weight")
        same = head.shape == embedding.shape and all(
            np.array_equal(head.read(*rows), embedding.read(*rows)) for rows in embedding.pieces()
        )
        if not same:
            raise WeightError(f"{head.file}: tensor lm_head.weight differs from the embedding it is tied to")
    return kept


def write_weights(file: Path, expected: list[Spec], params: Params, metadata: Mapping[str, str]) -> None:
    """A safetensors file of these parameters under HF names, each in its own dtype."""
    write_safetensors(file, {spec.name: saved(spec, params) for spec in expected}, metadata)
