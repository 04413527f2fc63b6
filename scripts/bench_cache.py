"""Times one decode step against the context length, for the full cache and for DMS at several eviction rates.

A model of SmolLM2-135M's shape (random weights), a batch of sequences whose caches hold random keys and values for
the context; of these the same share is evicted in each head, at random. The full cache is measured with one array a
layer and in pages, DMS in pages and in contiguous storage, each with room for what lives and the steps timed. New
tokens are all marked (DMS) or all kept (full); the few that are timed hardly change what a head holds.

    python -m scripts.bench_cache --out paper_figures/results/bench_cache.json
    python -m paper_figures.bench_cache          # draws it
"""

import dataclasses
import functools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dms_jax import decode, transformer
from dms_jax.cache import storage
from dms_jax.cache.paged import PagedCache
from dms_jax.config import CacheConfig, DMSConfig, ModelConfig, RopeConfig, SamplingConfig
from dms_jax.policies import policy
from experiments.run import environment, write_json

SMOLLM2 = ModelConfig(
    family="llama", vocab_size=49152, num_layers=30, model_dim=576, num_heads=9, num_kv_heads=3, head_dim=64,
    mlp_dim=1536, norm_eps=1e-5, rope=RopeConfig(theta=100000.0), tie_embeddings=True,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What to measure.

    contexts: tokens a sequence has seen. evicted: shares of them that are gone. steps: decode steps in one timed
    call; rounds: timed calls, of which the median counts. out: JSON file for the results.
    """

    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    evicted: tuple[float, ...] = (0.5, 0.75, 0.875)
    batch: int = 8
    window: int = 64
    page_size: int = 64
    steps: int = 4
    rounds: int = 5
    dtype: str = "float32"
    seed: int = 0
    out: Path | None = None


@functools.partial(jax.jit, static_argnames="store", donate_argnames="cache")
def _fill(store, cache, layer, k, v, stay):
    position = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
    return store.extend(cache, layer, k, v, position, stay, None)[0]


def survivors(settings: Settings, context: int, evicted: float) -> np.ndarray:
    """Who lives after `context` tokens, `[B, L, K, T]`: each head loses a share; the newest window + 1 all live."""
    rng, c = np.random.default_rng(settings.seed), SMOLLM2
    stay = rng.random((settings.batch, c.num_layers, c.num_kv_heads, context), np.float32) >= evicted
    stay[..., -settings.window - 1 :] = True
    return stay


def filled(setup: decode.Setup, settings: Settings, stay: np.ndarray, pages: int) -> decode.DecodeState:
    """A state of random keys and values, the same in every layer, for the tokens that stay."""
    rng, c = np.random.default_rng(settings.seed), setup.model.config
    B, _, _, context = stay.shape
    state = decode.init(setup, B, settings.dtype, pages)
    cache, shape = state.cache, (B, context, c.num_kv_heads, c.head_dim)
    k, v = (jnp.asarray(rng.standard_normal(shape, np.float32), settings.dtype) for _ in range(2))
    for layer in range(c.num_layers):
        if isinstance(cache, PagedCache):
            cache = _fill(setup.storage, cache, layer, k, v, stay[:, layer])
        else:
            cache = _fill_arrays(cache, layer, k, v, stay[:, layer])
    length = jnp.full(B, context, jnp.int32)
    ready = state._replace(cache=cache, position=length, last=length + 10_000, done=jnp.zeros(B, bool))
    return ready._replace(position=jnp.array(length), last=jnp.array(ready.last))


def _fill_arrays(cache, layer: int, k, v, stay):
    """Masked (where all stay) and contiguous storage: survivors side by side, without a scatter over everything."""
    order, count = np.argsort(~stay, axis=-1, kind="stable"), stay.sum(axis=-1)
    W = int(count.max())
    order = order[..., :W]
    k, v = (jnp.take_along_axis(x.swapaxes(1, 2), order[..., None], axis=2) for x in (k, v))

    def put(xs, x):
        return (*xs[:layer], x, *xs[layer + 1 :])

    return cache._replace(
        k=put(cache.k, cache.k[layer].at[..., :W].set(k.swapaxes(2, 3))),
        v=put(cache.v, cache.v[layer].at[:, :, :W].set(v)),
        pos=cache.pos.at[layer, ..., :W].set(np.where(np.arange(W) < count[..., None], order, -1)),
        used=cache.used.at[layer].set(count),
    )


def measure(settings: Settings, params, context: int, kind: str, evicted: float) -> dict:
    """Seconds a step, and what the cache holds."""
    timed = settings.steps * (settings.rounds + 1)
    config = CacheConfig(kind, context + timed, settings.page_size)
    # An adapter gate of zeros: every logit is -offset, so the sign of the offset decides for all tokens alike.
    dms = DMSConfig(window=settings.window, gate="adapter", offset=-5.0) if evicted else None
    chosen = policy("dms", dms) if evicted else policy("full", None)
    store = storage(config)
    setup = decode.Setup(transformer.Decoder(SMOLLM2, dms), chosen, store, SamplingConfig(), ())
    stay = survivors(settings, context, evicted)
    pages = int(store.pages(stay.sum(axis=-1) + timed).max())
    state = filled(setup, settings, stay, pages)
    weights = params["gated"] if evicted else params["plain"]
    seconds = []
    for _ in range(settings.rounds + 1):
        begun = time.perf_counter()
        state, chunk = decode.decode_chunk(setup, weights, state, settings.steps)
        active = np.asarray(chunk.active)
        seconds.append((time.perf_counter() - begun) / settings.steps)
        assert active.all(), "a sequence waited for a page: the pool is too small for this benchmark"
    held = np.asarray(chunk.live)
    row = {
        "context": context,
        "storage": kind,
        "evicted": evicted,
        "seconds_per_step": statistics.median(seconds[1:]),
        "all_rounds": seconds[1:],
        "live_tokens": float(held[-1].mean()),
    }
    if store.pool is not None:
        pool = store.pool(state.cache)
        used = pool.size - int(pool.free.sum())
        row |= {"pages_used": used, "bytes_in_pages": used * pool.page_bytes}
    return row


def run(settings: Settings) -> list[dict]:
    """One row a cell; contexts from the shortest, so that a machine too small ends with what it could do."""
    plain = transformer.init(jax.random.key(settings.seed), SMOLLM2)
    gated = transformer.init(jax.random.key(settings.seed), SMOLLM2, DMSConfig(gate="adapter"))
    params = jax.tree.map(lambda x: x.astype(settings.dtype), {"plain": plain, "gated": gated})
    cells = [("masked", 0.0), ("paged", 0.0)]
    cells += [(kind, share) for kind in ("paged", "contiguous") for share in settings.evicted]
    plan = [(context, *cell) for context in settings.contexts for cell in cells]
    rows = []
    for context, kind, evicted in track(plan, description="decode steps"):
        row = measure(settings, params, context, kind, evicted)
        full = next((r for r in rows if r["context"] == context and r["storage"] == "masked"), row)
        rows.append(row | {"of_full": row["seconds_per_step"] / full["seconds_per_step"]})
        jax.clear_caches()
        save(settings, rows)
    return rows


def save(settings: Settings, rows: list[dict]) -> None:
    """What there is so far, so that an interruption loses one cell."""
    if settings.out:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"settings": dataclasses.asdict(settings) | {"out": None}, "environment": environment(), "rows": rows}
        write_json(settings.out, record)


def main(settings: Settings) -> None:
    rows = run(settings)
    table = Table(title=f"SmolLM2-135M's shape, batch {settings.batch}, {settings.dtype}: milliseconds a decode step")
    for column in ("context", "storage", "evicted", "ms a step", "of full", "live tokens a head", "MB in pages"):
        table.add_column(column, justify="right")
    for row in rows:
        size = f"{row['bytes_in_pages'] / 1e6:,.0f}" if "bytes_in_pages" in row else ""
        cells = (f"{1e3 * row['seconds_per_step']:.1f}", f"{row['of_full']:.2f}", f"{row['live_tokens']:,.0f}", size)
        table.add_row(f"{row['context']:,}", row["storage"], f"{row['evicted']:.1%}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
