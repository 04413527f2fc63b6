"""Parameter trees against the tensors of foreign files: one table, used for reading and for writing.

A foreign linear map is `[out, in]`, ours is `[*inputs, *outputs]`, written "inputs | outputs" in the table:

    "E | H D"   ours [E, H, D],  theirs [H * D, E]
    "H D | E"   ours [H, D, E],  theirs [E, H * D]
    "| H D"     ours [H, D],     theirs [H * D]           a bias
    "V E"       ours [V, E],     theirs [V, E]            no bar: as it is

Beside the letters of types.py there are those of latent attention: R query rank, Q the dims of an expanded key (nope +
rope), X those of an expanded value, P what W_UK and W_UV make of a latent vector (nope + X).
"""

import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from dms_jax.config import DMSConfig, ModelConfig, one_of
from dms_jax.models.gates import gate_of
from dms_jax.types import Params
from dms_jax.weights.safetensors import CODES, PIECE, Saved, Source, WeightError

DTYPES = ("bfloat16", "float16", "float32")
READERS = 8  # threads; more of them wait for each other: 64 took three times as long as two on a machine of 64 cores


class Row(NamedTuple):
    """A parameter: path in our tree, names in HF and GGUF files ({n}: the layer), layout, when it exists.

    when: words that must all be true of the model, see `_is`.
    """

    path: str
    hf: str
    gguf: str | None
    layout: str
    when: str = ""


TABLE = (
    Row("embed/embedding", "model.embed_tokens.weight", "token_embd.weight", "V E"),
    Row("final_norm/scale", "model.norm.weight", "output_norm.weight", "E"),
    Row("unembedding/kernel", "lm_head.weight", "output.weight", "E | V", "untied"),
)
_HF, _MINE, _GGUF = "model.layers.{n}.", "layers_{n}/", "blk.{n}."
LAYER_TABLE = tuple(
    Row(_MINE + path, _HF + hf, gguf and _GGUF + gguf, layout, when)
    for path, hf, gguf, layout, when in (
        ("attn_norm/scale", "input_layernorm.weight", "attn_norm.weight", "E", ""),
        ("attn/q/kernel", "self_attn.q_proj.weight", "attn_q.weight", "E | H D", "grouped"),
        ("attn/k/kernel", "self_attn.k_proj.weight", "attn_k.weight", "E | K D", "grouped"),
        ("attn/v/kernel", "self_attn.v_proj.weight", "attn_v.weight", "E | K D", "grouped"),
        ("attn/o/kernel", "self_attn.o_proj.weight", "attn_output.weight", "H D | E", "grouped"),
        ("attn/q/bias", "self_attn.q_proj.bias", "attn_q.bias", "| H D", "grouped qkv_bias"),
        ("attn/k/bias", "self_attn.k_proj.bias", "attn_k.bias", "| K D", "grouped qkv_bias"),
        ("attn/v/bias", "self_attn.v_proj.bias", "attn_v.bias", "| K D", "grouped qkv_bias"),
        ("attn/o/bias", "self_attn.o_proj.bias", "attn_output.bias", "| E", "out_bias"),
        ("attn/q_norm/scale", "self_attn.q_norm.weight", "attn_q_norm.weight", "D", "qk_norm"),
        ("attn/k_norm/scale", "self_attn.k_norm.weight", "attn_k_norm.weight", "D", "qk_norm"),
        ("attn/q/kernel", "self_attn.q_proj.weight", None, "E | H Q", "latent whole_query"),
        ("attn/q_a/kernel", "self_attn.q_a_proj.weight", None, "E | R", "latent query_rank"),
        ("attn/q_a/bias", "self_attn.q_a_proj.bias", None, "| R", "latent query_rank qkv_bias"),
        ("attn/q_a_norm/scale", "self_attn.q_a_layernorm.weight", None, "R", "latent query_rank"),
        ("attn/q_b/kernel", "self_attn.q_b_proj.weight", None, "R | H Q", "latent query_rank"),
        ("attn/kv_a/kernel", "self_attn.kv_a_proj_with_mqa.weight", None, "E | K D", "latent"),
        ("attn/kv_a/bias", "self_attn.kv_a_proj_with_mqa.bias", None, "| K D", "latent qkv_bias"),
        ("attn/kv_a_norm/scale", "self_attn.kv_a_layernorm.weight", None, "U", "latent"),
        ("attn/kv_b/kernel", "self_attn.kv_b_proj.weight", None, "U | H P", "latent"),
        ("attn/o/kernel", "self_attn.o_proj.weight", None, "H X | E", "latent"),
        ("mlp_norm/scale", "post_attention_layernorm.weight", "ffn_norm.weight", "E", ""),
        ("mlp/gate/kernel", "mlp.gate_proj.weight", "ffn_gate.weight", "E | F", ""),
        ("mlp/up/kernel", "mlp.up_proj.weight", "ffn_up.weight", "E | F", ""),
        ("mlp/down/kernel", "mlp.down_proj.weight", "ffn_down.weight", "F | E", ""),
        ("mlp/gate/bias", "mlp.gate_proj.bias", "ffn_gate.bias", "| F", "mlp_bias"),
        ("mlp/up/bias", "mlp.up_proj.bias", "ffn_up.bias", "| F", "mlp_bias"),
        ("mlp/down/bias", "mlp.down_proj.bias", "ffn_down.bias", "| E", "mlp_bias"),
    )
)


