"""Times whole decode steps at the shapes of real models, against the floor of the memory that a step must read.

Random weights, caches filled with random keys and values, in paged storage. "full" is the vanilla model; at another
CR a head holds context / CR tokens (its window included, heads differ by up to --spread), and every new token is
marked, so that the cache grows by the steps timed at most, until they leave the window. The floor of a step is the
bytes of the weights and of the live keys and values over the rate of a device copy, measured in the same run.

    python -m scripts.bench_decode --model qwen3_8b --cells 8x8192x1 8x8192x8 --out bench.json
    python -m scripts.bench_decode --model qwen3_8b --cells maxx32768x1 maxx32768x8
"""

import dataclasses
import json
import math
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dms_jax import decode, transformer
from dms_jax.cache import paged, storage
from dms_jax.config import CacheConfig, DMSConfig, ModelConfig, RopeConfig, SamplingConfig
from dms_jax.policies import policy
from experiments.run import environment

MODELS = {
    "qwen3_8b": ModelConfig("qwen3", 151936, 36, 4096, 32, 8, 128, 12288, rope=RopeConfig(theta=1e6), qk_norm=True),
    "llama3.2_1b": ModelConfig(
        "llama", 128256, 16, 2048, 32, 8, 64, 8192, rope=RopeConfig(theta=5e5), tie_embeddings=True
    ),
    "tiny": ModelConfig("qwen3", 64, 2, 32, 4, 2, 16, 64, qk_norm=True),
}
WINDOW = 256


@dataclass(frozen=True)
class Settings:
    """What to measure.

    cells: BATCHxCONTEXTxCR; a batch of "max" is the largest that fits in --memory. spread: the longest head over the
    shortest, for CR above 1. steps: decode steps in one timed call. memory: bytes of the device that may be used,
    None for what it says it has. out: JSON file, complete after every cell.
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


def random_params(config: ModelConfig, dms: DMSConfig | None, dtype: str, seed: int):
    """Weights of the model's shape, made on the device one by one; the gate's W stays zero."""
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config, dms))
    leaves, tree = jax.tree.flatten(shapes)
    make = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=1)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    values = [
        make(key, x.shape) if len(x.shape) > 1 else jnp.ones(x.shape, dtype)
        for key, x in zip(keys, leaves, strict=True)
    ]
    params = jax.tree.unflatten(tree, values)
    if dms is not None:
        for n in range(config.num_layers):
            proj = params[f"layers_{n}"]["attn"]["gate"]["proj"]
            proj["kernel"] = jnp.zeros_like(proj["kernel"])
    return params


def lengths(config: ModelConfig, batch: int, context: int, cr: float, spread: float, seed: int) -> np.ndarray:
    """Live tokens of each head `[L, B, K]`: their mean is context / cr, and none is under the window's."""
    shape = (config.num_layers, batch, config.num_kv_heads)
    if cr == 1:
        return np.full(shape, context)
    low = 2 / (1 + spread)
    share = np.random.default_rng(seed).uniform(low, low * spread, shape)
    return np.clip(np.round(share * context / cr / share.mean()), min(WINDOW, context // cr), context).astype(int)


def random_pool(shape: tuple[int, ...], dtype: str, seed: int):
    """A pool of random numbers, made in pieces: the float32 form of the whole would not fit."""
    piece = 1 + (shape[0] - 1) // 64

    def body(n, pool):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), n), (piece, *shape[1:]), dtype)
        return jax.lax.dynamic_update_slice(pool, noise, (jnp.minimum(n * piece, shape[0] - piece), 0, 0))

    return jax.jit(lambda: jax.lax.fori_loop(0, 64, body, jnp.zeros(shape, dtype)))()


