"""Load: a model from a hub repository, a folder, a GGUF file or the bundled mini family."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flax import traverse_util

from dms_jax import programs
from dms_jax.config import ConfigError, DMSConfig, Ratio, described, fits, in_file, one_of, require
from dms_jax.models.gates import AdapterGate, gate_of
from dms_jax.types import Params
from dms_jax.weights.dms_keys import DMS_KEYS, GATE_KEY, cr_from_hf, dms_from_hf
from dms_jax.weights.gguf import read_gguf
from dms_jax.weights.gguf_tokenizer import refused_by_name
from dms_jax.weights.huggingface import read_config, read_weights
from dms_jax.weights.json_files import parse_json, read_json
from dms_jax.weights.lm import LM
from dms_jax.weights.safetensors import Source, WeightError, open_safetensors
from dms_jax.weights.table import DTYPES, gate_specs, read_params, shapes, specs

ASSETS = Path(__file__).parents[1] / "assets"  # mini/base, mini/cr4, ...; smollm2/gate_cr4.safetensors
BUNDLED_GATES = ("smollm2",)
SAMPLE = "A word."  # what a tokenizer is tried with
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Weights, configuration and tokenizers; no pickles, no code.
PATTERNS = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")


def load(
    source: str | os.PathLike,
    dtype: str = "bfloat16",
    gate: str | os.PathLike | None = None,
    cr: float | None = None,
    tokenizer: Any = None,
    allow_nonfinite: bool = False,
    meanwhile: Callable[[LM], Any] | None = None,
) -> LM:
    """Loads a model. Nothing but data is read: no torch, no pickle, no code from the source.

    From then on compiled programs are kept on disk for the next process (`programs.keep`).

    Args:
      source: a hub name "org/name", an HF folder, a .gguf file, or "mini", the bundled family.
      dtype: of the parameters: "bfloat16", "float16" or "float32".
      gate: a safetensors file to lay over base weights, from `save_gate` or with NVIDIA's names of an adapter; a folder
        of files of `save_gate` as `scripts.retrofit` writes it, of which `cr` then chooses gate_cr4.safetensors, say;
        or "smollm2", the bundled gates for SmolLM2-135M-Instruct, of which `cr` then chooses one (None: the original
        model).
      cr: the member of a retrofitted family to load: the sub-folder "cr4" for 4.
      tokenizer: used instead of the source's own.
      allow_nonfinite: read weights that are NaN or infinite as they are.
      meanwhile: called in a thread while weights are read, with the model, whose parameters are still shapes: see
        `generation.prepare`.
    Raises:
      ConfigError: an unsupported model, configuration, tokenizer or option.
      WeightError: weights that are damaged or do not fit the configuration.
      FileNotFoundError: no such source.
    """
    programs.keep()
    one_of("dtype", dtype, DTYPES)
    require(fits(cr, Ratio | None), "cr", cr, f"expected {described(Ratio)}")
    for key, value in (("source", source), ("gate", "none" if gate is None else gate)):
        require(fits(value, str | os.PathLike) and bool(str(value)), key, value, "expected a name or a path")
    asked = cr
    if gate is not None and str(gate) in BUNDLED_GATES:
        gate, cr = (None if cr is None else _gate_of_family(ASSETS / str(gate), cr)), None
    elif gate is not None and Path(gate).is_dir():
        require(cr is not None, "cr", cr, f"{gate} holds gates for several ratios: name one")
        gate, cr = _gate_of_family(Path(gate), cr), None
    path = _locate(source, cr)
    if path.is_file():
        lm, read = read_gguf(path, dtype, tokenizer, allow_nonfinite)
    else:
        config, dms, recorded = read_config(path)
        tokenizer = tokenizer or _read_tokenizer(path)  # before the weights: it may refuse, and is quick
        lm = LM(config, shapes(specs(config, dms), dtype), tokenizer, dms, recorded)
        read = functools.partial(read_weights, path, config, dms, dtype, allow_nonfinite)
    if gate is not None:
        lm, read = _with_gate(lm, read, Path(gate), dtype, allow_nonfinite)
    lm = lm if lm.cr or lm.dms is None else dataclasses.replace(lm, cr=asked)
    with ThreadPoolExecutor(1) as thread:
        beside = meanwhile and thread.submit(meanwhile, lm)
        lm = dataclasses.replace(lm, params=read())
        if beside:
            beside.result()
    return lm


def _gate_of_family(folder: Path, cr: float) -> Path:
    """The file of the gate for a ratio in a folder as `scripts.retrofit` writes it."""
    file = folder / f"gate_cr{cr:g}.safetensors"
    there = ", ".join(sorted(path.stem.removeprefix("gate_cr") for path in folder.glob("gate_cr*")))
    require(file.is_file(), "cr", cr, f"the gates in {folder.name} are for CR {there or 'none'}")
    return file


def _locate(source: str | os.PathLike, cr: float | None) -> Path:
    """The file or folder to read; downloads a hub name."""
    if str(source) == "mini":
        return _member(ASSETS / "mini", cr, "base")
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return _member(path, cr, "")
        exists = path.is_file() or path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a user or a folder that nobody may look into
        raise FileNotFoundError(f"{source}: not to be found ({error})") from error
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, or no regular one")
        require(cr is None, "cr", cr, "a GGUF file holds one model")
        return path
    if exists or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
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
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        ) from error


def _read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, None if it has none.

    Raises:
      ConfigError: transformers cannot read it; names the file.
    """
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    irregular = [f.name for pattern in PATTERNS for f in folder.glob(pattern) if not f.is_file()]
    require(not irregular, str(folder), irregular, "no regular file")  # transformers would wait for a FIFO without end
    from transformers import AutoTokenizer

    with refused_by_name(lambda: _damaged(folder)):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer.decode(tokenizer(SAMPLE)["input_ids"])  # some damage shows in use only
        return tokenizer


