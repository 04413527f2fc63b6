"""GGUF files (llama.cpp): configuration and dequantised tensors.

The tensor names are the "gguf" column of table.py. The header is read here, bounded by the size of the file (the
package's reader builds an array for every token of the vocabulary, and trusts counts and offsets); quantised rows are
turned into numbers by the `gguf` package, a piece at a time.
"""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from dms_jax.config import ConfigError, Layers, ModelConfig, Positive, RopeConfig, Size, in_file, one_of, require, take
from dms_jax.models.layers import rope_frequencies
from dms_jax.types import Params
from dms_jax.weights.gguf_tokenizer import CONTROL, build_tokenizer
from dms_jax.weights.lm import LM
from dms_jax.weights.safetensors import Source, WeightError
from dms_jax.weights.table import all_finite, check_names, read_params, shapes, specs

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_FREQS = "rope_freqs.weight"
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>")  # control tokens that end a turn, whatever the file calls its end
SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
STRING, ARRAY = 8, 9
# ModelConfig or RopeConfig field -> GGUF key, for what goes wrong when several are compared.
GGUF_KEYS = {
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "bos_id": "tokenizer.ggml.bos_token_id",
    "eos_ids": "tokenizer.ggml.eos_token_id",
    "pad_id": "tokenizer.ggml.padding_token_id",
    "rope.theta": "rope.freq_base",
    "rope.factor": "rope.scaling.factor",
}


def read_gguf(
    file: Path, dtype: str, tokenizer: Any = None, nonfinite: bool = False
) -> tuple[LM, Callable[[], Params]]:
    """The model in a GGUF file, with shapes for its parameters, and what reads those; `tokenizer` for the file's own.

    Raises:
      ConfigError: an unsupported model.  WeightError: a damaged file, or tensors that do not fit the model.
    """
    metadata, sources = open_gguf(file)
    with in_file(file, GGUF_KEYS):
        config = config_from_gguf(metadata, sources)
        tokenizer = build_tokenizer(metadata) if tokenizer is None else tokenizer
    expected, order = specs(config, None, "gguf"), {}
    weights = {name: source for name, source in sources.items() if name != ROPE_FREQS}
    check_names(expected, weights, str(file))  # before anything as large as the metadata says
    if config.family == "llama":
        for n in range(config.num_layers):
            for name, heads in (("attn_q", config.num_heads), ("attn_k", config.num_kv_heads)):
                for kind in ("weight", "bias"):
                    order[f"blk.{n}.{name}.{kind}"] = unpermuted_rows(heads, config.head_dim)
    read = functools.partial(read_params, expected, weights, dtype, str(file), order, nonfinite)
    return LM(config, shapes(expected, dtype), tokenizer), read


def unpermuted_rows(heads: int, head_dim: int) -> np.ndarray:
    """Where each row of a permuted q or k belongs, `[H * D]`.

    llama.cpp rotates dim 2i with 2i + 1 and stores HF's dims i and i + D/2 there. For D = 4 the rows of a
    head come as [0 2 1 3].
    """
    one = np.arange(head_dim).reshape(2, head_dim // 2).T.reshape(-1)
    return (np.arange(heads)[:, None] * head_dim + one).reshape(-1)


class _Header:
    """A cursor over the head of a GGUF file, which reads nothing past its end."""

    def __init__(self, file: Path, stream: BinaryIO):
        self.file, self.stream, self.size = file, stream, file.stat().st_size

    def fail(self, reason: str) -> WeightError:
        return WeightError(f"{self.file}: no GGUF file, truncated or damaged ({reason})")

    def bytes(self, count: int) -> bytes:
        if count > self.size - self.stream.tell():
            raise self.fail("it ends too early")
        return self.stream.read(count)

    def numbers(self, code: str, count: int = 1) -> list:
        return np.frombuffer(self.bytes(count * np.dtype(code).itemsize), np.dtype(code).newbyteorder("<")).tolist()

    def number(self, code: str) -> int:
        return self.numbers(code)[0]

    def text(self) -> str:
        try:
            return self.bytes(int.from_bytes(self.bytes(8), "little")).decode()
        except UnicodeDecodeError as error:
            raise self.fail("a name or text is not UTF-8") from error

    def value(self) -> Any:
        """A metadata value: a number, a text or a list of those."""
        kind = self.number("u4")
        if kind != ARRAY:
            return self.values(kind, 1)[0]
        return self.values(self.number("u4"), self.number("u8"))

    def values(self, kind: int, count: int) -> list:
        if kind == STRING:
            return [self.text() for _ in range(count)]
        if kind not in SCALARS:
            raise self.fail(f"a value is of the unknown type {kind}")
        return self.numbers(SCALARS[kind], count)


def open_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Source]]:
    """Metadata and tensors of a GGUF file by name. Reads the header only.

    Raises:
      WeightError: no GGUF file, or one whose tensors do not fill it from end to end.  ConfigError: an odd alignment.
    """
    if not file.is_file():
        raise WeightError(f"{file}: no such file, or no regular one")
    try:
        with in_file(file), open(file, "rb") as stream:
            return _read_header(_Header(file, stream))
    except OSError as error:
        raise WeightError(f"{file}: cannot be read ({error})") from error


