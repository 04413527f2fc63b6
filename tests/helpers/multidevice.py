"""Run in processes of its own by test_sharding.py: loss curves of a tiny retrofit on meshes of virtual CPU devices.

usage: python multidevice.py OUT                       one process with 8 devices, every mesh
       python multidevice.py OUT NUMBER COUNT PORT     process NUMBER of COUNT with a device each, a mesh along fsdp
"""

import json
import os
import sys
from pathlib import Path

OUT, (NUMBER, COUNT, PORT) = Path(sys.argv[1]), map(int, sys.argv[2:] or ("0", "1", "0"))
os.environ["JAX_PLATFORMS"] = "cpu"
DEVICES = f"--xla_force_host_platform_device_count={8 if COUNT == 1 else 1}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}"

import jax  # noqa: E402

if COUNT > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{PORT}", COUNT, NUMBER)

import numpy as np  # noqa: E402

from dms_jax import sharding  # noqa: E402
from dms_jax.config import DMSConfig, LatentConfig, ModelConfig  # noqa: E402
from dms_jax.training import checkpoint  # noqa: E402
from dms_jax.training.config import RetrofitConfig  # noqa: E402
from dms_jax.training.data import Packed  # noqa: E402
from dms_jax.training.step import abstract_state, compiled_step, initial_state, layout  # noqa: E402

MODEL = ModelConfig("qwen3", 40, 1, 16, 8, 8, 4, 24, qk_norm=True)
LATENT = ModelConfig("youtu", 40, 1, 16, 8, 1, 10, 24, latent=LatentConfig(6, 4, 4, 4, 8))
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


def params(model: ModelConfig):
    _, shapes = abstract_state(model, CONFIG)
    rng = np.random.default_rng(0)

    def weight(path, x):
        return ((path[-1].key == "scale") + 0.3 * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(weight, shapes)


def batch(step: int) -> Packed:
    """Rows of two documents and padding."""
    rng = np.random.default_rng(step)
    edge = rng.integers(3, 9, (16, 1))
    place = np.arange(16)[None]
    segments = np.where(place < edge, 1, np.where(place < 14, 2, 0))
    tokens = rng.integers(0, MODEL.vocab_size, (16, 16))
    return Packed(tokens, np.where(place < edge, place, place - edge), segments)


def curve(shape, folder: Path | None = None, resume: bool = False, model: ModelConfig = MODEL) -> list[float]:
    """Losses of the steps; the state at HALF is saved in `folder`, or the rest is run from the one found there."""
    mesh = sharding.make_mesh(shape)
    with jax.set_mesh(mesh):
        state, base = initial_state(params(model), model, CONFIG, mesh)
        places, step_fn = layout(model, CONFIG, mesh), compiled_step(model, CONFIG, False, mesh)
        losses, layouts = [], [x.sharding for x in jax.tree.leaves(state)]
        checkpoints = checkpoint.Checkpoints(folder) if folder else None
        if resume:
            step, state, _ = checkpoints.restore(state)
            assert step == HALF == int(state.step)
        for step in range(HALF if resume else 0, STEPS):
            state, metrics = step_fn(state, base, sharding.place(batch(step), places.batch))
            losses.append(float(metrics["loss"]))
            if folder and step + 1 == HALF and not resume:
                checkpoints.save(HALF, state, None)
        assert [x.sharding for x in jax.tree.leaves(state)] == layouts, "the state stays where it was put"
        if checkpoints:
            checkpoints.close()
        return losses


def split(shape) -> float:
    """Bytes of the state on the first device as a share of the whole."""
    state, _ = initial_state(params(MODEL), MODEL, CONFIG, sharding.make_mesh(shape))
    leaves = jax.tree.leaves(state)
    return sum(x.addressable_shards[0].data.nbytes for x in leaves) / sum(x.nbytes for x in leaves)


def one_process() -> dict:
    shapes = {name: tuple(map(int, name.split("x"))) for name in ("1x1x1", "8x1x1", "1x1x8")}
    found = {name: curve(shape) for name, shape in shapes.items()}
    folder = OUT.with_suffix(".checkpoints")
    found["2x2x2"] = curve((2, 2, 2), folder)
    found["latent"] = [curve(shape, model=LATENT) for shape in ((1, 1, 1), (2, 2, 2))]
    return found | {"resumed": curve((1, 4, 2), folder, resume=True), "share": [split((1, 8, 1)), split((2, 2, 2))]}


def several_processes() -> dict:
    folder = OUT.with_suffix(".checkpoints")
    found = {"curve": curve((1, COUNT, 1), folder), "resumed": curve((1, COUNT, 1), folder, resume=True)}
    whole = checkpoint.fault(folder / str(HALF))
    written = {path.name: sorted(json.loads(path.read_text())["files"]) for path in folder.rglob("sums*.json")}
    return found | {"fault": whole, "written": written}


def main() -> None:
    found = one_process() if COUNT == 1 else several_processes()
    if NUMBER == 0:
        OUT.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