class Spec(NamedTuple):
    """A row of the table for one model and one layer."""

    path: str
    name: str  # in the foreign file
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    linear: bool
    letters: str  # of our axes, "E H D"

    @property
    def shape(self) -> tuple[int, ...]:
        """Ours."""
        return (*self.inputs, *self.outputs)

    @property
    def foreign(self) -> tuple[int, ...]:
        """Theirs."""
        if not self.linear:
            return self.shape
        return (math.prod(self.outputs), *([math.prod(self.inputs)] if self.inputs else []))


def specs(config: ModelConfig, dms: DMSConfig | None, naming: str = "hf") -> list[Spec]:
    """Every parameter of the model, its gate's included, under its "hf" or "gguf" name."""
    rows = [(row, 0) for row in TABLE]
    rows += [(row, n) for n in range(config.num_layers) for row in LAYER_TABLE]
    exist = [(row, n) for row, n in rows if all(_is(word, config) for word in row.when.split())]
    return [_spec(row, n, config, naming) for row, n in exist] + gate_specs(config, dms)


def gate_specs(config: ModelConfig, dms: DMSConfig | None) -> list[Spec]:
    """The gate's own parameters alone."""
    gate = gate_of(dms)
    tensors = () if gate is None else gate.tensors
    rows = [Row(f"{_MINE}attn/{path}", _HF + hf, None, layout) for path, hf, layout in tensors]
    return [_spec(row, n, config, "hf") for n in range(config.num_layers) for row in rows]


def _is(word: str, config: ModelConfig) -> bool:
    latent = config.latent
    derived = {"untied": not config.tie_embeddings, "grouped": latent is None, "latent": latent is not None}
    if latent is not None:
        derived |= {"query_rank": latent.query_rank is not None, "whole_query": latent.query_rank is None}
    return derived[word] if word in derived else getattr(config, word)


def _spec(row: Row, n: int, c: ModelConfig, naming: str) -> Spec:
    sizes = {"V": c.vocab_size, "E": c.model_dim, "F": c.mlp_dim}
    sizes |= {"H": c.num_heads, "K": c.num_kv_heads, "D": c.head_dim, "U": c.value_dim}
    if c.latent is not None:
        nope, value = c.latent.nope_dim, c.latent.value_dim
        sizes |= {"R": c.latent.query_rank, "Q": nope + c.latent.rope_dim, "P": nope + value, "X": value}
    name = row.hf if naming == "hf" else row.gguf or ""
    left, bar, right = row.layout.partition("|")
    inputs, outputs = (tuple(sizes[letter] for letter in part.split()) for part in (left, right))
    letters = " ".join((left + right).split())
    return Spec(row.path.format(n=n), name.format(n=n), inputs, outputs, bool(bar), letters)


def check_names(expected: list[Spec], sources: Mapping[str, Source], where: str) -> None:
    """Raises WeightError unless the tensors are exactly those expected, in the expected shapes."""
    names = {spec.name for spec in expected}
    problems = [f"missing tensor {spec.name}" for spec in expected if spec.name not in sources]
    problems += [f"unexpected tensor {name}" for name in sources if name not in names]
    for spec in expected:
        source = sources.get(spec.name)
        if source is not None and source.shape != spec.foreign:
            problems.append(f"tensor {spec.name} has shape {source.shape}, expected {spec.foreign}")
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise WeightError(f"{where}: {'; '.join(problems[:8])}{more}")


def shapes(expected: list[Spec], dtype: str) -> Params:
    """The parameter tree with a `jax.ShapeDtypeStruct` for each parameter."""
    tree: Params = {}
    for spec in expected:
        insert(tree, spec.path, jax.ShapeDtypeStruct(spec.shape, dtype))
    return tree


