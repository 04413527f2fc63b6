"""Run in processes of its own by test_sharding.py: the loss curve of a tiny retrofit on meshes of virtual CPU devices.

usage: python multidevice.py OUT MESH...              meshes as 2x4x1, on 8 devices
       python multidevice.py OUT MESH --process I N PORT   process I of N, with 8 / N devices each
"""

import json
import os
import sys

PROCESS = sys.argv[sys.argv.index("--process") + 1 :] if "--process" in sys.argv else ["0", "1", ""]
NUMBER, COUNT = int(PROCESS[0]), int(PROCESS[1])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // COUNT}"

import jax  # noqa: E402

if COUNT > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{PROCESS[2]}", COUNT, NUMBER)

import numpy as np  # noqa: E402

from dms_jax import sharding  # noqa: E402
from dms_jax.config import DMSConfig, ModelConfig  # noqa: E402
from dms_jax.models import transformer  # noqa: E402
from dms_jax.training import checkpoint, data  # noqa: E402
from dms_jax.training import step as retrofit  # noqa: E402
from dms_jax.training.config import RetrofitConfig  # noqa: E402

MODEL = ModelConfig("qwen3", 40, 1, 16, 8, 8, 4, 24, qk_norm=True)
CONFIG = RetrofitConfig(
    # A soft gate: with the default scale and tau, rounding errors grow a hundredfold in ten steps of any run.
    dms=DMSConfig(window=2, gate="adapter", decision_offset=1, scale=10.0, logit_bias=1.0, tau=0.5),
    steps_per_cr=10,
    max_cr=3.0,
    learning_rate=1e-3,
    warmup_steps=2,
    batch_size=16,
    accumulate=2,
    loss_chunk=8,
    remat="block",
)
STEPS, HALF = 20, 10
# Compiled for a few runs only: LLVM's optimisation costs more than it saves here.
QUICK = {"xla_backend_optimization_level": 0}


def params():
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), MODEL))
    rng = np.random.default_rng(0)

    def weight(path, x):
        return ((path[-1].key == "scale") + 0.3 * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(weight, shapes)


def batch(step: int) -> data.Packed:
    """Rows of two documents and padding."""
    rng = np.random.default_rng(step)
    edge = rng.integers(3, 9, (16, 1))
    place = np.arange(16)[None]
    segments = np.where(place < edge, 1, np.where(place < 14, 2, 0))
    tokens = rng.integers(0, MODEL.vocab_size, (16, 16))
    return data.Packed(tokens, np.where(place < edge, place, place - edge), segments)


def curve(shape, folder=None, first=0, last=STEPS) -> list[float]:
    """Losses of the steps; the state is restored from `folder`, if there is one, and saved there at the end."""
    mesh = sharding.make_mesh(shape)
    with jax.set_mesh(mesh):
        state, base, places = retrofit.start(params(), MODEL, CONFIG, mesh)
        step_fn = retrofit.compiled_step(MODEL, CONFIG, False, places, QUICK)
        losses, layouts = [], [x.sharding for x in jax.tree.leaves(state)]
        with checkpoint.Checkpoints(folder) if folder else _nothing() as checkpoints:
            if first:
                step, state, _ = checkpoints.restore(state)
                assert step == first == int(state.step)
            for step in range(first, last):
                state, metrics = step_fn(state, base, sharding.place(batch(step), places.batch))
                losses.append(float(metrics["loss"]))
            assert [x.sharding for x in jax.tree.leaves(state)] == layouts, "the state stays where it was put"
            if folder and not first:
                checkpoints.save(last, state, None)
        return losses


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *_):
        pass


def split(shape) -> float:
    """Bytes of the state on the first device as a share of the whole."""
    mesh = sharding.make_mesh(shape)
    state, _, _ = retrofit.start(params(), MODEL, CONFIG, mesh)
    leaves = jax.tree.leaves(state)
    return sum(x.addressable_shards[0].data.nbytes for x in leaves) / sum(x.nbytes for x in leaves)


def main() -> None:
    out, meshes = sys.argv[1], [arg for arg in sys.argv[2:] if arg.count("x") == 2]
    shapes = {name: tuple(map(int, name.split("x"))) for name in meshes}
    result = {name: curve(shape) for name, shape in shapes.items()}
    if COUNT == 1:
        # Half the run on one mesh, the rest on another.
        curve((2, 2, 2), out + ".ckpt", 0, HALF)
        result["resumed"] = curve((1, 4, 2), out + ".ckpt", HALF)
        result["share"] = split((1, 8, 1)), split((2, 2, 2))
    if NUMBER == 0:
        with open(out, "w") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main()
