"""Hugging Face folders: config.json and safetensors. Reads raw dicts, needs no transformers.

The tensor names are the "hf" column of table.py.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dms_jax.config import ConfigError, DMSConfig, ModelConfig, RopeConfig, one_of, require
from dms_jax.models.gates import GATES, gate_name, gate_of
from dms_jax.types import Params
from dms_jax.weights.safetensors import Source, WeightError, open_safetensors, write_safetensors
from dms_jax.weights.table import Spec, read_params, saved, specs

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
HEAD_DIM = {"qwen3": 128}  # what Qwen3 means by an absent head_dim
LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2}  # what Llama means by absent ids
# Derived from the configuration by old exporters: never read.
DERIVED = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")

GATE_KEY = "dms"  # metadata of a gate's file: the config.json keys of its DMSConfig, in JSON
CR_KEY = "dms_cr"
# DMSConfig field -> the authors' config key; the last three are ours.
DMS_KEYS = {
    "scale": "dms_alpha_scale",
    "logit_bias": "dms_initial_alpha_offset",
    "window": "dms_window_size",
    "per": "dms_alpha_per",
    "tau": "dms_tau",
    "decision_offset": "dms_decision_offset",
    "neuron": "dms_neuron",
    "sinks": "dms_sinks",
}
# What their released code takes an absent key to mean; it reads each decision off the next token.
DMS_DEFAULTS = {"window": 512, "decision_offset": 1}


def _need(raw: Mapping[str, Any], key: str) -> Any:
    require(raw.get(key) is not None, key, raw.get(key), "the config needs it")
    return raw[key]


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json; ConfigError names the key and value of anything unsupported."""
    family = raw.get("model_type")
    one_of("model_type", family, tuple(ARCHITECTURES))
    _check_supported(raw, family)
    heads, width = _need(raw, "num_attention_heads"), _need(raw, "hidden_size")
    kv_heads = raw.get("num_key_value_heads")
    if "num_key_value_heads" not in raw:  # Llama means "as many as query heads", Qwen always writes it
        require(family == "llama", "num_key_value_heads", None, "the config needs it")
    head_dim = raw.get("head_dim", HEAD_DIM.get(family))
    bias = bool(raw.get("attention_bias", False)) and family != "qwen2"
    ids = {**LLAMA_IDS, **raw} if family == "llama" else raw
    return ModelConfig(
        family=family,
        vocab_size=_need(raw, "vocab_size"),
        num_layers=_need(raw, "num_hidden_layers"),
        model_dim=width,
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=width // heads if head_dim is None else head_dim,
        mlp_dim=_need(raw, "intermediate_size"),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope=_rope_from_hf(raw),
        qk_norm=family == "qwen3",
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)) and family == "llama",
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_positions=_max_positions(raw),
        bos_id=ids.get("bos_token_id"),
        eos_ids=id_tuple(ids.get("eos_token_id")),
        pad_id=raw.get("pad_token_id"),
    )


def id_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    """HF writes one id as a number, several as a list."""
    return () if ids is None else tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)


def _max_positions(raw: Mapping[str, Any]) -> int:
    return raw.get("max_position_embeddings") or (2048 if raw["model_type"] == "llama" else 32768)


def _check_supported(raw: Mapping[str, Any], family: str) -> None:
    """Raises ConfigError for a key that would change what the model computes in a way not implemented."""
    one_of("hidden_act", raw.get("hidden_act", "silu"), ("silu",))
    require(not raw.get("quantization_config"), "quantization_config", raw.get("quantization_config"),
            "quantized weights are not supported")  # fmt: skip
    factor = raw.get("partial_rotary_factor")
    require(factor in (None, 1), "partial_rotary_factor", factor, "only full rotation is supported")
    window = raw.get("sliding_window")
    kinds = raw.get("layer_types")
    if kinds is not None:
        require(set(kinds) <= {"full_attention"}, "layer_types", kinds, "only full_attention is supported")
    elif family == "llama":
        require(window is None, "sliding_window", window, "sliding-window attention is not supported")
    elif raw.get("use_sliding_window", False) and raw.get("sliding_window", 4096) is not None:
        # Layers from max_window_layers on would slide.
        full = raw.get("max_window_layers", 28)
        reason = f"sliding-window layers are not supported (max_window_layers={full})"
        require(full >= _need(raw, "num_hidden_layers"), "use_sliding_window", True, reason)


def _rope_from_hf(raw: Mapping[str, Any]) -> RopeConfig:
    """`rope_scaling` with `rope_theta` beside it (old), or `rope_parameters` with everything inside (new)."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)  # spelled once for each kind of layer
    theta = rope.get("rope_theta", raw.get("rope_theta")) or 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    one_of("rope_type", kind, ("default", "linear", "llama3", "yarn"))
    partial = rope.get("partial_rotary_factor")
    require(partial in (None, 1), "partial_rotary_factor", partial, "only full rotation is supported")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind, theta, _need(rope, "factor"))
    original = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original = original or _max_positions(raw)
    if kind == "llama3":
        low, high = _need(rope, "low_freq_factor"), _need(rope, "high_freq_factor")
        require(high > low, "high_freq_factor", high, f"must be above low_freq_factor={low}")
        return RopeConfig(kind, theta, _need(rope, "factor"), low, high, original)
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=rope.get("factor") or _max_positions(raw) / original,
        original_max_positions=original,
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        attention_factor=rope.get("attention_factor"),
        mscale=rope.get("mscale"),
        mscale_all_dim=rope.get("mscale_all_dim"),
        truncate=rope.get("truncate", True),
    )


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` without theta; a field that HF would derive is left out."""
    if rope.kind == "default":
        return {"rope_type": "default"}
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


