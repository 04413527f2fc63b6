"""Times decode steps over keys and values in pinned host memory, beside those of DMS in the GPU's own.

modes:
  device    all keys and values in the GPU's memory, where they fit (bench_decode)
  dms       DMS, context / --cr tokens a head, in the GPU's memory (bench_decode)
  streamed  all in host memory: while a layer is computed the next one's cross, into two buffers
  quest     all in host memory, summaries of pages in the GPU's: in each layer the kernel reads the pages that Quest
            chooses, context / --cr tokens a head, from host memory as it needs them

Random weights, keys and values. New tokens stay in the GPU's memory: their way to the host is not timed. The floor of
the last two is what must cross over the rate of a copy from pinned memory, measured in the same run.

    python -m scripts.benchmarks.bench_offload --model llama3.2_1b --cells 1x8192 8x8192 8x32768 --out offload.json
"""

import dataclasses
import functools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from scripts import command
from scripts.benchmarks import bench_decode  # first: it sets how much of the GPU's memory JAX takes

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dms_jax import kernels
from dms_jax.config import ModelConfig, one_of, require
from dms_jax.models.transformer import Decoder
from dms_jax.policies import DecodeStep, Quest
from dms_jax.policies.quest import Summaries
from experiments.run import environment
from scripts.benchmarks.bench_decode import GATE, MODELS, bytes_of, random_params, random_pool
from scripts.benchmarks.records import Record

AHEAD = 2  # layers whose keys and values are on the device, or on their way


@dataclass(frozen=True)
class Settings:
    """What to measure.

    cells: BATCHxCONTEXT. steps: decode steps in one timed round. host_memory: bytes that may be pinned.
    out: JSON file, complete after every row; rows already there and not asked for stay.
    """

    model: str = "llama3.2_1b"
    cells: tuple[str, ...] = ("1x8192", "8x8192", "1x32768", "8x32768")
    modes: tuple[Literal["device", "dms", "streamed", "quest"], ...] = ("device", "dms", "streamed", "quest")
    cr: float = 8.0
    page_size: int = 64
    steps: int = 8
    rounds: int = 3
    dtype: str = "bfloat16"
    host_memory: int = 60 * 2**30
    seed: int = 0
    out: Path | None = None


class FullCache(NamedTuple):
    """Keys and values of all tokens, a pool for each layer, and on the device what says where they lie."""

    layers: tuple[tuple[Array, Array], ...]  # of each [B * K * P, page, D] twice
    summaries: tuple[Summaries, ...]
    table: Int[Array, "B K P"]
    lengths: Int[Array, "B K"]


@dataclass(frozen=True, eq=False)
class HostAttend:
    """An `Attend` for one new token a sequence: to the cache, and to the new tokens, which it writes.

    quest: None streams. slots: `[L, B, K]`, of the new token among the new ones. It threads through the layers the
    pages of the new tokens, and the next layers' keys and values on the device.
    """

    cache: FullCache
    quest: Quest | None
    slots: Int[Array, "L B K"]

    def __call__(self, layer, q, k, v, logit, state):
        recent, ahead = state
        q = q[:, 0]
        near, recent = kernels.paged_decode_attention_update(q, k[:, 0], v[:, 0], recent, self.slots, layer)
        readable, pools = None, self.cache.layers[layer]
        if self.quest is None:
            pools, *ahead = ahead
        else:
            readable = self._pages(layer, q)
        far = kernels.paged_decode_attention(
            q, kernels.Pages(*pools, self.cache.table, self.cache.lengths), readable=readable
        )
        share = jax.nn.sigmoid(far.lse - near.lse)[..., None].astype(q.dtype)
        out = share * far.out + (1 - share) * near.out
        if self.quest is None and layer + AHEAD < len(self.cache.layers):
            # Not before this layer is done, or all would be sent for at once.
            following, out = jax.lax.optimization_barrier((self.cache.layers[layer + AHEAD], out))
            ahead = [*ahead, jax.device_put(following, jax.memory.Space.Device)]
        return out[:, None], (recent, ahead)

    def _pages(self, layer: int, q):
        """Quest's choice among the pages of the cache."""
        B = len(q)
        position, keys = jnp.zeros(B, jnp.int32), jnp.zeros((B, 2), jnp.uint32)
        step = DecodeStep(jnp.int32(layer), position, jnp.ones(B, bool), self.cache.lengths, keys)
        return self.quest.select_pages(self.cache.summaries[layer], step, q)[0]


