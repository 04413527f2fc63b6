"""Run in processes of its own by test_checkpoint.py, which end it: a small training run in FOLDER.

usage: python killed.py FOLDER [BYTES]    BYTES: the most that a file may grow to, as on a full disk
"""

import os
import resource
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from dms_jax.training.data import Packed, PackedStream  # noqa: E402
from dms_jax.training.loop import Loop  # noqa: E402
from dms_jax.training.step import TrainState  # noqa: E402
from scripts import command  # noqa: E402

STEPS = 60


class Numbers:
    """Documents of 1 to 8 tokens; document n is its own number, repeated."""

    lengths = np.random.default_rng(0).integers(1, 9, 30)

    def __len__(self) -> int:
        return len(self.lengths)

    def encode(self, rows):
        return [np.full(self.lengths[row], row, np.int32) for row in rows]


@jax.jit
def step(state: TrainState, batch: Packed):
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
    state = TrainState({"w": w}, (), jnp.zeros((), jnp.int32))
    Loop(FOLDER, STEPS, save_every=3, log_every=1, keep=(20,)).run(
        slow, state, PackedStream([Numbers()], [1.0], 10, 2, seed=0)
    )


if __name__ == "__main__":
    FOLDER, limits = Path(sys.argv[1]), [int(size) for size in sys.argv[2:]]
    del sys.argv[1:]  # command.run reads the rest
    for size in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    command.run(main)