def read_params(
    expected: list[Spec],
    sources: Mapping[str, Source],
    dtype: str,
    where: str,
    order: Mapping[str, np.ndarray] | None = None,
    nonfinite: bool = False,
) -> Params:
    """The parameter tree, tensor by tensor; peak host memory is the tree plus a piece of a tensor for each thread.

    Args:
      order: for tensors whose rows (foreign outputs) are permuted; row r of the file is our `order[name][r]`.
      nonfinite: read NaN and infinite values as they are.
    Raises:
      WeightError: a missing, unexpected, misshaped or damaged tensor, NaN or infinite values, or a value beyond the
        dtype's range.
    """
    one_of("dtype", dtype, DTYPES)
    check_names(expected, sources, where)
    tree: Params = {}
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        for spec in tqdm(expected, f"Reading {Path(where).name}", unit=" tensors", disable=None, leave=False, delay=1):
            rows = None if order is None else order.get(spec.name)
            reading = _Reading(spec, sources[spec.name], np.dtype(jax.numpy.dtype(dtype)), rows, nonfinite)
            for _ in pool.map(reading.read, reading.source.pieces()):
                pass
            # Our buffer is never written again, so the CPU backend may keep it instead of making a copy.
            insert(tree, spec.path, jax.device_put(reading.out.reshape(spec.shape), may_alias=True))
    return tree


class _Reading:
    """A tensor on its way from a file into `out`."""

    def __init__(self, spec: Spec, source: Source, dtype: np.dtype, order: np.ndarray | None, nonfinite: bool):
        self.spec, self.source, self.order, self.nonfinite = spec, source, order, nonfinite
        self.transposed = spec.linear and bool(spec.inputs)
        self.out = aligned(source.matrix[::-1] if self.transposed else source.matrix, dtype)

    def read(self, rows: tuple[int, int]) -> None:
        (start, stop), spec, order, out = rows, self.spec, self.order, self.out
        stored, dtype = self.source.read(start, stop), out.dtype
        with np.errstate(over="ignore", invalid="ignore"):
            piece = stored.astype(dtype, copy=False)
        if not all_finite(piece) and not (self.nonfinite and not all_finite(stored)):
            what = f"values beyond {dtype}" if all_finite(stored) else "NaN or infinite values"
            raise WeightError(f"{self.source.file}: tensor {spec.name} has {what}")
        place = slice(start, stop) if order is None else order[start:stop]
        if order is not None and self.source.matrix[0] == 1:  # a bias: its rows lie along the one row read
            out[:, order] = piece
        elif self.transposed:
            out[:, place] = piece.T
        else:
            out[place] = piece


def all_finite(x: np.ndarray) -> bool:
    """Whether no value is NaN or infinite, by the bits: np.isfinite is ten times slower for bfloat16."""
    bits = x.view(f"u{x.itemsize}")
    infinity = np.array(np.inf, x.dtype).view(bits.dtype)
    sign = np.array(1 << 8 * x.itemsize - 1, bits.dtype)
    return bool(((bits & ~sign) < infinity).all())


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which is what lets XLA on CPU use it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)


def insert(tree: Params, path: str, value) -> None:
    """Puts a leaf at "a/b/c", making the dicts on the way."""
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def lookup(tree: Params, path: str) -> Any:
    """The leaf at "a/b/c"; a WeightError names the path if it is absent."""
    node: Any = tree
    for key in path.split("/"):
        if not isinstance(node, Mapping) or key not in node:
            raise WeightError(f"params: missing parameter {path}")
        node = node[key]
    return node


def saved(spec: Spec, params: Params) -> Saved:
    """A parameter as it is to be written: foreign shape and layout, pieces made when asked for."""
    value = lookup(params, spec.path)
    if value.shape != spec.shape:
        raise WeightError(f"params: {spec.path} has shape {value.shape}, expected {spec.shape}")
    dtype = np.dtype(value.dtype)
    if dtype not in CODES:
        raise WeightError(f"params: {spec.path} has dtype {dtype}, expected one of {', '.join(map(str, CODES))}")

    def pieces() -> Iterator[np.ndarray]:
        matrix = np.asarray(value)
        if spec.linear:
            matrix = matrix.reshape(math.prod(spec.inputs), -1).T
        step = max(1, PIECE // max(1, matrix[:1].nbytes))
        for start in range(0, matrix.shape[0], step):
            yield matrix[start : start + step]

    return Saved(spec.foreign, dtype, pieces)
