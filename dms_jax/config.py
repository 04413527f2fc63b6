"""Frozen configurations, checked on creation. An error names the field and the value."""

import contextlib
import functools
import reprlib
import sys
import types
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

_SHORT = reprlib.Repr()  # what a damaged file holds may be long, or nested without end
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 9, 9, 9
_SHORT.maxstring = _SHORT.maxother = 300


class ConfigError(ValueError):
    """A configuration asks for something impossible or unsupported; the message names the key and value."""


def require(condition: bool, key: str, value, reason: str) -> None:
    """Raises ConfigError with the key, the value and the reason unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}={_SHORT.repr(value)}: {reason}")


def one_of(key: str, value, allowed: tuple) -> None:
    require(fits(value, Literal[*allowed]), key, value, f"expected one of {', '.join(map(repr, allowed))}")


class Within(NamedTuple):
    """The range of a number, both ends included: `Annotated[int, Within(0, 9)]`."""

    least: float
    most: float


MAX_GROUP, MAX_LATENT_GROUP = 16, 128  # query heads to a KV head
HUGE, TINY = 3e38, 1.2e-38  # what float32 holds
Count = Annotated[int, Within(0, 2**31 - 2)]  # positions are int32
Size = Annotated[int, Within(1, 2**31 - 2)]
Seed = Annotated[int, Within(0, 2**32 - 1)]  # of what is drawn in training: JAX's and numpy's generators take all bits
Layers = Annotated[int, Within(1, 4096)]  # loops run over them before any tensor is compared
Real = Annotated[float, Within(-HUGE, HUGE)]
Positive = Annotated[float, Within(TINY, HUGE)]
Share = Annotated[float, Within(0, 1)]
Ratio = Annotated[float, Within(1, 2**31 - 2)]  # a compression ratio: tokens over tokens


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says. True is no number, and a float is finite."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    value = value.item() if isinstance(value, np.generic) else value
    if origin is Annotated:
        return fits(value, arguments[0]) and arguments[1].least <= value <= arguments[1].most
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in arguments)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in arguments)
    if origin in (tuple, list):
        if not isinstance(value, origin):
            return False
        if arguments[0] in (int, str) and set(map(type, value)) == {arguments[0]} and origin is list:
            return True  # a vocabulary is long
        each = arguments[:1] * len(value) if origin is list or arguments[-1] is ... else arguments
        return len(value) == len(each) and all(map(fits, value, each))
    if kind is Any:
        return True
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, origin or kind) and not (kind is int and isinstance(value, bool))


def described(kind: Any) -> str:
    """An annotation in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return f"{described(arguments[0])} from {arguments[1].least} to {arguments[1].most}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(described, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (tuple, list):
        return f"a list of {', '.join(described(each) for each in arguments if each is not ...)}"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", dict: "a map"}
    return words.get(origin or kind, "nothing" if kind is types.NoneType else getattr(kind, "__name__", str(kind)))


def check(config: Any, prefix: str = "") -> None:
    """Raises ConfigError unless each field of a config dataclass is what its annotation says.

    The first line of its `__post_init__`. Numbers of numpy become Python's, and whole ones floats where they should be:
    jitted functions take no whole number beyond 2^31.
    """
    for name, kind in field_kinds(type(config)).items():
        given = value = getattr(config, name)
        if isinstance(value, np.generic):
            value = value.item()
        require(fits(value, kind), prefix + name, value, f"expected {described(kind)}")
        if type(value) is int and float in members(kind) and int not in members(kind):
            value = float(value)
        if value is not given:
            object.__setattr__(config, name, value)


@functools.cache
def field_kinds(cls: type) -> dict[str, Any]:
    """The annotation of each field of a config dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {each.name: hints[each.name] for each in fields(cls)}


@contextlib.contextmanager
def in_file(where: str | Path, names: Mapping[str, str] = types.MappingProxyType({})) -> Iterator[None]:
    """ConfigErrors of the body name the file, and its own key where `names` has one for our field."""
    try:
        yield
    except ConfigError as error:
        key, *rest = str(error).partition("=")
        raise ConfigError(f"{where}: {names.get(key, key)}{''.join(rest)}") from error


def take(values: Mapping[str, Any], key: str, kind: Any, default: Any = MISSING) -> Any:
    """The value of a foreign key, checked against an annotation; the default where it is absent or null."""
    value = values.get(key)
    if value is None and default is not MISSING:
        return default
    require(value is not None, key, value, "the file needs it")
    require(fits(value, kind), key, value, f"expected {described(kind)}")
    return value


def members(kind: Any) -> tuple:
    """The members of a union, or the kind itself, without ranges."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return tuple(option for each in arguments for option in members(each))
    return members(arguments[0]) if origin is Annotated else (kind,)