@functools.partial(jax.jit, static_argnames=("config", "quest"), donate_argnames=("recent",))
def step(config: ModelConfig, quest: Quest | None, params, cache: FullCache, recent: kernels.Pages, token, position):
    """A decode step: logits `[B, V]`, the greedy token `[B]`, the pages of new tokens, and the next position."""
    recent = recent._replace(lengths=recent.lengths + 1)
    ahead = [] if quest else [jax.device_put(pools, jax.memory.Space.Device) for pools in cache.layers[:AHEAD]]
    attend, model = HostAttend(cache, quest, recent.lengths - 1), Decoder(config)
    given = token[:, None], position[:, None], attend, (recent, ahead)
    hidden, (recent, _) = model.apply({"params": params}, *given)
    logits = model.apply({"params": params}, hidden, method="unembed")[:, 0]
    return logits, jnp.argmax(logits, axis=-1).astype(jnp.int32), recent, position + 1


def host_memory():
    """Where the full cache lies: pinned host memory of a GPU, the usual memory of a CPU."""
    kind = "pinned_host" if jax.default_backend() == "gpu" else None
    return jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)


def link_rate(size: int) -> float:
    """Bytes per second of a copy from pinned host memory to the device."""
    x = jax.block_until_ready(jax.device_put(jnp.zeros(size, jnp.uint8), host_memory()))
    copy = jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Device))
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        jax.block_until_ready(copy(x))
        seconds.append(time.perf_counter() - begun)
    return size / statistics.median(seconds[1:])


@functools.partial(jax.jit, static_argnames=("shape",))
def summarized(k, shape: tuple[int, ...]) -> Summaries:
    """Quest's summaries of a pool whose pages are those of `[B, K, P]` heads in order."""
    return Summaries(k.min(axis=1).reshape(shape), k.max(axis=1).reshape(shape))


def filled(settings: Settings, batch: int, context: int) -> FullCache:
    """A cache of random keys and values, made on the device and moved layer by layer."""
    config, page = MODELS[settings.model], settings.page_size
    B, K, P, D = batch, config.num_kv_heads, context // page, config.head_dim
    layers, summaries = [], []
    for key in jax.random.split(jax.random.key(settings.seed), config.num_layers):
        k, v = (random_pool(half, (B * K * P, page, D), settings.dtype) for half in jax.random.split(key))
        summaries.append(summarized(k, (B, K, P, D)))
        layers.append(jax.block_until_ready(jax.device_put((k, v), host_memory())))
    table = jnp.arange(B * K * P, dtype=jnp.int32).reshape(B, K, P)
    return FullCache(tuple(layers), tuple(summaries), table, jnp.full((B, K), P * page, jnp.int32))


def no_tokens(config: ModelConfig, batch: int, most: int, dtype: str) -> kernels.Pages:
    """A page for each layer, sequence and head, for up to `most` new tokens."""
    heads = (config.num_layers, batch, config.num_kv_heads)
    N, page = int(np.prod(heads)), 1 << max(4, (most - 1).bit_length())
    k, v = (jnp.zeros((N, page, config.head_dim), dtype) for _ in "kv")
    table = jnp.arange(N, dtype=jnp.int32).reshape(*heads, 1)
    return kernels.Pages(k, v, table, jnp.zeros(heads, jnp.int32))


