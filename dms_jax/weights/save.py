"""Save: a model as a Hugging Face folder of ours, NVIDIA's or FastDMS's, or its gate alone."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from dms_jax.config import one_of, require
from dms_jax.models.gates import gate_of
from dms_jax.weights.dms_keys import GATE_KEY, METADATA, dms_to_hf, fastdms_metadata, nvidia_config
from dms_jax.weights.huggingface import config_to_hf, write_weights
from dms_jax.weights.lm import LM
from dms_jax.weights.safetensors import WeightError, open_safetensors
from dms_jax.weights.table import gate_specs, lookup, specs

WEIGHTS = "model.safetensors"
FORMATS = ("dms_jax", "nvidia", "fastdms")
MINE = {"format": "pt", "written_by": "dms_jax"}  # metadata of the weights: such a folder may be written over
NEW = ".dms_jax-save"  # where a folder's files are written before they take their names
# Of an earlier save in FastDMS's format, and of an earlier tokenizer: they would be believed.
STALE = (METADATA, "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


def save_gate(lm: LM, file: str | os.PathLike) -> None:
    """Writes the gate's own parameters, with its DMSConfig: a few hundred KB to lay over base weights.

    Raises:
      ConfigError: the model has no gate with parameters of its own, or `file` is there and no gate.
    """
    gate, file = gate_of(lm.dms), Path(file)
    has = gate is not None and bool(gate.tensors)
    require(has, "gate", lm.dms and lm.dms.gate, "no gate with parameters of its own")
    require(not file.exists() or GATE_KEY in _metadata(file), "file", str(file), "is there, and no gate")
    metadata = {"format": "pt", GATE_KEY: json.dumps(dms_to_hf(lm.dms, lm.cr))}
    write_weights(file, gate_specs(lm.config, lm.dms), lm.params, metadata)


def save(lm: LM, folder: str | os.PathLike, format: str = "dms_jax") -> None:
    """Writes a folder that HF transformers loads: configuration, model.safetensors and tokenizer.

    `format` says whose keys tell of the gate: "dms_jax", "nvidia" (Model-Optimizer's Qwen3) or "fastdms". `load` reads
    all three.

    Everything is written beside the folder's files first and moved in at the end, the weights first: a full
    disk or an interruption leaves what was there.

    Raises:
      ConfigError: a model that HF's classes or the format cannot express, or files of these names that `save` did not
        write.
      WeightError: parameters that do not fit the config.
    """
    documents, folder = _documents(lm, format), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / NEW
    shutil.rmtree(new, ignore_errors=True)  # of a save that was killed
    new.mkdir()
    try:
        write_weights(new / WEIGHTS, specs(lm.config, lm.dms), lm.params, MINE)
        for name, raw in documents.items():
            (new / name).write_text(json.dumps(raw, indent=2) + "\n")
        if lm.tokenizer is not None:
            lm.tokenizer.save_pretrained(new)
        files = sorted(new.iterdir(), key=lambda file: file.name != WEIGHTS)
        stale = STALE if _is_mine(folder) and lm.tokenizer is not None else STALE[:1]
        _check_replaceable(folder, files)
        for file in files:
            if file.is_dir():
                shutil.rmtree(folder / file.name, ignore_errors=True)
            os.replace(file, folder / file.name)
        for name in {*stale} - {file.name for file in files}:
            (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _documents(lm: LM, format: str) -> dict[str, dict[str, Any]]:
    """The JSON files of a folder by name."""
    one_of("format", format, FORMATS)
    raw = config_to_hf(lm.config)
    raw["dtype"] = str(lookup(lm.params, "embed/embedding").dtype)
    generation = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    more = {}
    if format == "dms_jax":
        raw |= dms_to_hf(lm.dms, lm.cr)
    elif format == "nvidia":
        raw |= nvidia_config(lm.config, lm.dms, lm.cr)
        del raw["architectures"]  # as in their own exports: auto_map says it
    else:
        more = {METADATA: fastdms_metadata(lm.config, lm.dms, lm.cr)}
    return {"config.json": raw, "generation_config.json": generation, **more}


def _check_replaceable(folder: Path, files: list[Path]) -> None:
    """Raises ConfigError for files of these names in a folder that `save` did not write."""
    mine = _is_mine(folder)
    for file in files:
        old = folder / file.name
        alike = old.is_dir() == file.is_dir() and (mine or old.is_file() and old.read_bytes() == file.read_bytes())
        replaceable = alike or not old.exists()
        require(replaceable, "folder", str(folder), f"holds a {file.name} that dms_jax did not write; choose another")


def _is_mine(folder: Path) -> bool:
    """Whether `save` wrote the weights of a folder."""
    return _metadata(folder / WEIGHTS).get("written_by") == MINE["written_by"]


def _metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; none if it is not one."""
    try:
        return open_safetensors(file)[1]
    except WeightError:
        return {}
