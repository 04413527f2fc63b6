"""Times whole decode steps at the shapes of real models, against the floor of the memory that a step must read.

Random weights, caches filled with random keys and values, in paged storage. "full" is the vanilla model; at another
CR a head holds context / CR tokens (its window included, heads differ by up to --spread), and every new token is
marked, so that the cache grows by the steps timed at most, until they leave the window. The floor of a step is the
bytes of the weights and of the live keys and values over the rate of a device copy, measured in the same run.

    python -m scripts.benchmarks.bench_decode --model qwen3_8b --cells 8x8192x1 8x8192x8 --out bench.json
    python -m scripts.benchmarks.bench_decode --model qwen3_8b --cells maxx32768x1 maxx32768x8
    python -m scripts.benchmarks.bench_decode --model youtu_2b --cells 64x8192x1 64x8192x4 64x8192x8
"""

import dataclasses
import functools
import os
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from dms_jax import sharding
from dms_jax.cache import kv_cache, paged
from dms_jax.config import CacheConfig, DMSConfig, ModelConfig, RopeConfig, SamplingConfig, one_of, require
from dms_jax.config_files import load_yaml
from dms_jax.inference import decode
from dms_jax.models import transformer
from dms_jax.policies import DelayedEviction, Full
from dms_jax.weights import table
from experiments.run import environment
from scripts import command
from scripts.benchmarks.records import Record

MODELS = {
    "qwen3_8b": ModelConfig("qwen3", 151936, 36, 4096, 32, 8, 128, 12288, rope=RopeConfig(theta=1e6), qk_norm=True),
    "llama3.2_1b": ModelConfig(
        "llama", 128256, 16, 2048, 32, 8, 64, 8192, rope=RopeConfig(theta=5e5), tie_embeddings=True
    ),
    "youtu_2b": load_yaml(ModelConfig, Path(__file__).parents[2] / "configs/models/youtu_llm_2b.yaml"),
    "tiny": ModelConfig("qwen3", 64, 2, 32, 4, 2, 16, 64, qk_norm=True),
}
WINDOW = 256
GATE = DMSConfig(window=WINDOW, gate="adapter", logit_bias=-5.0)  # of zeros: every new token is evicted


@dataclass(frozen=True)
class Settings:
    """What to measure.

    cells: BATCHxCONTEXTxCR; a batch of "max" is the largest that fits in --memory. spread: the longest head over the
    shortest, for CR above 1. steps: decode steps in one timed call. memory: bytes of the device that may be used,
    None for what it says it has. out: JSON file, complete after every cell; cells already there and not asked for stay.
    """

    model: str = "qwen3_8b"
    cells: tuple[str, ...] = ("8x8192x1", "8x8192x8")
    page_size: int = 64
    spread: float = 4.0
    steps: int = 16
    rounds: int = 3
    dtype: str = "bfloat16"
    memory: int | None = None
    seed: int = 0
    out: Path | None = None


def copy_rate(size: int) -> float:
    """Bytes per second of a device copy, read and written."""
    x = jnp.zeros(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(copy(x))
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(10):
            x = copy(x)
        jax.block_until_ready(x)
        seconds.append((time.perf_counter() - begun) / 10)
    return 2 * size / statistics.median(seconds)


def random_params(config: ModelConfig, dms: DMSConfig | None, dtype: str, seed: int, mesh: Mesh | None = None):
    """Weights of the model's shape, made one by one on the device or over the mesh; the gate's W stays zero."""
    letters = {spec.path: spec.letters for spec in table.specs(config, dms)}
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config, dms))
    make = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=1)
    params = {}
    for n, (path, x) in enumerate(traverse_util.flatten_dict(shapes, sep="/").items()):
        if path.endswith("gate/proj/kernel"):
            value = jnp.zeros(x.shape, dtype)
        else:
            value = make(jax.random.key(seed + n), x.shape) if len(x.shape) > 1 else jnp.ones(x.shape, dtype)
        params[path] = (
            value if mesh is None else jax.device_put(value, sharding.parameter(mesh, letters[path], x.shape))
        )
    return traverse_util.unflatten_dict(params, sep="/")