def offloaded(settings: Settings, params, cache: FullCache, mode: str, rate: float) -> dict:
    """The numbers of a row of mode "streamed" or "quest"."""
    config = MODELS[settings.model]
    B, context = len(cache.table), int(cache.lengths[0, 0])
    budget = int(context / settings.cr) // settings.page_size * settings.page_size
    quest = Quest(budget, settings.page_size) if mode == "quest" else None
    token, position = jnp.zeros(B, jnp.int32), jnp.full(B, context, jnp.int32)
    recent = no_tokens(config, B, settings.steps * (settings.rounds + 1), settings.dtype)
    seconds = []
    for _ in range(settings.rounds + 1):
        begun = time.perf_counter()
        for _ in range(settings.steps):
            _, token, recent, position = step(config, quest, params, cache, recent, token, position)
        jax.block_until_ready(token)
        seconds.append((time.perf_counter() - begun) / settings.steps)
    took = statistics.median(seconds[1:])
    item = jnp.dtype(settings.dtype).itemsize
    crossing = (budget if quest else context) * 2 * B * config.num_layers * config.num_kv_heads * config.head_dim * item
    return {
        "seconds_per_step": took,
        "rounds": seconds[1:],
        "tokens_per_second": B / took,
        "crossing_bytes": crossing,
        "floor_seconds": crossing / rate,
        "over_floor": took * rate / crossing,
        "compile_and_first_call_seconds": seconds[0] * settings.steps,
    }


def on_device(settings: Settings, params, cell: tuple[int, int], mode: str, rate: float) -> dict:
    """The numbers of a row of mode "device" or "dms"; `rate` is that of a copy on the device."""
    same = {key: getattr(settings, key) for key in ("model", "page_size", "steps", "rounds", "dtype", "seed")}
    own, cr = bench_decode.Settings(**same), settings.cr if mode == "dms" else 1.0
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 2**30)
    plan = bench_decode.planned(own, (str(cell[0]), cell[1], cr), bytes_of(params), memory)
    return bench_decode.measure(own, params, plan, plan.pages, rate) if plan.fits else {"fits": False}


def rows_of(settings: Settings, params, cell: tuple[int, int], rates: dict[str, float]):
    """A row for each mode of one cell."""
    (batch, context), config = cell, MODELS[settings.model]
    held = 2 * batch * context * config.num_layers * config.num_kv_heads * config.head_dim
    row = {"cell": f"{batch}x{context}", "batch": batch, "context": context, "cr": settings.cr, "fits": True}
    row["full_kv_bytes"] = held * jnp.dtype(settings.dtype).itemsize
    cache = None
    for mode in settings.modes:
        try:
            if mode in ("device", "dms"):
                made = on_device(settings, params, cell, mode, rates["device"])
            elif row["full_kv_bytes"] > settings.host_memory:
                made = {"fits": False}
            else:
                cache = cache or filled(settings, batch, context)
                made = offloaded(settings, params, cache, mode, rates["link"])
        except Exception as error:  # out of memory, say: the other rows go on
            made = {"error": f"{type(error).__name__}: {error}"[:300]}
        yield row | {"mode": mode} | made
        jax.clear_caches()


def parse(cell: str, page_size: int) -> tuple[int, int]:
    """BATCHxCONTEXT, as in 8x8192; the context is a whole number of pages."""
    batch, _, context = cell.partition("x")
    whole = batch.isdigit() and context.isdigit() and int(context) % page_size == 0
    require(whole, "cells", cell, f"expected BATCHxCONTEXT, CONTEXT a multiple of page_size={page_size}")
    return int(batch), int(context)


def main(settings: Settings) -> None:
    one_of("model", settings.model, tuple(MODELS))
    cells = [parse(cell, settings.page_size) for cell in settings.cells]
    size = 2**22 if jax.default_backend() == "cpu" else 2**30
    rates = {"device": bench_decode.copy_rate(size), "link": link_rate(size)}
    run = {"settings": dataclasses.asdict(settings) | {"out": None}, "environment": environment()}
    about = {"copy_bytes_per_second": rates["device"], "link_bytes_per_second": rates["link"]}
    record = Record(settings.out, run | about)
    params = random_params(MODELS[settings.model], GATE, settings.dtype, settings.seed)
    for cell in cells:
        for row in rows_of(settings, params, cell, rates):
            record.add(row)


if __name__ == "__main__":
    command.run(main, Settings)