def filled(setup: decode.Setup, live: np.ndarray, context: int, pages: int, settings: Settings) -> decode.DecodeState:
    """A state in which every head holds `live` random tokens, in pages scattered over the pool."""
    L, B, K = live.shape
    page, D = settings.page_size, setup.model.config.head_dim
    held = -(-live // page)
    P = setup.storage.slots // page
    ids = np.random.default_rng(settings.seed).permutation(pages).astype(np.int32)
    table = np.zeros((L, B, K, P), np.int32)
    mask = np.arange(P) < held[..., None]
    used = int(mask.sum())
    table[mask] = ids[:used]
    cache = paged.PagedCache(
        k=random_pool((pages, page, D), settings.dtype, settings.seed),
        v=random_pool((pages, page, D), settings.dtype, settings.seed + 1),
        pos=jnp.zeros((pages, page), jnp.int32),
        k_scale=None,
        v_scale=None,
        table=jnp.asarray(table),
        length=jnp.asarray(live, jnp.int32),
        free=jnp.asarray(np.concatenate([ids[used:], ids[:used]])),
        top=jnp.asarray(pages - used, jnp.int32),
    )
    states = decode.init(setup, B, settings.dtype, 1).policy
    return decode.DecodeState(
        cache, states, jnp.zeros(B, jnp.int32), jnp.full(B, context, jnp.int32), jnp.full(B, 2**30, jnp.int32),
        jnp.zeros(B, bool), jnp.zeros((B, 2), jnp.uint32),
    )  # fmt: skip


def measure(settings: Settings, params, batch: str, context: int, cr: float, rate: float, memory: int) -> dict:
    config = MODELS[settings.model]
    timed = settings.steps * (settings.rounds + 1)
    dms = DMSConfig(window=WINDOW, gate="adapter", offset=-5.0)  # a gate of zeros: every new token is evicted
    chosen = policy("full", None) if cr == 1 else policy("dms", dms)
    cache = CacheConfig("paged", context + timed, settings.page_size)
    setup = decode.Setup(
        transformer.Decoder(config, None if cr == 1 else dms), chosen, storage(cache), SamplingConfig(), ()
    )
    item = jnp.dtype(settings.dtype).itemsize
    weights = sum(x.size for x in jax.tree.leaves(params)) * item
    per_page = paged.bytes_per_page(config, cache, settings.dtype)
    grown = timed if cr == 1 else 0

    def pages_for(B: int) -> int:
        live = lengths(config, B, context, cr, settings.spread, settings.seed)
        return int((-(-(live + grown) // settings.page_size)).sum()) + live.size

    if batch == "max":
        # Weights, pools, and a tenth for what a step needs besides.
        room = 0.9 * memory - weights
        B = max(1, math.floor(room / (pages_for(1) * per_page)))
    else:
        B = int(batch)
    live = lengths(config, B, context, cr, settings.spread, settings.seed)
    pages = pages_for(B)
    state = filled(setup, live, context, pages, settings)
    begun = time.perf_counter()
    seconds = []
    for _ in range(settings.rounds + 1):
        start = time.perf_counter()
        state, chunk = decode.decode_chunk(setup, params, state, settings.steps)
        assert np.asarray(chunk.active).all(), "a sequence waited for a page"
        seconds.append((time.perf_counter() - start) / settings.steps)
    step = statistics.median(seconds[1:])
    # The embedding is a lookup of B rows, unless it is the unembedding too.
    read = weights - (0 if config.tie_embeddings else config.vocab_size * config.model_dim * item)
    kv = float(np.asarray(chunk.live).sum(axis=(1, 2, 3)).mean()) * 2 * config.head_dim * item
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "model": settings.model,
        "batch": B,
        "largest_batch": batch == "max",
        "context": context,
        "cr": cr,
        "seconds_per_step": step,
        "rounds": seconds[1:],
        "tokens_per_second": B / step,
        "floor_seconds": (read + kv) / rate,
        "over_floor": step / ((read + kv) / rate),
        "weight_bytes": read,
        "live_kv_bytes": kv,
        "pool_bytes": pages * per_page,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "compile_and_first_call_seconds": seconds[0] * settings.steps,
        "seconds_in_all": time.perf_counter() - begun,
    }


def parse(cell: str) -> tuple[str, int, float]:
    """BATCHxCONTEXTxCR, as in 8x8192x4 or maxx32768x8."""
    batch, context, cr = cell.rsplit("x", 2)
    if batch != "max" and not batch.isdigit():
        raise SystemExit(f"cells={cell!r}: expected BATCHxCONTEXTxCR, BATCH a number or max")
    return batch, int(context), float(cr)


def main(settings: Settings) -> None:
    cells = [parse(cell) for cell in settings.cells]
    config = MODELS[settings.model]
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 2**30)
    memory = settings.memory or limit
    rate = copy_rate(2**22 if jax.default_backend() == "cpu" else 2**30)
    # The gate's parameters are there for every CR; vanilla does not look at them.
    dms = DMSConfig(window=WINDOW, gate="adapter")
    params = random_params(config, dms, settings.dtype, settings.seed)
    record = {"settings": dataclasses.asdict(settings) | {"out": str(settings.out)}, "environment": environment()}
    record |= {"copy_bytes_per_second": rate, "memory_limit": memory, "rows": []}
    for batch, context, cr in cells:
        try:
            row = measure(settings, params, batch, context, cr, rate, memory)
        except Exception as error:  # out of memory, say: the other cells go on
            row = {"batch": batch, "context": context, "cr": cr, "error": f"{type(error).__name__}: {error}"[:300]}
        record["rows"].append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "rounds"}), flush=True)
        if settings.out:
            settings.out.write_text(json.dumps(record, indent=1) + "\n")
        jax.clear_caches()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
