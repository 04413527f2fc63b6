"""What files say about a retrofit: the config.json keys of NVIDIA's checkpoints and ours, and FastDMS's metadata.

NVIDIA's code (Model-Optimizer, experimental/dms) is for Qwen3 and reads each decision off the next token. FastDMS
(shisa-ai) is for Llama and Qwen3, borrows the last neuron of a head and reads a decision off the token itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dms_jax.config import DMSConfig, ModelConfig, Ratio, in_file, require, take
from dms_jax.models.gates import GATES, Gate, gate_name, gate_of
from dms_jax.weights.json_files import read_json

GATE_KEY = "dms"  # metadata of a gate's file: the config.json keys of its DMSConfig, in JSON
CR_KEY = "dms_cr"
# DMSConfig field -> NVIDIA's config key; the last four are ours.
DMS_KEYS = {
    "scale": "dms_alpha_scale",
    "logit_bias": "dms_initial_alpha_offset",
    "window": "dms_window_size",
    "per": "dms_alpha_per",
    "tau": "dms_tau",
    "decision_offset": "dms_decision_offset",
    "neuron": "dms_neuron",
    "sinks": "dms_sinks",
    "gate_dtype": "dms_gate_dtype",
}
OURS = ("decision_offset", "neuron", "sinks", "gate_dtype")
OFFSET = DMS_KEYS["decision_offset"]  # in every file of ours and in none of theirs
# What an absent key means: in NVIDIA's code, and in FastDMS's where a Llama has them in its config.json.
NVIDIA_DEFAULTS = {"window": 512, "decision_offset": 1}
FASTDMS_DEFAULTS = {"window": 256, "decision_offset": 0}

DISABLED, BLOCK = "dms_disable_eviction", "dms_paged_attention_block_size"
# How their cache is run: no value of these changes what the model computes.
WITHOUT_EFFECT = (
    BLOCK, "dms_compile_limit", "dms_manual_inference_mode", "dms_chunked_prefill", "dms_preallocate_for_tokens",
)  # fmt: skip
NVIDIA_CODE = {
    "AutoConfig": "configuration_qwen3_dms.Qwen3ConfigDMS",
    "AutoModel": "modeling_qwen3_dms.Qwen3ModelDMS",
    "AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLMDMS",
}
NVIDIA_BLOCK = 256  # tokens in a block of their cache, which must be smaller than the window

METADATA, TRAINING_LOG = "dms_metadata.json", "training_log.json"
# DMSConfig field -> FastDMS's names for it, the first of which it writes.
FASTDMS_KEYS = {
    "window": ("window_size", "dms_window_size"),
    "scale": ("alpha_scale", "dms_alpha_scale"),
    "logit_bias": ("alpha_offset", "dms_alpha_offset", "dms_initial_alpha_offset"),
}
FASTDMS_CR = ("target_cr", CR_KEY)


def dms_to_hf(dms: DMSConfig | None, cr: float | None = None) -> dict[str, Any]:
    """The config.json keys of a retrofitted model; empty if it is not one."""
    if dms is None:
        return {}
    return {**gate_of(dms).foreign, **{key: getattr(dms, field) for field, key in DMS_KEYS.items()}, CR_KEY: cr}


def dms_from_hf(raw: Mapping[str, Any]) -> DMSConfig | None:
    """The DMSConfig in a config.json, or None. Without `dms_decision_offset` it is NVIDIA's, or a Llama of FastDMS.

    Raises:
      ConfigError: a key of DMS that is not known, eviction switched off, or an impossible value.
    """
    said = {key for key in raw if key.startswith("dms_")}
    if not said:
        return None
    gates = {key for gate in GATES.values() for key in gate.foreign}
    for key in sorted(said - gates - {*DMS_KEYS.values(), CR_KEY, DISABLED, *WITHOUT_EFFECT}):
        require(False, key, raw[key], "this key of DMS is not known, and may change what the model computes")
    for key in sorted({*gates, DISABLED}):
        value = take(raw, key, bool, False)
        off = key == DISABLED and value
        require(not off, key, value, 'eviction would be off: set it to false, and generate with policy="full"')
    values: dict[str, Any] = {field: raw[key] for field, key in DMS_KEYS.items() if key in raw}
    defaults = FASTDMS_DEFAULTS if raw.get("model_type") == "llama" else NVIDIA_DEFAULTS
    return DMSConfig(**{"gate": gate_name(raw), **defaults, **values})


def cr_from_hf(raw: Mapping[str, Any]) -> float | None:
    """The compression ratio that the weights were retrofitted for, where a config.json says so."""
    return take(raw, CR_KEY, Ratio, None)


def with_fastdms(raw: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """A folder's config.json with what FastDMS's files say in its place, under the keys of `dms_to_hf`.

    Those are dms_metadata.json, and for want of it the training_log.json beside the folder.

    Raises:
      ConfigError: a damaged file; names it.
    """
    metadata, log = folder / METADATA, folder.parent / TRAINING_LOG
    if OFFSET in raw:
        return raw  # ours, which say more
    if metadata.is_file():
        file, said = metadata, read_json(metadata)
    elif log.is_file() and _is_fastdms(read_json(log).get("config")):
        file, said = log, read_json(log)
    else:
        return raw
    with in_file(file, {field: names[0] for field, names in FASTDMS_KEYS.items()}):
        return {**{key: value for key, value in raw.items() if not key.startswith("dms_")}, **_from_fastdms(said)}


def _is_fastdms(config: Any) -> bool:
    """Whether the settings in a training log are FastDMS's, not another program's."""
    return isinstance(config, dict) and {"alpha_scale", "alpha_offset"} <= config.keys()


def _from_fastdms(raw: Mapping[str, Any]) -> dict[str, Any]:
    said = take(raw, "config", dict, raw)
    present = {field: [name for name in names if name in said] for field, names in FASTDMS_KEYS.items()}
    values: dict[str, Any] = {field: said[names[0]] for field, names in present.items() if names}
    cr = next((take(said, name, Ratio, None) for name in FASTDMS_CR if name in said), None)
    return dms_to_hf(DMSConfig(**{**FASTDMS_DEFAULTS, **values}), cr)


def nvidia_config(config: ModelConfig, dms: DMSConfig | None, cr: float | None) -> dict[str, Any]:
    """What NVIDIA's classes read of a config.json besides the model's own keys.

    Raises:
      ConfigError: names the field of a model or gate that their code does not have.
    """
    gate = _gate(dms, "nvidia")
    require(config.family == "qwen3", "family", config.family, "NVIDIA's code is for qwen3")
    require(gate.dms.decision_offset == 1, "decision_offset", gate.dms.decision_offset, "NVIDIA's code has 1")
    require(gate.dms.window >= 2, "window", gate.dms.window, "NVIDIA's code needs a block of at least 1 below it")
    biased = config.qkv_bias and bool(gate.tensors)
    require(not biased, "qkv_bias", config.qkv_bias, "NVIDIA's adapter would have a bias, ours has none")
    _check_last_neuron(gate, config)
    theirs = {key: getattr(gate.dms, field) for field, key in DMS_KEYS.items() if field not in OURS}
    rounded = {} if cr is None else {CR_KEY: round(cr)}
    block = min(NVIDIA_BLOCK, gate.dms.window - 1)
    return {**gate.foreign, **theirs, **rounded, BLOCK: block, DISABLED: False, "auto_map": NVIDIA_CODE}


def fastdms_metadata(config: ModelConfig, dms: DMSConfig | None, cr: float | None) -> dict[str, Any]:
    """FastDMS's dms_metadata.json.

    Raises:
      ConfigError: names the field of a model or gate that its code does not have.
    """
    gate = _gate(dms, "fastdms")
    require(config.family in ("llama", "qwen3"), "family", config.family, "FastDMS is for llama and qwen3")
    require(gate.dms.gate == "query", "gate", gate.dms.gate, "FastDMS reads a borrowed neuron")
    require(gate.dms.decision_offset == 0, "decision_offset", gate.dms.decision_offset, "FastDMS has 0")
    require(gate.dms.per == "head", "per", gate.dms.per, "FastDMS decides for each head")
    _check_last_neuron(gate, config)
    values = {names[0]: getattr(gate.dms, field) for field, names in FASTDMS_KEYS.items()}
    rounded = None if cr is None else round(cr)
    return {**values, FASTDMS_CR[0]: rounded, "context_len": config.max_positions}


def _gate(dms: DMSConfig | None, form: str) -> Gate:
    """The gate of a model that another program is to run: one that it knows, and no sinks."""
    require(dms is not None, "format", form, "this model was never retrofitted (no DMSConfig)")
    gate = gate_of(DMSConfig() if dms is None else dms)
    require(bool(gate.foreign), "gate", gate.dms.gate, "other programs do not have this gate")
    require(gate.dms.sinks == 0, "sinks", gate.dms.sinks, "other programs keep no sinks: retrofit without")
    return gate


def _check_last_neuron(gate: Gate, config: ModelConfig) -> None:
    last = bool(gate.tensors) or gate.dms.neuron in (-1, config.head_dim - 1)
    require(last, "neuron", gate.dms.neuron, "other programs read the last neuron of a head")
