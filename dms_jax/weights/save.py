"""Save: a model as a Hugging Face folder, or its gate alone."""

import json
import os
import shutil
from pathlib import Path

from dms_jax.config import require
from dms_jax.models.gates import gate_of
from dms_jax.weights.huggingface import GATE_KEY, config_to_hf, dms_to_hf, write_weights
from dms_jax.weights.lm import LM
from dms_jax.weights.safetensors import WeightError, open_safetensors
from dms_jax.weights.table import gate_specs, lookup, specs

WEIGHTS = "model.safetensors"
MINE = {"format": "pt", "written_by": "dms_jax"}  # metadata of the weights: such a folder may be written over
NEW = ".dms_jax-save"  # where a folder's files are written before they take their names


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


def save(lm: LM, folder: str | os.PathLike) -> None:
    """Writes a folder that HF transformers loads: configuration, model.safetensors and tokenizer.

    Everything is written beside the folder's files first and moved in at the end, the weights first: a full
    disk or an interruption leaves what was there.

    Raises:
      ConfigError: a model that HF's classes cannot express, or files of these names that `save` did not write.
      WeightError: parameters that do not fit the config.
    """
    raw = config_to_hf(lm.config, lm.dms, lm.cr)
    raw["dtype"] = str(lookup(lm.params, "embed/embedding").dtype)
    generation = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / NEW
    shutil.rmtree(new, ignore_errors=True)  # of a save that was killed
    new.mkdir()
    try:
        write_weights(new / WEIGHTS, specs(lm.config, lm.dms), lm.params, MINE)
        (new / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        (new / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        if lm.tokenizer is not None:
            lm.tokenizer.save_pretrained(new)
        files = sorted(new.iterdir(), key=lambda file: file.name != WEIGHTS)
        _check_replaceable(folder, files)
        for file in files:
            if file.is_dir():
                shutil.rmtree(folder / file.name, ignore_errors=True)
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check_replaceable(folder: Path, files: list[Path]) -> None:
    """Raises ConfigError for files of these names in a folder that `save` did not write."""
    mine = _metadata(folder / WEIGHTS).get("written_by") == MINE["written_by"]
    for file in files:
        old = folder / file.name
        alike = old.is_dir() == file.is_dir() and (mine or old.is_file() and old.read_bytes() == file.read_bytes())
        replaceable = alike or not old.exists()
        require(replaceable, "folder", str(folder), f"holds a {file.name} that dms_jax did not write; choose another")


def _metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; none if it is not one."""
    try:
        return open_safetensors(file)[1]
    except WeightError:
        return {}
