"""Save: a model as a Hugging Face folder, or its gate alone."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from dms_jax.config import require
from dms_jax.models.gates import gate_of
from dms_jax.weights.huggingface import GATE_KEY, config_to_hf, dms_to_hf, write_weights
from dms_jax.weights.lm import LM
from dms_jax.weights.table import gate_specs, lookup, specs


def save_gate(lm: LM, file: str | os.PathLike) -> None:
    """Writes the gate's own parameters, with its DMSConfig: a few hundred KB to lay over base weights."""
    gate = gate_of(lm.dms)
    has = gate is not None and bool(gate.tensors)
    require(has, "gate", lm.dms and lm.dms.gate, "no gate with parameters of its own")
    metadata = {"format": "pt", GATE_KEY: json.dumps(dms_to_hf(lm.dms, lm.cr))}
    write_weights(Path(file), gate_specs(lm.config, lm.dms), lm.params, metadata)


def save(lm: LM, folder: str | os.PathLike) -> None:
    """Writes a folder that HF transformers loads: configuration, model.safetensors and tokenizer.

    Everything is written beside the folder's files first and moved in at the end, the weights first: a full
    disk or an interruption leaves what was there.

    Raises:
      ConfigError: a model that HF's classes cannot express.
      WeightError: parameters that do not fit the config.
    """
    raw = config_to_hf(lm.config, lm.dms, lm.cr)
    raw["dtype"] = str(lookup(lm.params, "embed/embedding").dtype)
    generation = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        write_weights(new / "model.safetensors", specs(lm.config, lm.dms), lm.params, {"format": "pt"})
        (new / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        (new / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        if lm.tokenizer is not None:
            lm.tokenizer.save_pretrained(new)
        for file in sorted(new.iterdir(), key=lambda file: file.name != "model.safetensors"):
            if (folder / file.name).is_dir():
                shutil.rmtree(folder / file.name)
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
