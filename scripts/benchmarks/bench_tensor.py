"""Times decode steps of sequences whose heads are shared by several GPUs, each with a pool of its own.

The cells of bench_decode, which times one GPU; "max" is the largest batch that fits when each device holds its share of
the heads and of the weights. Every device's heads are as long as the next one's.

    python -m scripts.benchmarks.bench_tensor --devices 2 --model qwen3_8b --cells maxx32768x1 maxx32768x8
"""

import dataclasses
import functools
import statistics
import time
from dataclasses import dataclass

from scripts import command
from scripts.benchmarks import bench_decode  # first: it sets how much of the GPU's memory JAX takes

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np

from dms_jax import sharding
from dms_jax.cache import kv_cache
from dms_jax.config import one_of, require
from dms_jax.inference import decode
from experiments.run import environment
from scripts.benchmarks.bench_decode import GATE, MODELS, Plan, bytes_of
from scripts.benchmarks.records import Record


@dataclass(frozen=True)
class Settings(bench_decode.Settings):
    """bench_decode's, of which `memory` is that of a device. devices: how many share the heads."""

    devices: int = 2


def of_a_device(settings: Settings) -> Settings:
    """The same settings of a model with a device's share of the heads."""
    config, name = MODELS[settings.model], f"{settings.model} on one of {settings.devices}"
    heads = {key: getattr(config, key) // settings.devices for key in ("num_heads", "num_kv_heads")}
    MODELS[name] = dataclasses.replace(config, **heads)
    return dataclasses.replace(settings, model=name)


def filled(settings: Settings, spec: decode.DecodeSpec, plan: Plan) -> decode.DecodeState:
    """bench_decode's state on each device of the mesh in force; `plan` is of one device."""
    own, B, letters = of_a_device(settings), plan.batch, spec.kv_cache.letters

    def empty(_):
        cache = bench_decode.tables(plan, plan.pages, own)
        return cache._replace(top=cache.top[None])

    def on_each(function, outputs):
        return jax.jit(sharding.per_device(function, ("",), outputs))(jnp.zeros(()))

    # A pool at a time: made by one program, they need half of their size more for a while.
    pools = {
        name: on_each(functools.partial(_pool, settings, shape), getattr(letters, name))
        for name, shape in bench_decode.pool_shapes(bench_decode.setup_of(own, plan), plan.pages).items()
    }
    cache = on_each(empty, letters._replace(k=None, v=None))._replace(**pools)
    state = decode.init(spec, B, settings.dtype, 1)
    position, last = jnp.full(B, plan.context, jnp.int32), jnp.full(B, 2**30, jnp.int32)
    return state._replace(cache=cache, position=position, last=last, done=jnp.zeros(B, bool))


def _pool(settings: Settings, shape: tuple[int, int, int], _) -> jax.Array:
    return bench_decode.random_pool(jax.random.key(settings.seed), shape, settings.dtype)


def measure(settings: Settings, params, plan: Plan, rate: float) -> dict:
    """The numbers of one row, under the mesh in force."""
    one = bench_decode.setup_of(settings, plan)
    spec = dataclasses.replace(one, kv_cache=kv_cache(one.kv_cache.config, settings.devices))
    state, seconds = filled(settings, spec, plan), []
    for _ in range(settings.rounds + 1):
        begun = time.perf_counter()
        state, chunk = decode.decode_chunk(spec, params, state, settings.steps)
        assert np.asarray(chunk.active).all(), "a sequence waited for a page"
        seconds.append((time.perf_counter() - begun) / settings.steps)
    took, config = statistics.median(seconds[1:]), MODELS[settings.model]
    item = jnp.dtype(settings.dtype).itemsize
    read = bytes_of(params) - (0 if config.tie_embeddings else config.vocab_size * config.model_dim * item)
    kv = float(np.asarray(chunk.held).sum(axis=1).mean()) * 2 * config.head_dim * item
    floor = (read + kv) / settings.devices / rate
    return {
        "seconds_per_step": took,
        "rounds": seconds[1:],
        "tokens_per_second": plan.batch / took,
        "floor_seconds": floor,
        "over_floor": took / floor,
        "compile_and_first_call_seconds": seconds[0] * settings.steps,
    }


def main(settings: Settings) -> None:
    one_of("model", settings.model, tuple(MODELS))
    cells, config = [bench_decode.parse(cell) for cell in settings.cells], MODELS[settings.model]
    shared = settings.devices > 1 and config.num_kv_heads % settings.devices == 0
    require(shared, "devices", settings.devices, f"expected a divisor of the {config.num_kv_heads} KV heads, not 1")
    memory = settings.memory or (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 2**30)
    rate = bench_decode.copy_rate(2**22 if jax.default_backend() == "cpu" else 2**30)
    run = {"settings": dataclasses.asdict(settings) | {"out": None}, "environment": environment()}
    record = Record(settings.out, run | {"copy_bytes_per_second": rate, "memory_limit": memory})
    mesh = sharding.tensor_meshes(1, settings.devices)[0]
    params = bench_decode.random_params(config, GATE, settings.dtype, settings.seed, mesh)
    with jax.set_mesh(mesh):
        for cell in cells:
            plan = bench_decode.planned(of_a_device(settings), cell, bytes_of(params) // settings.devices, memory)
            row = bench_decode.row_of(plan) | {"devices": settings.devices}
            if plan.fits:
                jax.clear_caches()
                try:
                    row |= measure(settings, params, plan, rate)
                except Exception as error:  # out of memory, say: the other cells go on
                    row["error"] = f"{type(error).__name__}: {error}"[:300]
            record.add(row)


if __name__ == "__main__":
    command.run(main, Settings)
