"""GGUF files (llama.cpp): configuration and dequantised tensors, through the `gguf` package.

The tensor names are the "gguf" column of table.py. Rows are dequantised a piece at a time.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dms_jax.config import ConfigError, ModelConfig, RopeConfig, one_of, require
from dms_jax.models.layers import rope_frequencies
from dms_jax.types import Params
from dms_jax.weights.safetensors import Source, WeightError
from dms_jax.weights.table import read_params, specs

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_FREQS = "rope_freqs.weight"


def read_gguf(
    file: Path, metadata: Mapping[str, Any], sources: Mapping[str, Source], dtype: str
) -> tuple[ModelConfig, Params]:
    """What `open_gguf` found, as configuration and parameters.

    Raises:
      ConfigError: an unsupported model.  WeightError: a damaged file, or tensors that do not fit the model.
    """
    config = config_from_gguf(metadata, sources)
    order = {}
    if config.family == "llama":
        for n in range(config.num_layers):
            for name, heads in (("attn_q", config.num_heads), ("attn_k", config.num_kv_heads)):
                for kind in ("weight", "bias"):
                    order[f"blk.{n}.{name}.{kind}"] = unpermuted_rows(heads, config.head_dim)
    weights = {name: source for name, source in sources.items() if name != ROPE_FREQS}
    return config, read_params(specs(config, None, "gguf"), weights, dtype, str(file), order)


def unpermuted_rows(heads: int, head_dim: int) -> np.ndarray:
    """Where each row of a permuted q or k belongs, `[H * D]`.

    llama.cpp rotates dim 2i with 2i + 1 and stores HF's dims i and i + D/2 there. For D = 4 the rows of a
    head come as [0 2 1 3].
    """
    one = np.arange(head_dim).reshape(2, head_dim // 2).T.reshape(-1)
    return (np.arange(heads)[:, None] * head_dim + one).reshape(-1)


def open_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Source]]:
    """Metadata and tensors of a GGUF file by name; the package's reader, which maps the file, is let go."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        swapped = reader.byte_order == "S"
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        sources = {tensor.name: _source(file, tensor) for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise WeightError(f"{file}: not a GGUF file, truncated or damaged ({error})") from error
    if swapped:
        raise WeightError(f"{file}: big-endian GGUF files are not supported")
    return metadata, sources


def _source(file: Path, tensor: Any) -> Source:
    """A tensor of the package's reader as a Source that holds no reference to the reader."""
    from gguf import quants

    name, kind, offset = tensor.name, tensor.tensor_type, int(tensor.data_offset)
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    columns = shape[-1]
    row = quants.quant_shape_to_byte_shape((columns,), kind)[-1]

    def read(start: int, stop: int) -> np.ndarray:
        data = _read_bytes(file, offset + start * row, (stop - start) * row, name)
        if kind.name in ("F32", "F16"):
            return data.view(np.float32 if kind.name == "F32" else np.float16).reshape(-1, columns)
        try:
            return quants.dequantize(data.reshape(-1, row), kind)
        except NotImplementedError as error:
            raise WeightError(f"{file}: tensor {name} is quantised as {kind.name}: not supported") from error

    return Source(name, shape, Path(file), read)


def _read_bytes(file: Path, offset: int, size: int, name: str) -> np.ndarray:
    """Exactly `size` bytes at `offset`, or a WeightError that names the tensor and the file."""
    data = np.fromfile(file, np.uint8, size, offset=offset)
    if len(data) < size:
        raise WeightError(f"{file}: truncated inside tensor {name}")
    return data


def config_from_gguf(metadata: Mapping[str, Any], sources: Mapping[str, Source]) -> ModelConfig:
    """ModelConfig from metadata; what GGUF does not record (biases, tied embeddings) from the tensors."""
    arch = metadata.get("general.architecture")
    one_of("general.architecture", arch, ARCHITECTURES)

    def get(key: str, default=None):
        value = metadata.get(f"{arch}.{key}", default)
        require(value is not None, f"{arch}.{key}", value, "the file needs it")
        return value

    parts = metadata.get("split.count", 0)
    require(parts <= 1, "split.count", parts, "join the parts of the file first (llama-gguf-split --merge)")
    for key in ("expert_count", "attention.sliding_window", "rope.scaling.yarn_attn_factor"):
        value = get(key, 0)
        require(not value, f"{arch}.{key}", value, "not supported")
    heads = _same(f"{arch}.attention.head_count", get("attention.head_count"))
    width = get("embedding_length")
    head_dim = get("attention.key_length", width // heads)
    value_dim, rotated = get("attention.value_length", head_dim), get("rope.dimension_count", head_dim)
    require(value_dim == head_dim, f"{arch}.attention.value_length", value_dim, f"keys have {head_dim}")
    require(rotated == head_dim, f"{arch}.rope.dimension_count", rotated, f"heads have {head_dim}")
    if "token_embd.weight" not in sources:
        raise WeightError("missing tensor token_embd.weight")
    eos = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    return ModelConfig(
        family=arch,
        vocab_size=sources["token_embd.weight"].shape[0],
        num_layers=get("block_count"),
        model_dim=width,
        num_heads=heads,
        num_kv_heads=_same(f"{arch}.attention.head_count_kv", get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        mlp_dim=_same(f"{arch}.feed_forward_length", get("feed_forward_length")),
        # Stored in single precision: 1e-5 reads back as 9.99999974e-06.
        norm_eps=_shortest(get("attention.layer_norm_rms_epsilon")),
        rope=_rope(get, head_dim, sources.get(ROPE_FREQS)),
        qk_norm=arch == "qwen3",
        qkv_bias="blk.0.attn_q.bias" in sources,
        out_bias="blk.0.attn_output.bias" in sources,
        mlp_bias="blk.0.ffn_gate.bias" in sources,
        tie_embeddings="output.weight" not in sources,
        max_positions=get("context_length"),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(dict.fromkeys(id for id in eos if id is not None)),
        pad_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )


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
    theta = _shortest(get("rope.freq_base", 10000.0))
    kind = get("rope.scaling.type", "none" if freqs or not get("rope.scale_linear", 0) else "linear")
    if freqs is not None:
        one_of("rope.scaling.type", kind, ("none",))
        return _llama3(theta, head_dim, freqs)
    one_of("rope.scaling.type", kind, ("none", "linear", "yarn"))
    factor = _shortest(get("rope.scaling.factor", get("rope.scale_linear", 1.0)))
    if kind == "linear" and factor != 1:
        return RopeConfig("linear", theta, factor)
    if kind != "yarn":
        return RopeConfig(theta=theta)
    rope = RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_positions=get("rope.scaling.original_context_length", get("context_length")),
        beta_fast=get("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=get("rope.scaling.yarn_beta_slow", 1.0),
    )
    attention = get("rope.scaling.attn_factor", 1.0)  # on top of what the factor implies
    if attention == 1:
        return rope
    implied = rope_frequencies(rope, head_dim)[1]
    return RopeConfig(**{**vars(rope), "attention_factor": attention * implied})


def _llama3(theta: float, head_dim: int, freqs: Source) -> RopeConfig:
    """The llama3 parameters whose divisors `[D / 2]` are those stored, checked dim by dim.

    Released models have low and high frequency factors 1 and 4 and an original context of 8192; other powers
    of two are tried as well.
    """
    stored = freqs.read(0, 1).reshape(-1).astype(np.float64)
    if np.allclose(stored, 1.0):
        return RopeConfig(theta=theta)
    plain, _ = rope_frequencies(RopeConfig(theta=theta), head_dim)
    if stored.shape != plain.shape:
        raise WeightError(f"{freqs.file}: tensor {ROPE_FREQS} has shape {stored.shape}, expected {plain.shape}")
    for original in (8192, *(2**n for n in range(6, 21))):
        for factor in (_shortest(stored.max()), 8.0, 32.0):
            if factor < 1:
                continue
            rope = RopeConfig("llama3", theta, factor, 1.0, 4.0, original)
            if np.allclose(plain / rope_frequencies(rope, head_dim)[0], stored, rtol=1e-5):
                return rope
    raise ConfigError(f"{ROPE_FREQS}={stored.round(4).tolist()}: matches no llama3 scaling of base {theta}")