def config_to_hf(config: ModelConfig, dms: DMSConfig | None = None, cr: float | None = None) -> dict[str, Any]:
    """config.json of a model, in the old and the new spelling of RoPE, so that every transformers reads it.

    Raises:
      ConfigError: biases that HF's class of this family cannot express.
    """
    c, family = config, config.family
    require(c.qk_norm == (family == "qwen3"), "qk_norm", c.qk_norm, f"cannot be said in a {family} config")
    plain = c.qkv_bias and not c.out_bias if family == "qwen2" else c.qkv_bias == c.out_bias
    require(plain, "qkv_bias", c.qkv_bias, f"with out_bias={c.out_bias} cannot be said in a {family} config")
    require(family == "llama" or not c.mlp_bias, "mlp_bias", c.mlp_bias, f"cannot be said in a {family} config")
    rope = _rope_to_hf(c.rope)
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
    if family == "llama":
        out["mlp_bias"] = c.mlp_bias
    return {**out, **dms_to_hf(dms, cr)}


def dms_to_hf(dms: DMSConfig | None, cr: float | None = None) -> dict[str, Any]:
    """The config.json keys of a retrofitted model; empty if it is not one."""
    if dms is None:
        return {}
    return {**gate_of(dms).foreign, **{key: getattr(dms, field) for field, key in DMS_KEYS.items()}, CR_KEY: cr}


def dms_from_hf(raw: Mapping[str, Any]) -> DMSConfig | None:
    """The DMSConfig in a config.json, or None. Without `dms_decision_offset` it is the authors' o = 1."""
    keys = {*DMS_KEYS.values(), CR_KEY, *(key for gate in GATES.values() for key in gate.foreign)}
    if not keys & raw.keys():
        return None
    values = DMS_DEFAULTS | {field: raw[key] for field, key in DMS_KEYS.items() if key in raw}
    return DMSConfig(gate=gate_name(raw), **values)


def cr_from_hf(raw: Mapping[str, Any]) -> float | None:
    """The compression ratio that the weights were retrofitted for, where a config.json says so."""
    return raw.get(CR_KEY)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or a ConfigError that names the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON ({error})") from error
    require(isinstance(value, dict), str(file), type(value).__name__, "expected a JSON object")
    return value


def read_folder(folder: Path, dtype: str) -> tuple[ModelConfig, Params, DMSConfig | None, float | None]:
    """An HF folder: config.json with model.safetensors, or with shards and their index; the last is the CR.

    Raises:
      ConfigError: an unsupported configuration.  WeightError: tensors that do not fit it.
    """
    raw = read_json(folder / "config.json")
    config, dms = config_from_hf(raw), dms_from_hf(raw)
    generation = folder / "generation_config.json"
    if generation.exists():  # some instruction-tuned models name their further end-of-turn tokens only there
        more = id_tuple(read_json(generation).get("eos_token_id"))
        config = dataclasses.replace(config, eos_ids=tuple(dict.fromkeys((*config.eos_ids, *more))))
    sources = _drop_redundant(config, open_folder(folder))
    return config, read_params(specs(config, dms), sources, dtype, str(folder)), dms, cr_from_hf(raw)


def open_folder(folder: Path) -> dict[str, Source]:
    """Every tensor of the folder by name; one in two shards, or not where the index says, is an error."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return open_safetensors(single)[0]
    if not index.exists():
        found = sorted(file.name for file in folder.glob("*.bin")) or sorted(f.name for f in folder.iterdir())
        raise WeightError(f"{folder}: no model.safetensors or index of shards among {', '.join(found[:8])}")
    places = read_json(index).get("weight_map", {})
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
    return sources


def _drop_redundant(config: ModelConfig, sources: dict[str, Source]) -> dict[str, Source]:
    """Leaves out what the configuration already says: RoPE tables, and lm_head equal to a tied embedding."""
    kept = {name: source for name, source in sources.items() if not DERIVED.fullmatch(name)}
    embedding = kept.get("model.embed_tokens.weight")
    if config.tie_embeddings and embedding and "lm_head.weight" in kept:
        head = kept.pop("lm_head.weight")
        same = head.shape == embedding.shape and all(
            np.array_equal(a, b) for (_, _, a), (_, _, b) in zip(head.pieces(), embedding.pieces(), strict=True)
        )
        if not same:
            raise WeightError(f"{head.file}: tensor lm_head.weight differs from the embedding it is tied to")
    return kept


def write_weights(file: Path, expected: list[Spec], params: Params, metadata: Mapping[str, str]) -> None:
    """A safetensors file of these parameters under HF names, each in its own dtype."""
    write_safetensors(file, {spec.name: saved(spec, params) for spec in expected}, metadata)