def _read_header(header: _Header) -> tuple[dict[str, Any], dict[str, Source]]:
    if header.bytes(4) != b"GGUF":
        raise header.fail("it does not begin with GGUF")
    version = header.number("u4")
    if version not in (2, 3):
        big = version & 0xFFFF == 0
        raise header.fail("big-endian files are not supported" if big else f"version {version} is not supported")
    tensors, keys = header.numbers("u8", 2)
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        name = header.text()
        if name in metadata:
            raise header.fail(f"key {name} appears twice")
        metadata[name] = header.value()
    infos = []
    for _ in range(tensors):
        name, dims = header.text(), header.number("u4")
        if not 1 <= dims <= 4:
            raise header.fail(f"tensor {name} has {dims} dims")
        infos.append((name, tuple(reversed(header.numbers("u8", dims))), header.number("u4"), header.number("u8")))
    alignment = take(metadata, "general.alignment", Size, 32)

    def aligned(offset: int) -> int:
        return -(-offset // alignment) * alignment

    start, end, sources = aligned(header.stream.tell()), 0, {}
    for name, shape, code, offset in infos:
        if name in sources:
            raise header.fail(f"tensor {name} appears twice")
        if offset != aligned(end):
            raise header.fail(f"tensor {name} is at byte {offset} of the data, expected {aligned(end)}")
        sources[name], size = _source(header, name, shape, code, start + offset)
        end = offset + size
    if not end <= header.size - start <= max(0, aligned(end)):
        raise header.fail(f"its tensors fill {end} bytes, it has {header.size - start}")
    return metadata, sources


def _source(header: _Header, name: str, shape: tuple[int, ...], code: int, start: int) -> tuple[Source, int]:
    """A tensor at a byte of the file, and its size there."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    if code not in {kind.value for kind in GGML_QUANT_SIZES}:
        raise header.fail(f"tensor {name} is of the unknown type {code}")
    kind, file, columns = GGMLQuantizationType(code), header.file, shape[-1]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if columns % block or min(shape) < 1:
        raise header.fail(f"tensor {name} of type {kind.name} cannot have shape {shape}")
    row = columns // block * block_bytes

    def read(first: int, stop: int) -> np.ndarray:
        data = np.fromfile(file, np.uint8, (stop - first) * row, offset=start + first * row)
        if len(data) < (stop - first) * row:
            raise WeightError(f"{file}: truncated inside tensor {name}")
        if kind.name in ("F32", "F16"):
            return data.view(np.float32 if kind.name == "F32" else np.float16).reshape(-1, columns)
        decoder = getattr(quants, kind.name, None)
        if decoder is None:
            raise WeightError(f"{file}: tensor {name} is quantised as {kind.name}: not supported")
        decoder.init_grid()
        with np.errstate(all="ignore"):  # a damaged scale is found by what comes out
            # All rows at once: `quants.dequantize` takes sixteen a call, which then wait for Python's lock, and copies.
            return decoder.dequantize_rows(data).reshape(-1, columns)

    return Source(name, shape, file, read), math.prod(shape[:-1]) * row


def config_from_gguf(metadata: Mapping[str, Any], sources: Mapping[str, Source]) -> ModelConfig:
    """ModelConfig from metadata; what GGUF does not record (biases, tied embeddings) from the tensors."""
    arch = take(metadata, "general.architecture", Literal[*ARCHITECTURES])

    def get(key: str, kind, *default):
        return take(metadata, f"{arch}.{key}", kind, *default)

    parts = take(metadata, "split.count", int, 0)
    require(parts <= 1, "split.count", parts, "join the parts of the file first (llama-gguf-split --merge)")
    for key in ("expert_count", "attention.sliding_window", "rope.scaling.yarn_attn_factor"):
        value = get(key, float, 0)
        require(not value, f"{arch}.{key}", value, "not supported")
    heads = _same(f"{arch}.attention.head_count", get("attention.head_count", Size | list[Size]))
    width = get("embedding_length", Size)
    head_dim = get("attention.key_length", Size, width // heads)
    value_dim, rotated = get("attention.value_length", Size, head_dim), get("rope.dimension_count", Size, head_dim)
    require(value_dim == head_dim, f"{arch}.attention.value_length", value_dim, f"keys have {head_dim}")
    require(rotated == head_dim, f"{arch}.rope.dimension_count", rotated, f"heads have {head_dim}")
    require("token_embd.weight" in sources, "token_embd.weight", None, "missing tensor")
    vocabulary = sources["token_embd.weight"].shape[0]
    tokens = take(metadata, "tokenizer.ggml.tokens", list[str], [])
    require(len(tokens) <= vocabulary, "tokenizer.ggml.tokens", len(tokens), f"tokens for {vocabulary} embeddings")
    return ModelConfig(
        family=arch,
        vocab_size=vocabulary,
        num_layers=get("block_count", Layers),
        model_dim=width,
        num_heads=heads,
        num_kv_heads=_same(f"{arch}.attention.head_count_kv", get("attention.head_count_kv", Size | list[Size], heads)),
        head_dim=head_dim,
        mlp_dim=_same(f"{arch}.feed_forward_length", get("feed_forward_length", Size | list[Size])),
        # Stored in single precision: 1e-5 reads back as 9.99999974e-06.
        norm_eps=_shortest(get("attention.layer_norm_rms_epsilon", Positive)),
        rope=_rope(get, head_dim, sources.get(ROPE_FREQS)),
        qk_norm=arch == "qwen3",
        qkv_bias="blk.0.attn_q.bias" in sources,
        out_bias="blk.0.attn_output.bias" in sources,
        mlp_bias="blk.0.ffn_gate.bias" in sources,
        tie_embeddings="output.weight" not in sources,
        max_positions=get("context_length", Size),
        bos_id=take(metadata, "tokenizer.ggml.bos_token_id", int, None),
        eos_ids=_stop_ids(metadata, tokens),
        pad_id=take(metadata, "tokenizer.ggml.padding_token_id", int, None),
    )


def _stop_ids(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[int, ...]:
    """The ids that the file calls an end of text, turn or message, and the control tokens whose text says so."""
    named = [take(metadata, f"tokenizer.ggml.{key}_token_id", int, None) for key in ("eos", "eot", "eom")]
    kinds = take(metadata, "tokenizer.ggml.token_type", list[int], [])
    control = {token: n for n, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == CONTROL}
    ids = (*named, *(control.get(token) for token in END_OF_TURN))
    return tuple(dict.fromkeys(id for id in ids if id is not None))


def _same(key: str, value: int | list[int]) -> int:
    """A number that GGUF may give for each layer; here every layer must agree."""
    values = value if isinstance(value, list) else [value]
    require(len(set(values)) == 1, key, value, "layers of different sizes are not supported")
    return values[0]


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32."""
    return float(str(np.float32(value)))


def _rope(get, head_dim: int, freqs: Source | None) -> RopeConfig:
    """RoPE from the metadata, or recovered from `rope_freqs.weight`, the form that llama3 scaling takes."""
    theta = _shortest(get("rope.freq_base", Positive, 10000.0))
    factor = _shortest(get("rope.scaling.factor", Positive, get("rope.scale_linear", float, 0) or 1.0))
    kind = get("rope.scaling.type", str, "none" if factor == 1 else "linear")
    if freqs is not None:
        one_of("rope.scaling.type", kind, ("none",))
        return _llama3(theta, head_dim, freqs)
    one_of("rope.scaling.type", kind, ("none", "linear", "yarn"))
    if kind == "linear" and factor != 1:
        return RopeConfig("linear", theta, factor)
    if kind != "yarn":
        return RopeConfig(theta=theta)
    rope = RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_positions=get("rope.scaling.original_context_length", Size, get("context_length", Size)),
        beta_fast=get("rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=get("rope.scaling.yarn_beta_slow", float, 1.0),
    )
    attention = get("rope.scaling.attn_factor", Positive, 1.0)  # on top of what the factor implies
    if attention == 1:
        return rope
    implied = rope_frequencies(rope, 2)[1]
    return RopeConfig(**{**vars(rope), "attention_factor": attention * implied})


def _llama3(theta: float, head_dim: int, freqs: Source) -> RopeConfig:
    """The llama3 parameters whose divisors `[D / 2]` are those stored, checked dim by dim.

    Released models have low and high frequency factors 1 and 4 and an original context of 8192; other powers
    of two are tried as well.
    """
    if freqs.shape != (head_dim // 2,):
        raise WeightError(f"{freqs.file}: tensor {ROPE_FREQS} has shape {freqs.shape}, expected {(head_dim // 2,)}")
    plain, _ = rope_frequencies(RopeConfig(theta=theta), head_dim)
    stored = freqs.read(0, 1).reshape(-1)
    if not all_finite(stored):
        raise WeightError(f"{freqs.file}: tensor {ROPE_FREQS} has NaN or infinite values")
    stored = stored.astype(np.float64)
    if np.allclose(stored, 1.0):
        return RopeConfig(theta=theta)
    for original in (8192, *(2**n for n in range(6, 21))):
        for factor in (_shortest(stored.max()), 8.0, 32.0):
            if factor < 1:
                continue
            rope = RopeConfig("llama3", theta, factor, 1.0, 4.0, original)
            if np.allclose(plain / rope_frequencies(rope, head_dim)[0], stored, rtol=1e-5):
                return rope
    raise ConfigError(f"{ROPE_FREQS}={stored.round(4).tolist()}: matches no llama3 scaling of base {theta}")