def lengths(config: ModelConfig, batch: int, context: int, cr: float, spread: float, seed: int) -> np.ndarray:
    """Live tokens of each head `[L, B, K]`: their mean is context / cr, and none is under the window's."""
    shape = (config.num_layers, batch, config.num_kv_heads)
    if cr == 1:
        return np.full(shape, context)
    low = 2 / (1 + spread)
    share = np.random.default_rng(seed).uniform(low, low * spread, shape)
    return np.clip(np.round(share * context / cr / share.mean()), min(WINDOW, context // cr), context).astype(int)


class Plan(NamedTuple):
    """A cell and what it needs, known before anything is allocated."""

    batch: int
    largest: bool  # the batch was asked for as "max"
    context: int
    cr: float
    live: np.ndarray  # [L, B, K] tokens that the heads hold at the start
    pages: int  # for those and the steps timed
    pool_bytes: int
    bytes_needed: int  # the pool and the weights
    fits: bool  # within nine tenths of the memory: a step needs more besides

    @property
    def program(self) -> tuple:
        """Cells that agree in this and in the pages of their pool are one compiled program."""
        return self.batch, self.context, self.cr == 1


def cache_of(settings: Settings, context: int) -> CacheConfig:
    return CacheConfig("paged", context + settings.steps * (settings.rounds + 1), settings.page_size)


def setup_of(settings: Settings, plan: Plan) -> decode.DecodeSpec:
    chosen, dms = (Full(), None) if plan.cr == 1 else (DelayedEviction(GATE), GATE)
    model = transformer.Decoder(MODELS[settings.model], dms)
    return decode.DecodeSpec(model, chosen, kv_cache(cache_of(settings, plan.context)), SamplingConfig(), ())


def planned(settings: Settings, cell: tuple[str, int, float], weights: int, memory: int) -> Plan:
    """What a cell needs; a batch of "max" becomes the largest that fits, or 1 where none does."""
    config, (asked, context, cr) = MODELS[settings.model], cell
    cache = cache_of(settings, context)
    per_page = paged.bytes_per_page(config, cache, settings.dtype)
    room = 0.9 * memory - weights

    def plan(B: int) -> Plan:
        live = lengths(config, B, context, cr, settings.spread, settings.seed)
        # No token leaves a head while it is in the window, so every head grows by the steps timed.
        pages = int((-(-(live + cache.capacity - context) // settings.page_size)).sum())
        size = pages * per_page
        return Plan(B, asked == "max", context, cr, live, pages, size, weights + size, size <= room)

    if asked != "max":
        return plan(int(asked))
    B = max(1, int(room // plan(1).pool_bytes) + 1)
    while B > 1 and not plan(B).fits:  # the spread of the lengths differs a little from batch to batch
        B -= 1
    return plan(B)


def row_of(plan: Plan) -> dict:
    """The part of a row that is known beforehand."""
    cell = f"{'max' if plan.largest else plan.batch}x{plan.context}x{plan.cr:g}"
    about = {"cell": cell, "batch": plan.batch, "largest_batch": plan.largest, "context": plan.context}
    needs = {"fits": plan.fits, "bytes_needed": plan.bytes_needed, "pool_bytes": plan.pool_bytes}
    return {**about, "cr": plan.cr, **needs}


def bytes_of(params) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(params))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random_pool(key, shape: tuple[int, ...], dtype: str):
    """A pool of random numbers, a 64th of them over and over: to make them all takes long."""
    piece = 1 + (shape[0] - 1) // 64
    noise = jax.random.normal(key, (piece, *shape[1:]), dtype)

    def body(n, pool):
        return jax.lax.dynamic_update_slice(pool, noise, (jnp.minimum(n * piece, shape[0] - piece), 0, 0))

    return jax.lax.fori_loop(0, 64, body, jnp.zeros(shape, dtype))


def pool_shapes(spec: decode.DecodeSpec, pages: int) -> dict[str, tuple[int, int, int]]:
    """The shapes of the pools of keys and values; a latent entry has no values of its own."""
    model, page = spec.model.config, spec.kv_cache.config.page_size
    return {"k": (pages, page, model.head_dim), "v": (pages, 0 if model.latent else page, model.value_dim)}


def tables(plan: Plan, pages: int, settings: Settings) -> paged.PagedArrays:
    """A cache in which every head holds `live` tokens, in pages scattered over pools that are not there yet."""
    live = plan.live
    L, B, K = live.shape
    page = settings.page_size
    held = -(-live // page)
    P = -(-cache_of(settings, plan.context).capacity // page)
    ids = np.random.default_rng(settings.seed).permutation(pages).astype(np.int32)
    table = np.zeros((L, B, K, P), np.int32)
    mask = np.arange(P) < held[..., None]
    used = int(mask.sum())
    table[mask] = ids[:used]
    return paged.PagedArrays(
        k=None,
        v=None,
        pos=jnp.zeros((pages, page), jnp.int32),
        k_scale=None,
        v_scale=None,
        k_offset=None,
        table=jnp.asarray(table),
        length=jnp.asarray(live, jnp.int32),
        free=jnp.asarray(np.concatenate([ids[used:], ids[:used]])),
        top=jnp.asarray(pages - used, jnp.int32),
    )


def filled(spec: decode.DecodeSpec, plan: Plan, pages: int, settings: Settings) -> decode.DecodeState:
    """A state in which every head holds `live` random tokens."""
    keys = jax.random.split(jax.random.key(settings.seed))
    shapes = pool_shapes(spec, pages)
    pools = {
        name: random_pool(key, shape, settings.dtype) for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    B, states = plan.batch, decode.init(spec, plan.batch, settings.dtype, 1).policy
    return decode.DecodeState(
        tables(plan, pages, settings)._replace(**pools), states, jnp.zeros(B, jnp.int32),
        jnp.full(B, plan.context, jnp.int32), jnp.full(B, 2**30, jnp.int32), jnp.zeros(B, bool),
        jnp.zeros((B, 2), jnp.uint32),
    )  # fmt: skip


def measure(settings: Settings, params, plan: Plan, pages: int, rate: float) -> dict:
    """The numbers of one row. pages: of the pool, at least what the plan needs."""
    config, spec, B = MODELS[settings.model], setup_of(settings, plan), plan.batch
    begun = time.perf_counter()
    state = filled(spec, plan, pages, settings)
    seconds = []
    for _ in range(settings.rounds + 1):
        start = time.perf_counter()
        state, chunk = decode.decode_chunk(spec, params, state, settings.steps)
        assert np.asarray(chunk.active).all(), "a sequence waited for a page"
        seconds.append((time.perf_counter() - start) / settings.steps)
    step = statistics.median(seconds[1:])
    item = jnp.dtype(settings.dtype).itemsize
    # The embedding is a lookup of B rows, unless it is the unembedding too.
    read = bytes_of(params) - (0 if config.tie_embeddings else config.vocab_size * config.model_dim * item)
    kv = float(np.asarray(chunk.held).sum(axis=1).mean()) * config.entry_numbers * item
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "seconds_per_step": step,
        "rounds": seconds[1:],
        "tokens_per_second": B / step,
        "floor_seconds": (read + kv) / rate,
        "over_floor": step / ((read + kv) / rate),
        "weight_bytes": read,
        "live_kv_bytes": kv,
        "peak_bytes_so_far": stats.get("peak_bytes_in_use"),  # of this and the cells before
        "compile_and_first_call_seconds": seconds[0] * settings.steps,
        "seconds_in_all": time.perf_counter() - begun,
    }


def parse(cell: str) -> tuple[str, int, float]:
    """BATCHxCONTEXTxCR, as in 8x8192x4 or maxx32768x8."""
    found = re.fullmatch(r"(max|\d+)x(\d+)x(\d+(?:\.\d+)?)", cell)
    require(found is not None, "cells", cell, "expected BATCHxCONTEXTxCR, BATCH a number or max")
    batch, context, cr = found.groups()
    return batch, int(context), float(cr)


def main(settings: Settings) -> None:
    cells = [parse(cell) for cell in settings.cells]
    one_of("model", settings.model, tuple(MODELS))
    config = MODELS[settings.model]
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 2**30)
    memory = settings.memory or limit
    rate = copy_rate(2**22 if jax.default_backend() == "cpu" else 2**30)
    run = {"settings": dataclasses.asdict(settings) | {"out": None}, "environment": environment()}
    record = Record(settings.out, run | {"copy_bytes_per_second": rate, "memory_limit": memory})
    # The gate's parameters are there for every CR; vanilla does not look at them.
    params = random_params(config, GATE, settings.dtype, settings.seed)
    plans = [planned(settings, cell, bytes_of(params), memory) for cell in cells]
    compiled = None
    for plan in plans:
        row = row_of(plan)
        if plan.fits:
            if compiled not in (None, plan.program):
                jax.clear_caches()
            compiled = plan.program
            # Ratios of one batch and context share the largest pool, and so one compiled program.
            pages = max(other.pages for other in plans if other.fits and other.program == plan.program)
            try:
                row |= measure(settings, params, plan, pages, rate)
            except Exception as error:  # out of memory, say: the other cells go on
                row["error"] = f"{type(error).__name__}: {error}"[:300]
        record.add(row)


if __name__ == "__main__":
    command.run(main, Settings)
