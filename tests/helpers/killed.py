"""Run in processes of its own by test_checkpoint.py, which kill it: a small run of `loop.fit` in FOLDER.

usage: python killed.py FOLDER
"""

import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from dms_jax.training import data, loop  # noqa: E402
from dms_jax.training import step as retrofit  # noqa: E402
from dms_jax.training.documents import Documents  # noqa: E402

STEPS = 60


def documents() -> Documents:
    lengths = np.random.default_rng(0).integers(1, 9, 30)
    return Documents("numbers", 30, lambda rows: [np.full(lengths[row], row, np.int32) for row in rows])


@jax.jit
def step(state: retrofit.TrainState, batch: data.Packed):
    """Sensitive to every batch before: a state that was not restored to the bit shows in the loss."""
    x = jnp.sum(jnp.sin(batch.tokens * 1.0) * (batch.segments > 0))
    w = state.params["w"]
    w = 3.7 * w * (1 - w) * 0.999 + 1e-6 * jnp.tanh(x)
    metrics = {"loss": w.mean(), "grad_norm": jnp.abs(x), "first": w[:3]}
    return state._replace(params={"w": w}, step=state.step + 1), metrics


def slow(number, state, batch):
    time.sleep(0.01)
    return step(state, batch)


def main() -> None:
    w = jnp.linspace(0.1, 0.9, 200_000)
    state = retrofit.TrainState({"w": w}, (), jnp.zeros((), jnp.int32))
    stream = data.packed_stream([documents()], [1.0], 10, 2, seed=0)
    loop.fit(slow, state, stream, STEPS, Path(sys.argv[1]), save_every=3, log_every=1, always=(20,))


if __name__ == "__main__":
    main()
