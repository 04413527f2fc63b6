"""A tiny retrofit, for the tests of training: a model, short problems, and runs that can be broken off."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from dms_jax import sharding
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.training.config import RetrofitConfig
from dms_jax.training.data import Batch, PoolStream
from dms_jax.training.step import initial_state
from dms_jax.training.train import train
from tests.helpers.models import random_params

V = 31
MODEL = ModelConfig("llama", V, 2, 12, 4, 2, 6, 16)
CONFIG = RetrofitConfig(
    dms=DMSConfig(window=2),
    retire_steps=20,
    steps_per_cr=20,
    max_cr=2.0,
    hold_steps=20,
    learning_rate=1e-2,
    warmup_steps=2,
    batch_size=8,
    save_every=20,
    log_every=2,
)
TEACHER = random_params(MODEL)


def random_pool(count: int = 64, seed: int = 0) -> Batch:
    """Sequences of 4 to 16 random tokens."""
    rng = np.random.default_rng(seed)
    return Batch(rng.integers(0, V, (count, 16)), np.ones(count, int), rng.integers(4, 17, count))


POOL = random_pool()


class Interrupted(Exception):
    pass


def stream(cursor, batch_size: int = CONFIG.batch_size, broken_at: int | None = None):
    """The pool as packed rows; instead of the batch of step `broken_at` comes an error."""
    for batch, after in PoolStream(POOL, batch_size, CONFIG.seed).packed(cursor):
        if after - 1 == broken_at:
            raise Interrupted
        yield batch, after


def run(folder: Path, config: RetrofitConfig = CONFIG, broken_at: int | None = None, **options):
    """The last state of a whole retrofit of the tiny model; `options` are those of `train`."""
    batches = lambda cursor: stream(cursor, config.batch_size, broken_at)  # noqa: E731
    return train(TEACHER, MODEL, config, batches, folder, **options)


def start(**changes):
    """State at step 0, base and config of a retrofit."""
    config = dataclasses.replace(CONFIG, **changes)
    state, base = initial_state(TEACHER, MODEL, config, sharding.make_mesh((1, 1, 1)))
    return state, base, config


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def log_without_speed(folder: Path) -> list[dict]:
    """The lines of the log, without what differs between two runs of the same."""
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "tflops")} for line in log_of(folder)]


def assert_same(one, other) -> None:
    """Equal to the last bit."""
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