def _damaged(folder: Path) -> str:
    """The file that is to blame for a tokenizer that cannot be read."""
    for file in sorted(folder.glob("*.json")):
        if file.name != "config.json" and "index" not in file.name:
            read_json(file)  # raises
    file = folder / "tokenizer.json"
    if file.exists():
        from tokenizers import Tokenizer

        with refused_by_name(lambda: str(file)):
            alone = Tokenizer.from_file(str(file))
            alone.decode(alone.encode(SAMPLE).ids)
    return str(folder / "tokenizer_config.json")


def _with_gate(
    lm: LM, read: Callable[[], Params], file: Path, dtype: str, nonfinite: bool
) -> tuple[LM, Callable[[], Params]]:
    """The model with the gate of a file laid over it, and what then reads its parameters."""
    require(not file.is_dir(), "gate", str(file), "is a folder, expected a file from save_gate")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such gate file")
    sources, metadata = open_safetensors(file)
    dms, cr = _said_of_gate(file, sources, metadata)
    gate, mine = gate_of(dms), gate_of(lm.dms)
    require(gate is not None and bool(gate.tensors), "gate", dms and dms.gate, f"{file} holds no gate's parameters")
    # A model that lives with another gate, a borrowed neuron say, is not the one that this was trained over.
    same = mine is None or type(mine) is type(gate)
    require(same, "gate", lm.dms and lm.dms.gate, "the model has a gate already, this one belongs on the original")
    added = gate_specs(lm.config, dms)

    def read_both() -> Params:
        more = read_params(added, sources, dtype, str(file), nonfinite=nonfinite)
        return _laid_over(read(), more)

    return dataclasses.replace(lm, params=_laid_over(lm.params, shapes(added, dtype)), dms=dms, cr=cr), read_both


def _laid_over(params: Params, more: Params) -> Params:
    flat = {**traverse_util.flatten_dict(params), **traverse_util.flatten_dict(more)}
    return traverse_util.unflatten_dict(flat)


def _said_of_gate(
    file: Path, sources: Mapping[str, Source], metadata: Mapping[str, str]
) -> tuple[DMSConfig | None, float | None]:
    """A gate file's DMSConfig and CR: from its metadata, or for NVIDIA's adapters alone from the config.json beside it.

    Where neither says anything, it is how their recipe trains: see dms_keys.NVIDIA_DEFAULTS.
    """
    beside = file.with_name("config.json")
    if GATE_KEY in metadata:
        where, raw = file, parse_json(metadata[GATE_KEY], file)
    elif any(name.endswith(tensor.hf) for name in sources for tensor in AdapterGate.tensors):
        where, unknown = (beside if beside.is_file() else file), sorted(metadata.keys() - {"format"})
        if where is file and unknown:  # someone's settings, or ours under a damaged name: not to be guessed
            raise WeightError(f"{file}: metadata {unknown} but no {GATE_KEY!r}, and no config.json beside it")
        raw = {**(read_json(beside) if beside.is_file() else {}), **AdapterGate.foreign}
    else:
        raise WeightError(f"{file}: no {GATE_KEY!r} in its metadata and no adapter's tensors, not a gate")
    with in_file(where, DMS_KEYS):
        return dms_from_hf(raw), cr_from_hf(raw)
