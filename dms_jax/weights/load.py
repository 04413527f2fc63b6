"""Load and save: a model from a hub repository, a folder, a GGUF file or the bundled mini family."""

import dataclasses
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from dms_jax.config import ConfigError, DMSConfig, ModelConfig, one_of, require
from dms_jax.models.transformer import Decoder, arange_positions, causal, hard_eviction
from dms_jax.types import Logits, Params, Tokens
from dms_jax.weights import gguf, gguf_tokenizer
from dms_jax.weights import huggingface as hf
from dms_jax.weights.safetensors import WeightError, open_safetensors
from dms_jax.weights.table import DTYPES, gate_specs, lookup, read_params, specs

ASSETS = Path(__file__).parents[1] / "assets"  # mini/base, mini/cr4, ...; smollm2/gate_cr4.safetensors
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Weights, configuration and tokenizers; no pickles, no code.
PATTERNS = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")
GATE_KEY = "dms"  # metadata of an adapter file: the config.json keys of its DMSConfig, in JSON


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class LM:
    """A model ready to run.

    params: the linen tree of `transformer.Decoder(config, dms)`.
    tokenizer: a transformers tokenizer, None if the source had none.
    dms: what the parameters were retrofitted for, None for an original model.
    """

    config: ModelConfig
    params: Params = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(default=None, repr=False)
    dms: DMSConfig | None = None

    def logits(self, tokens: Tokens, dms: DMSConfig | None = None) -> Logits:
        """`[B, T]` token ids -> `[B, T, V]` float32; with `dms` the hard delayed-eviction mask is on.

        Raises:
          ConfigError: an adapter gate is asked for and the parameters have none.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        require(tokens.ndim == 2, "tokens.shape", tokens.shape, "expected [B, T]")
        check_gate(self, dms)
        return _logits(self.params, tokens, self.config, dms or self.dms, dms is not None)


def check_gate(lm: LM, dms: DMSConfig | None) -> None:
    """Raises ConfigError if `dms` needs gate parameters that the model does not have."""
    if dms is not None and dms.gate == "adapter":
        have = "gate" in lm.params["layers_0"]["attn"]
        require(have, "gate", dms.gate, "this model has no adapter gate, load one with load(..., gate=file)")


@functools.partial(jax.jit, static_argnames=("config", "dms", "evict"))
def _logits(params: Params, tokens: Tokens, config: ModelConfig, dms: DMSConfig | None, evict: bool) -> Logits:
    B, T = tokens.shape
    attend = hard_eviction(dms, jnp.full((B,), T)) if evict else causal
    positions = arange_positions(tokens)
    return Decoder(config, dms).apply({"params": params}, tokens, positions, attend, method="logits")[0]


def load(
    source: str | os.PathLike,
    dtype: str = "bfloat16",
    gate: str | os.PathLike | None = None,
    cr: float | None = None,
    tokenizer: Any = None,
) -> LM:
    """Loads a model. Nothing but data is read: no torch, no pickle, no code from the source.

    Args:
      source: a hub name "org/name", an HF folder, a .gguf file, or "mini", the bundled family.
      dtype: of the parameters: "bfloat16", "float16" or "float32".
      gate: a safetensors file from `save_gate` to lay over base weights, or "smollm2", the bundled gates for
        SmolLM2-135M-Instruct, of which `cr` then chooses one (None: the original model).
      cr: the member of a retrofitted family to load: the sub-folder "cr4" for 4.
      tokenizer: used instead of the source's own.
    Raises:
      ConfigError: an unsupported model or option.  WeightError: weights that are damaged or do not fit it.
      FileNotFoundError: no such source.
    """
    one_of("dtype", dtype, DTYPES)
    if gate is not None and (ASSETS / str(gate)).is_dir():
        gate, cr = (None if cr is None else _bundled_gate(str(gate), cr)), None
    path = _locate(source, cr)
    if path.is_file():
        metadata, sources = gguf.open_gguf(path)
        tokenizer = tokenizer or gguf_tokenizer.build_tokenizer(metadata)  # first: it may refuse, and is quick
        lm = LM(*gguf.read_gguf(path, metadata, sources, dtype), tokenizer)
    else:
        config, params, dms = hf.read_folder(path, dtype)
        lm = LM(config, params, tokenizer or _read_tokenizer(path), dms)
    return lm if gate is None else _with_gate(lm, Path(gate), dtype)


def _bundled_gate(name: str, cr: float) -> Path:
    """The file of a gate that comes with the package."""
    file = ASSETS / name / f"gate_cr{cr:g}.safetensors"
    there = ", ".join(sorted(path.stem.removeprefix("gate_cr") for path in (ASSETS / name).glob("gate_cr*")))
    require(file.is_file(), "cr", cr, f"the bundled gates of {name!r} are for CR {there or 'none'}")
    return file


def _locate(source: str | os.PathLike, cr: float | None) -> Path:
    """The file or folder to read; downloads a hub name."""
    path = Path(source).expanduser()
    if str(source) == "mini":
        return _member(ASSETS / "mini", cr, "base")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        require(cr is None, "cr", cr, "a GGUF file holds one model")
        return path
    if path.is_dir():
        return _member(path, cr, "")
    if path.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f'{source}: neither an HF folder, a .gguf file, a hub name "org/name" nor "mini"')
    return _member(_download(str(source)), cr, "")


def _member(root: Path, cr: float | None, base: str) -> Path:
    """A model folder of a family: `base`, or "cr4" for cr=4."""
    folder = root / (base if cr is None else f"cr{cr:g}")
    if not (folder / "config.json").is_file():
        members = sorted(path.parent.name for path in root.glob("cr*/config.json"))
        if cr is not None:
            raise ConfigError(f"cr={cr!r}: {root.name} has {', '.join(members) or 'no retrofitted members'}")
        raise FileNotFoundError(f"{folder}: no config.json")
    return folder


def _download(name: str) -> Path:
    """A snapshot of a hub repository, without pickles and code."""
    import huggingface_hub

    try:
        patterns = [*PATTERNS, *(f"cr*/{pattern}" for pattern in PATTERNS)]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # offline, gated, misspelt: the library raises many kinds
        raise FileNotFoundError(
            f"{name}: no such folder here, and not to be had from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def _read_tokenizer(folder: Path) -> Any:
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _with_gate(lm: LM, file: Path, dtype: str) -> LM:
    """The model with the adapter gate of a file laid over it."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such gate file")
    sources, metadata = open_safetensors(file)
    if GATE_KEY not in metadata:
        raise WeightError(f"{file}: no {GATE_KEY!r} in its metadata, not a gate written by save_gate")
    dms = hf.dms_from_hf(json.loads(metadata[GATE_KEY]))
    kind, mine = dms and dms.gate, lm.dms and lm.dms.gate
    require(kind == "adapter", "gate", kind, f"{file} holds no adapter gate")
    # A borrowed neuron is hidden from attention; no adapter was trained against such a model.
    require(mine != "query", "gate", mine, "the model has a query gate, an adapter belongs on the original")
    added = read_params(gate_specs(lm.config), sources, dtype, str(file))
    flat = {**traverse_util.flatten_dict(lm.params), **traverse_util.flatten_dict(added)}
    return dataclasses.replace(lm, params=traverse_util.unflatten_dict(flat), dms=dms)


def save_gate(lm: LM, file: str | os.PathLike) -> None:
    """Writes the adapter gate alone, with its DMSConfig: a few hundred KB to lay over base weights."""
    require(lm.dms is not None and lm.dms.gate == "adapter", "gate", lm.dms and lm.dms.gate, "no adapter gate")
    metadata = {"format": "pt", GATE_KEY: json.dumps(hf.dms_to_hf(lm.dms))}
    hf.write_weights(Path(file), gate_specs(lm.config), lm.params, metadata)


def save(lm: LM, folder: str | os.PathLike) -> None:
    """Writes a folder that HF transformers loads: configuration, model.safetensors and tokenizer.

    Everything is written beside the folder's files first and moved in at the end, the weights first: a full
    disk or an interruption leaves what was there.

    Raises:
      ConfigError: a model that HF's classes cannot express.
      WeightError: parameters that do not fit the config.
    """
    raw = hf.config_to_hf(lm.config, lm.dms)
    raw["dtype"] = str(lookup(lm.params, "embed/embedding").dtype)
    generation = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        hf.write_weights(new / "model.safetensors", specs(lm.config, lm.dms), lm.params, {"format": "pt"})
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