_YARN = ("factor", "original_max_positions", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
ROPE_FIELDS = {  # what a kind of RoPE reads beside theta
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"),
    "yarn": (*_YARN, "truncate"),
    "longrope": ("short_factor",),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; the field names are those of HF's `rope_parameters`.

    kind: "default", "linear", "llama3", "yarn", or "longrope" within the context the model was first trained with.
    Fields that a kind does not use keep their defaults.
    """

    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    theta: Annotated[float, Within(1, HUGE)] = 10000.0
    factor: Annotated[float, Within(1, HUGE)] = 1.0
    low_freq_factor: Positive = 1.0  # llama3
    high_freq_factor: Positive = 4.0  # llama3
    original_max_positions: Count = 0  # llama3, yarn: the context the model was first trained with
    beta_fast: Positive = 32.0  # yarn
    beta_slow: Positive = 1.0  # yarn
    attention_factor: Positive | None = None  # yarn: scale of cos and sin; None derives it from factor
    mscale: Positive | None = None  # yarn
    mscale_all_dim: Positive | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dims
    short_factor: tuple[Positive, ...] = ()  # longrope: what each frequency is divided by

    def __post_init__(self):
        check(self, "rope.")
        for each in fields(self)[2:]:
            value, used = getattr(self, each.name), each.name in ROPE_FIELDS[self.kind]
            require(used or value == each.default, f"rope.{each.name}", value, f"{self.kind} RoPE does not use it")
        if self.kind in ("llama3", "yarn"):
            n = self.original_max_positions
            require(n > 0, "rope.original_max_positions", n, f"{self.kind} needs it")
        if self.kind == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            require(high > low, "rope.high_freq_factor", high, f"must be above low_freq_factor={low}")
        if self.kind == "yarn":
            require(self.theta > 1, "rope.theta", self.theta, "yarn needs more than 1")
            slow, fast = self.beta_slow, self.beta_fast
            require(fast >= slow, "rope.beta_fast", fast, f"must not be below beta_slow={slow}")


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1).

    What is cached of a token is one entry for all heads: a latent vector, of which the keys and values of every head
    are linear maps, and a key that RoPE turns.

    kv_rank: numbers of the latent vector. nope_dim, rope_dim: of a head's key, from the latent vector and turned by
      RoPE. value_dim: of a head's value.
    query_rank: of the queries' projection, None for a whole one.
    interleaved: RoPE turns dim 2i with dim 2i + 1, not dim d with dim d + rope_dim / 2.
    """

    kv_rank: Size
    nope_dim: Size
    rope_dim: Size
    value_dim: Size
    query_rank: Size | None = None
    interleaved: bool = True

    def __post_init__(self):
        check(self, "latent.")
        require(self.rope_dim % 2 == 0, "latent.rope_dim", self.rope_dim, "RoPE needs an even dim")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of one of these families, in the letters of types.py.

    latent: multi-head latent attention; then K is 1 and D the width of an entry, kv_rank + rope_dim.
    embed_scale, depth_scale, logit_dim: of MiniCPM (arXiv 2404.06395). Embeddings are multiplied by the first, what a
      block adds by depth_scale / sqrt(L), and hidden states by logit_dim / E before the unembedding.
    """

    family: Literal["llama", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3", "youtu", "minicpm3"]
    vocab_size: Size  # V
    num_layers: Layers  # L
    model_dim: Size  # E
    num_heads: Size  # H
    num_kv_heads: Size  # K
    head_dim: Size  # D
    mlp_dim: Size  # F
    norm_eps: Annotated[float, Within(TINY, 1)] = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    max_positions: Size = 4096
    bos_id: Count | None = None
    eos_ids: tuple[Count, ...] = ()
    pad_id: Count | None = None
    latent: LatentConfig | None = None
    embed_scale: Positive = 1.0
    depth_scale: Positive | None = None
    logit_dim: Size | None = None

    def __post_init__(self):
        check(self)
        for key in ("bos_id", "eos_ids", "pad_id"):
            value = getattr(self, key)
            ids = value if isinstance(value, tuple) else () if value is None else (value,)
            inside = all(token < self.vocab_size for token in ids)
            require(inside, key, value, f"is outside the vocabulary of {self.vocab_size} tokens")
        divides = self.num_heads % self.num_kv_heads == 0
        require(divides, "num_kv_heads", self.num_kv_heads, f"must divide num_heads={self.num_heads}")
        most = self.num_kv_heads * (MAX_LATENT_GROUP if self.latent else MAX_GROUP)
        require(self.num_heads <= most, "num_heads", self.num_heads, f"at most {most} with so many KV heads")
        factors, pairs = self.rope.short_factor, (self.latent.rope_dim if self.latent else self.head_dim) // 2
        fits = len(factors) == (pairs if self.rope.kind == "longrope" else 0)
        require(fits, "rope.short_factor", factors, f"longrope, and no other, needs {pairs} of them")
        if self.latent is None:
            require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "RoPE needs an even head dim")
            return
        require(
            self.num_kv_heads == 1, "num_kv_heads", self.num_kv_heads, "latent attention has one entry for all heads"
        )
        require(not self.qk_norm, "qk_norm", self.qk_norm, "latent attention has norms of its own")
        width = self.latent.kv_rank + self.latent.rope_dim
        require(self.head_dim == width, "head_dim", self.head_dim, f"an entry has kv_rank + rope_dim = {width} numbers")

    def check_length(self, length: int) -> None:
        """Warns where sequences of up to `length` tokens are longer than those the model was trained for."""
        if length > self.max_positions:
            stated = f"max_positions={self.max_positions} (max_position_embeddings)"
            warnings.warn(f"sequences of up to {length} tokens, beyond the model's {stated}", stacklevel=3)

    @property
    def group_size(self) -> int:
        """G, query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def value_dim(self) -> int:
        """U, numbers of a value that attention reads: with latent attention the first ones of the key."""
        return self.head_dim if self.latent is None else self.latent.kv_rank

    @property
    def entry_numbers(self) -> int:
        """Numbers that a cache holds of a token in one KV head: a key, and a value that is no part of it."""
        return self.head_dim * (1 if self.latent else 2)


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
    gate_dtype: "float32", or "model": `scale * x - logit_bias` is rounded to the model's dtype after each operation,
      as in NVIDIA's code run without torch.compile.
    """

    window: Count = 256
    gate: str = "query"
    decision_offset: Count = 0
    scale: Real = 100.0
    logit_bias: Real = 5.0
    neuron: int = -1
    per: Literal["head", "layer"] = "head"
    tau: Positive = 0.1
    sinks: Count = 0
    gate_dtype: Literal["float32", "model"] = "float32"

    def __post_init__(self):
        check(self)
        one_of("gate", self.gate, tuple(GATE_NAMES))
        o = self.decision_offset
        require(o <= self.window + 1, "decision_offset", o, f"must lie in 0..window+1={self.window + 1}")


@dataclass(frozen=True)
class CacheConfig:
    """Where keys and values are kept.

    storage: "paged" keeps what is live, "masked" everything (for research and as the oracle).
    capacity: slots a head, in tokens: an upper bound.
    page_size: slots a page of paged storage, and of what a policy that reads by pages (Quest) chooses from.
    quant: "none", "int8" or "fp8" (e4m3) keys and values, with a scale for each token and head.
    """

    storage: Literal["paged", "masked"] = "paged"
    capacity: Size = 4096
    page_size: Size = 64
    quant: Literal["none", "int8", "fp8"] = "none"

    def __post_init__(self):
        one_of("cache", self.storage, ("paged", "masked"))
        check(self)
        quantized = self.quant != "none"
        refused = f"{self.storage} storage does not quantize"
        require(not quantized or self.storage == "paged", "quant", self.quant, refused)


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. Temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off."""

    temperature: Annotated[float, Within(0, HUGE)] = 0.0
    top_k: Count = 0
    top_p: Annotated[float, Within(TINY, 1)] = 1.0

    def __post_init__(self):
        check(self)
