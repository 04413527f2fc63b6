"""Tokens per second and model FLOPs utilisation of the retrofit's train step, random weights, the teacher counted.

examples:
  python -m scripts.benchmarks.bench_retrofit                                          (the mini shape, for a CPU)
  python -m scripts.benchmarks.bench_retrofit --model configs/models/qwen3_1.7b.yaml --compute bfloat16 \
      --context 8192 --rows 2
  python -m scripts.benchmarks.bench_retrofit --model configs/models/smollm2_135m.yaml --compute bfloat16 \
      --context 1024 --rows 32
"""

import json
import math
import statistics
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from tqdm import tqdm

from dms_jax import sharding
from dms_jax.config import ConfigError, DMSConfig, ModelConfig, load_yaml
from dms_jax.models import transformer
from dms_jax.training import data, flops
from dms_jax.training import step as retrofit
from dms_jax.training.config import RetrofitConfig


def random_params(model: ModelConfig, dtype: str):
    """Weights like those of `transformer.init`, made on the host without running the model."""
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
    rng = np.random.default_rng(0)

    def weight(path, x):
        values = np.ones(x.shape, np.float32)
        if path[-1].key != "scale":
            values = rng.standard_normal(x.shape, np.float32) * 0.02
        return values.astype(jax.numpy.dtype(dtype))

    return jax.tree_util.tree_map_with_path(weight, shapes)


def main(
    model: Path = Path("configs/models/mini.yaml"),
    mode: Literal["full", "adapter", "lora"] = "adapter",
    context: int = 256,
    rows: int = 4,
    accumulate: int = 1,
    window: int = 256,
    compute: Literal["float32", "bfloat16"] = "float32",
    remat: Literal["none", "dots", "block"] = "none",
    loss_chunk: int = 256,
    mesh: tuple[int, int, int] = (1, 1, 1),
    steps: int = 10,
    out: Path | None = None,
) -> dict:
    """Times the step after two steps of warm-up.

    Args:
      model: YAML file with the fields of ModelConfig.
      context: tokens a row, which is one document.
      rows: rows a step, over all devices.
      loss_chunk: tokens a row whose logits exist at once.
      steps: how many are timed; the figure is their median.
      out: JSON file to write.
    """
    shape = load_yaml(ModelConfig, model)
    dms = DMSConfig(window=window, gate="query" if mode == "full" else "adapter", decision_offset=1)
    config = RetrofitConfig(
        dms=dms, mode=mode, batch_size=rows, context=context, accumulate=accumulate, compute=compute,
        remat=remat, loss_chunk=loss_chunk, mesh=mesh,
    )  # fmt: skip
    layout = sharding.make_mesh(mesh)
    with jax.set_mesh(layout):
        state, base, places = retrofit.start(random_params(shape, compute), shape, config, layout)
        tokens = np.random.default_rng(1).integers(0, shape.vocab_size, (rows, context)).astype(np.int32)
        lengths = np.full(rows, context, np.int32)
        batch = sharding.place(data.one_document(data.Batch(tokens, lengths, lengths)), places.batch)
        state = state._replace(step=sharding.place(np.int32(config.retirement), places.state.step))
        began = time.perf_counter()
        step = retrofit.compiled_step(shape, config, False, places).lower(state, base, batch).compile()
        compiling = time.perf_counter() - began
        seconds = []
        for _ in tqdm(range(steps + 2), desc="steps", unit="step"):
            began = time.perf_counter()
            state, metrics = step(state, base, batch)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - began)
    second = statistics.median(seconds[2:])
    work = flops.step_flops(shape, config, rows * context, (context + 1) / 2)
    peak = flops.peak_flops()
    memory = step.memory_analysis()
    result = {
        "model": model.stem,
        "mode": mode,
        "device": f"{math.prod(mesh)} x {jax.devices()[0].device_kind}",
        "context": context,
        "rows": rows,
        "compute": compute,
        "remat": remat,
        "jax": jax.__version__,
        "seconds_per_step": second,
        "tokens_per_second": rows * context / second,
        "model_tflops_per_second": work / second / 1e12,
        "mfu": peak and work / second / peak,
        "peak_flops": peak,
        "compile_seconds": compiling,
        "scratch_bytes": memory.temp_size_in_bytes if memory else None,
        "loss": float(metrics["loss"]),
    }
    print(json.dumps(result, indent=2))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ConfigError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
