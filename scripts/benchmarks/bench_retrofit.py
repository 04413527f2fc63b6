"""Tokens per second and model FLOPs utilisation of the retrofit's train step, random weights, the teacher counted.

examples:
  python -m scripts.benchmarks.bench_retrofit                                          (the mini shape, for a CPU)
  python -m scripts.benchmarks.bench_retrofit --model configs/models/qwen3_1.7b.yaml --compute bfloat16 \
      --context 8192 --rows 2
  python -m scripts.benchmarks.bench_retrofit --model configs/models/smollm2_135m.yaml --compute bfloat16 \
      --context 1024 --rows 32
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from tqdm import tqdm

from dms_jax import sharding
from dms_jax.config import DMSConfig, ModelConfig, require
from dms_jax.config_files import load_yaml
from dms_jax.files import write_atomically
from dms_jax.models import transformer
from dms_jax.training import flops
from dms_jax.training.config import RetrofitConfig
from dms_jax.training.data import Batch, Packed, one_document
from dms_jax.training.step import TrainState, compiled_step, initial_state, layout
from dms_jax.types import Params
from scripts import command
from scripts.benchmarks.device_events import covered, recorded


def random_params(model: ModelConfig, dtype: str):
    """Weights shaped like those of `transformer.init`, made on the host: a million random numbers, repeated."""
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
    numbers = (np.random.default_rng(0).standard_normal(1_000_003, np.float32) * 0.02).astype(jax.numpy.dtype(dtype))

    def weight(path, x):
        return np.ones(x.shape, numbers.dtype) if path[-1].key == "scale" else np.resize(numbers, x.shape)

    return jax.tree_util.tree_map_with_path(weight, shapes)


@dataclasses.dataclass(frozen=True)
class Options:
    model: Path = Path("configs/models/mini.yaml")
    """YAML file with the fields of ModelConfig"""
    mode: Literal["full", "adapter", "lora"] = "adapter"
    context: int = 256
    """tokens a row, which is one document"""
    rows: int = 4
    """rows a step, over all devices"""
    accumulate: int = 1
    window: int = 256
    compute: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "block"] = "none"
    loss_chunk: int = 256
    """tokens a row whose logits exist at once"""
    mesh: tuple[int, int, int] = (1, 1, 1)
    steps: int = 10
    """how many are timed; the figure is their median"""
    profile: bool = False
    """also read the device's own record of two more steps"""
    out: Path | None = None
    """JSON file to write"""

    def config(self) -> RetrofitConfig:
        gate = "query" if self.mode == "full" else "adapter"
        return RetrofitConfig(
            dms=DMSConfig(window=self.window, gate=gate, decision_offset=1), mode=self.mode, batch_size=self.rows,
            context=self.context, accumulate=self.accumulate, compute=self.compute, remat=self.remat,
            loss_chunk=self.loss_chunk, mesh=self.mesh,
        )  # fmt: skip


@dataclasses.dataclass
class Training:
    """A compiled step, and what it goes on from."""

    step: Any
    state: TrainState
    base: Params
    batch: Packed
    loss: float = float("nan")

    def seconds(self, count: int) -> list[float]:
        """Of each of `count` steps."""
        taken = []
        for _ in tqdm(range(count), desc="steps", unit="step"):
            began = time.perf_counter()
            self.state, metrics = self.step(self.state, self.base, self.batch)
            jax.block_until_ready(self.state)
            taken.append(time.perf_counter() - began)
        self.loss = float(metrics["loss"])
        return taken

    def profile(self, count: int = 2) -> dict:
        """Milliseconds of a step on the first GPU: all, something running, a collective running, nothing but one."""
        events = recorded(lambda: self.seconds(count))
        first = [event for event in events if event.gpu == min(event.gpu for event in events)]
        collectives, others = [], []
        for event in first:
            (collectives if "nccl" in event.name.lower() else others).append((event.start, event.end))
        busy, spans = covered(collectives + others), collectives + others
        parts = {
            "all": max(end for _, end in spans) - min(start for start, _ in spans),
            "busy": busy,
            "collectives": covered(collectives),
            "collectives_alone": busy - covered(others),
        }
        return {name: nanoseconds / count / 1e6 for name, nanoseconds in parts.items()}


def prepared(shape: ModelConfig, config: RetrofitConfig, mesh: jax.sharding.Mesh) -> tuple[Training, float]:
    """The step and its arguments on the mesh, which must be in force, and how many seconds compiling took."""
    state, base = initial_state(random_params(shape, config.compute), shape, config, mesh)
    places = layout(shape, config, mesh)
    size = (config.batch_size, config.context)
    tokens = np.random.default_rng(1).integers(0, shape.vocab_size, size).astype(np.int32)
    lengths = np.full(config.batch_size, config.context, np.int32)
    batch = sharding.place(one_document(Batch(tokens, lengths, lengths)), places.batch)
    state = state._replace(step=sharding.place(np.int32(config.retirement), places.state.step))
    began = time.perf_counter()
    step = compiled_step(shape, config, False, mesh).lower(state, base, batch).compile()
    return Training(step, state, base, batch), time.perf_counter() - began


def main(options: Annotated[Options, tyro.conf.arg(name="")] = Options()) -> dict:  # noqa: B008 (frozen)
    """Times the step after two steps of warm-up."""
    on_gpu = jax.default_backend() == "gpu"
    require(on_gpu or not options.profile, "profile", True, "it is a GPU's record that it reads")
    shape, config = load_yaml(ModelConfig, options.model), options.config()
    devices = sharding.make_mesh(config.mesh)
    with jax.set_mesh(devices):
        training, compiling = prepared(shape, config, devices)
        second = statistics.median(training.seconds(options.steps + 2)[2:])
        profile = {"profile_ms": training.profile()} if options.profile else {}
    tokens = config.batch_size * config.context
    work = flops.step_flops(shape, config, tokens, (config.context + 1) / 2)
    peak = flops.peak_flops(devices.size)
    memory = training.step.memory_analysis()
    result = {
        "model": options.model.stem,
        "mode": config.mode,
        "mesh": dict(zip(devices.axis_names, devices.devices.shape, strict=True)),
        "device": f"{devices.size} x {jax.devices()[0].device_kind}",
        "context": config.context,
        "rows": config.batch_size,
        "accumulate": config.accumulate,
        "compute": config.compute,
        "remat": config.remat,
        "jax": jax.__version__,
        "seconds_per_step": second,
        "tokens_per_second": tokens / second,
        "model_tflops_per_second": work / second / 1e12,
        "mfu": peak and work / second / peak,
        "peak_flops": peak,
        "compile_seconds": compiling,
        "scratch_bytes": memory.temp_size_in_bytes if memory else None,
        "loss": training.loss,
        **profile,
    }
    print(json.dumps(result, indent=2))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    command.run(main)
