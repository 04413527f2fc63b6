"""A model family that the package does not know: Mistral, which is a Llama under another name.

usage: python examples/new_family.py [FOLDER]     a Hugging Face folder of Mistral; by default a tiny random one
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

import dms_jax
from dms_jax.config import ModelConfig
from dms_jax.models import transformer

TOKENS = np.arange(12)[None]


def load_mistral(folder: Path, **options) -> dms_jax.LM:
    """Loads a Mistral folder: its tensors have Llama's names, its config.json says the same under another model_type.

    Raises:
      ConfigError: one with sliding-window attention, which is refused as for any Llama.
    """
    raw = json.loads((folder / "config.json").read_text())
    if raw["model_type"] != "mistral":
        raise dms_jax.ConfigError(f"model_type={raw['model_type']!r}: expected 'mistral'")
    with tempfile.TemporaryDirectory() as scratch:
        for file in folder.iterdir():
            (Path(scratch) / file.name).symlink_to(file.resolve())
        config = Path(scratch) / "config.json"
        config.unlink()
        config.write_text(json.dumps({**raw, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
        return dms_jax.load(scratch, **options)


def write_tiny(folder: Path) -> dms_jax.LM:
    """A random model in a folder that calls itself a Mistral."""
    model = ModelConfig("llama", 64, 2, 32, 4, 2, 8, 64, eos_ids=(2,), bos_id=1)
    lm = dms_jax.LM(model, transformer.init(jax.random.key(0), model))
    dms_jax.save(lm, folder)
    config = folder / "config.json"
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    config.write_text(json.dumps(json.loads(config.read_text()) | mistral))
    return lm


def main(folder: str | None = None) -> dms_jax.LM:
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            write_tiny(Path(scratch) / "mistral")
        lm = load_mistral(Path(folder or Path(scratch) / "mistral"), dtype="float32")
    out = dms_jax.generate(lm, [TOKENS[0].tolist()], max_new_tokens=8)
    print(f"{lm.config.num_layers} layers, {lm.config.num_kv_heads} KV heads; continues with {out.tokens[0][0]}")
    return lm


if __name__ == "__main__":
    main(*sys.argv[1:])
