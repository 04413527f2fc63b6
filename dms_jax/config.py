"""Frozen configurations, checked on creation. An error names the field and the value."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration asks for something impossible or unsupported; the message names the key and value."""


def require(condition: bool, key: str, value, reason: str) -> None:
    """Raises ConfigError with the key, the value and the reason unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}={value!r}: {reason}")


def one_of(key: str, value, allowed: tuple) -> None:
    require(value in allowed, key, value, f"expected one of {', '.join(map(repr, allowed))}")


def load_yaml(cls: type, path: str | Path):
    """An instance of the config dataclass `cls` from a YAML file; an unknown or mistyped key raises ConfigError."""
    import yaml

    return from_saved(cls, yaml.safe_load(Path(path).read_text()), path)


def from_saved(cls: type, values: Any, where: str | Path):
    """An instance of the config dataclass `cls` from the keys and values in a file, also of an older version's.

    Raises:
      ConfigError: an unknown or mistyped key, or an impossible value; names the file.
    """
    import dacite

    try:
        return dacite.from_dict(
            cls, _renamed(values), dacite.Config(strict=True, cast=[tuple], type_hooks={float: float})
        )
    except (dacite.DaciteError, ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _renamed(values: Any) -> Any:
    """Saved settings under today's names: `offset` of `dms` is `logit_bias`, and `cr` is not in it."""
    if not isinstance(values, dict) or not isinstance(values.get("dms"), dict):
        return values
    dms = {key: value for key, value in values["dms"].items() if key != "cr"}
    if "offset" in dms:
        dms["logit_bias"] = dms.pop("offset")
    return {**values, "dms": dms}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; the field names are those of HF's `rope_parameters`.

    kind: "default", "linear", "llama3" or "yarn". Fields that a kind does not use keep their defaults.
    """

    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_positions: int = 0  # llama3, yarn: the context the model was first trained with
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: scale of cos and sin; None derives it from factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dims

    def __post_init__(self):
        one_of("rope.kind", self.kind, ("default", "linear", "llama3", "yarn"))
        require(self.theta > 0, "rope.theta", self.theta, "must be positive")
        require(self.factor >= 1, "rope.factor", self.factor, "must be at least 1")
        if self.kind in ("llama3", "yarn"):
            n = self.original_max_positions
            require(n > 0, "rope.original_max_positions", n, f"{self.kind} needs it")


@dataclass(frozen=True)
class ModelConfig:
    """A Llama, Qwen2 or Qwen3 decoder, in the letters of types.py."""

    family: Literal["llama", "qwen2", "qwen3"]
    vocab_size: int  # V
    num_layers: int  # L
    model_dim: int  # E
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    mlp_dim: int  # F
    norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    max_positions: int = 4096
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self):
        one_of("family", self.family, ("llama", "qwen2", "qwen3"))
        for key in ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be positive")
        divides = self.num_heads % self.num_kv_heads == 0
        require(divides, "num_kv_heads", self.num_kv_heads, f"must divide num_heads={self.num_heads}")
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "RoPE needs an even head dim")

    @property
    def group_size(self) -> int:
        """G, query heads per KV head."""
        return self.num_heads // self.num_kv_heads


GATE_NAMES = ["query", "adapter"]  # `models.gates.add` appends to it


@dataclass(frozen=True)
class DMSConfig:
    """How tokens are chosen for eviction. Defaults: the paper's gate and window (section 3, appendix B).

    window: w, how many more tokens can read a token after it was marked.
    gate: "query" borrows a neuron of the first query head of each group; "adapter" adds a linear map.
    decision_offset: o, the decision for token j is read off token j + o. 0 is the paper's text, 1 the authors'
      released code, w immediate eviction (the ablation).
    scale, logit_bias: `logit = scale * x - logit_bias`.
    neuron: which dim of the first query head of a group the query gate borrows.
    per: "head" or "layer" (every head of a layer follows head 0).
    tau: temperature of the Gumbel-sigmoid in training.
    sinks: the first so many tokens of a sequence are never evicted. 0 is the paper; 1 keeps a model usable on text
      without the chat template it was retrofitted on.
    """

    window: int = 256
    gate: str = "query"
    decision_offset: int = 0
    scale: float = 100.0
    logit_bias: float = 5.0
    neuron: int = -1
    per: Literal["head", "layer"] = "head"
    tau: float = 0.1
    sinks: int = 0

    def __post_init__(self):
        one_of("gate", self.gate, tuple(GATE_NAMES))
        one_of("per", self.per, ("head", "layer"))
        require(self.window >= 0, "window", self.window, "must not be negative")
        o = self.decision_offset
        require(0 <= o <= self.window + 1, "decision_offset", o, f"must lie in 0..window+1={self.window + 1}")
        require(self.tau > 0, "tau", self.tau, "must be positive")
        require(self.sinks >= 0, "sinks", self.sinks, "must not be negative")


@dataclass(frozen=True)
class CacheConfig:
    """Where keys and values are kept.

    storage: "paged" keeps what is live, "masked" everything (for research and as the oracle).
    capacity: slots a head, in tokens: an upper bound.
    page_size: slots a page of paged storage, and of what a policy that reads by pages (Quest) chooses from.
    quant: "none", "int8" or "fp8" (e4m3) keys and values, with a scale for each token and head.
    """

    storage: Literal["paged", "masked"] = "paged"
    capacity: int = 4096
    page_size: int = 64
    quant: Literal["none", "int8", "fp8"] = "none"

    def __post_init__(self):
        one_of("cache", self.storage, ("paged", "masked"))
        one_of("quant", self.quant, ("none", "int8", "fp8"))
        for key in ("capacity", "page_size"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be positive")
        quantized = self.quant != "none"
        refused = f"{self.storage} storage does not quantize"
        require(not quantized or self.storage == "paged", "quant", self.quant, refused)


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. Temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        require(self.temperature >= 0, "temperature", self.temperature, "must not be negative")
        require(self.top_k >= 0, "top_k", self.top_k, "must not be negative")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must lie in (0, 1]")
