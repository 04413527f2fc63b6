"""What a retrofit needs before it is paid for: memory, FLOPs, collectives and time of the real step, on devices that
are not there.

The step of the config is lowered and compiled for the mesh, on virtual CPU devices in a process of its own, with
shapes in place of arrays: nothing of the model's size is allocated. Since the layers are unrolled, two shallow models
are compiled, and what grows with depth is extrapolated linearly, which the output says.

What is exact: parameters, and the bytes of weights, moments, teacher and batch on a device, from their shardings.
What is counted: the scratch memory of the step, item by item, see `scratch`. XLA's own figure is given beside it: it
is that of a CPU, whose compiler emulates bfloat16 with float32 copies (so the step is compiled in float32), schedules
for speed and gathers early, and it is far above what a GPU needs. Bytes of collectives are XLA's for the float32 step,
half of them counted where the step moves bfloat16; gradients are all-reduced there where a GPU reduce-scatters them.
The time is a roofline: see `estimate`.

examples:
  python -m scripts.plan --config configs/qwen3_8b.yaml
  python -m scripts.plan --config configs/qwen3_8b.yaml --mesh 1 4 2 --device H200
"""

import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import re
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax import sharding
from dms_jax.config import ModelConfig, require
from dms_jax.config_files import load_yaml
from dms_jax.training import flops
from dms_jax.training.config import RetrofitConfig
from dms_jax.training.data import Packed
from dms_jax.training.step import abstract_state, compiled_step, layout
from scripts import command

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
HOST = 8  # devices joined by NVLink
QUERIES = 128  # in a block of `kernels.attention.blockwise`


def shape_bytes(text: str) -> int:
    """Bytes of an HLO shape, or of a tuple of them: `(f32[2,3]{1,0}, bf16[4])`."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", text)
    return sum(BYTES.get(kind, 4) * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in found)


def group_size(line: str, devices: int) -> int:
    """How many devices take part in a collective."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    return devices


def sent(kind: str, size: int, group: int) -> float:
    """Bytes that a device sends for a collective with a result of `size` bytes, by the ring algorithm."""
    share = (group - 1) / group
    factor = {"all-gather": share, "all-reduce": 2 * share, "reduce-scatter": group - 1, "all-to-all": share}
    return size * factor.get(kind, 1.0)


def collectives(hlo: str, devices: int) -> dict[str, float]:
    """Bytes a device sends in a run of a compiled module, by kind; bodies of loops count as often as they run."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            name = found[2]
            bodies[name] = []
            entry = name if found[1] else entry
        elif name:
            bodies[name].append(line)

    def total(name: str) -> dict[str, float]:
        out = dict.fromkeys(COLLECTIVES, 0.0)
        for line in bodies.get(name, ()):
            if found := re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line):
                out[found[2]] += sent(found[2], shape_bytes(found[1]), group_size(line, devices))
            times = 1
            if found := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
                times = int(found[1])
            for inner in re.findall(r"(?:body|calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line):
                for kind, size in cached(inner).items():
                    out[kind] += times * size
        return out

    seen: dict[str, dict[str, float]] = {}

    def cached(name: str) -> dict[str, float]:
        if name not in seen:
            seen[name] = total(name)
        return seen[name]

    return cached(entry)


def device_bytes(tree, shardings) -> int:
    """Bytes of a tree on one device."""

    def one(x, place) -> int:
        return math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(one, tree, shardings)))


def abstract(model: ModelConfig, config: RetrofitConfig, mesh):
    """State, base and batch as shapes with shardings, and the layout."""
    state, base = abstract_state(model, config)
    rows = jax.ShapeDtypeStruct((config.batch_size, config.context), jnp.int32)
    places = layout(model, config, mesh)

    def placed(x, place):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(placed, (state, base, Packed(rows, rows, rows)), tuple(places)), places


def measure(model: ModelConfig, config: RetrofitConfig, layers: int | None) -> dict[str, float]:
    """Of the step of a model with so many layers (None: its own, not compiled), bytes on a device by kind."""
    if layers is not None:
        model = dataclasses.replace(model, num_layers=layers)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        (state, base, batch), places = abstract(model, config, mesh)
        out = {
            "trained": device_bytes(state.params, places.state.params),
            "moments": device_bytes(state.opt_state, places.state.opt_state),
            "base": device_bytes(base, places.base),
            "batch": device_bytes(batch, places.batch),
        }
        if layers is None:
            return out | {"trained_parameters": sum(x.size for x in jax.tree.leaves(state.params))}
        wide = dataclasses.replace(config, compute="float32")
        base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), base)
        compiled = compiled_step(model, wide, False, mesh).lower(state, base, batch).compile()
    out["xla_cpu"] = compiled.memory_analysis().temp_size_in_bytes
    moved = collectives(compiled.as_text(), math.prod(config.mesh))
    if config.compute == "bfloat16":  # weights and activations are gathered in it, gradients summed in float32
        moved = {kind: size if kind in ("all-reduce", "reduce-scatter") else size / 2 for kind, size in moved.items()}
    return out | moved


def _prepare(devices: int) -> None:
    flags = (
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",  # nothing is run
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",  # it trades memory for threads
        "--xla_disable_hlo_passes=cse",  # it would undo the recomputation in the backward pass
    )
    os.environ["XLA_FLAGS"] = " ".join(flags)
    jax.config.update("jax_platforms", "cpu")


def measured(model: ModelConfig, config: RetrofitConfig, depths: tuple[int, int]) -> dict[str, float]:
    """`measure` of the whole model: what is exact exactly, the rest by a line through two depths."""
    spawn = multiprocessing.get_context("spawn")
    arguments = {"mp_context": spawn, "initializer": _prepare, "initargs": (math.prod(config.mesh),)}
    with concurrent.futures.ProcessPoolExecutor(1, **arguments) as pool:
        exact, low, high = (pool.submit(measure, model, config, n).result() for n in (None, *depths))
    slope = {key: (high[key] - low[key]) / (depths[1] - depths[0]) for key in low}
    line = {key: max(0.0, low[key] + slope[key] * (model.num_layers - depths[0])) for key in low}
    return line | exact


def scratch(model: ModelConfig, config: RetrofitConfig, found: dict[str, float]) -> dict[str, float]:
    """Bytes on a device that live during a step only, at the moment when they are most: a block's backward pass.

    gradients: float32, split as what is trained, twice where micro-batches are summed.
    copy: of what is trained, in the dtype of the computation.
    kept: what the forward pass leaves for the backward pass. Per token and block: its input, where blocks are
      recomputed; with it the outputs of all products with weights ("dots"); or about twice those.
    block: a block's gathered weights, their gradient, and its activations, counted as float32; of latent attention,
      for which there is no kernel, also four arrays of a block of queries' scores.
    loss: both unembeddings in float32, where rows are split over devices, with the gradient of the student's in full
      mode; four arrays of a piece's logits; hidden states and their gradient.
    """
    c, (data_axis, fsdp, tensor) = model, config.mesh
    size = jnp.dtype(config.compute).itemsize
    rows = config.batch_size // config.accumulate // (data_axis * fsdp)
    tokens = rows * config.context
    heads, mlp = attention_numbers(c) / tensor, c.mlp_dim / tensor
    dots = c.model_dim * 3 + heads + 2 * mlp
    kept = {"none": c.model_dim + 2 * dots, "dots": c.model_dim + dots, "block": c.model_dim}[config.remat]
    weights = (flops.weight_products(c) - c.model_dim * c.vocab_size) / c.num_layers / tensor
    kernel = c.model_dim * c.vocab_size / tensor
    scores = 4 * rows * c.num_heads / tensor * QUERIES * config.context * 4 if c.latent else 0
    full, split = config.mode == "full", data_axis * fsdp > 1
    return {
        "gradients": found["trained"] * (2 if config.accumulate > 1 else 1),
        "copy": found["trained"] * size / 4 if size < 4 else 0,
        "kept": c.num_layers * tokens * kept * size,
        "block": weights * (2 * size + 4 * full) + tokens * (6 * c.model_dim + 3 * heads + 5 * mlp) * 4 + scores,
        "loss": kernel * (4 if split else size) * 2
        + kernel * 4 * full
        + 4 * rows * config.loss_chunk * c.vocab_size / tensor * 4
        + 3 * tokens * c.model_dim * size,
    }


def attention_numbers(model: ModelConfig) -> int:
    """What the products of attention with weights make of a token: queries, keys and values, or by way of vectors."""
    c, latent = model, model.latent
    if latent is None:
        return c.head_dim * (c.num_heads + 2 * c.num_kv_heads)
    expanded = c.num_heads * (latent.nope_dim + latent.rope_dim)
    return (latent.query_rank or 0) + expanded + c.head_dim + c.num_heads * (c.head_dim + c.value_dim)


def estimate(
    model: ModelConfig, config: RetrofitConfig, found: dict[str, float], device: flops.Device, efficiency: float
) -> dict[str, float]:
    """Seconds of a step by a roofline.

    compute: FLOPs with recomputation over the devices' peak; at `efficiency` of it, what kernels commonly reach.
    memory: what was given and the scratch, read once a micro-batch, over the bandwidth.
    collectives: bytes sent over NVLink within 8 devices, and over the network beyond.
    step: the longest of these three, as if they overlapped; serial: their sum.
    """
    devices = math.prod(config.mesh)
    tokens = config.batch_size * config.context
    executed = flops.executed_flops(model, config, tokens, config.context / 2)
    link = device.nvlink if devices <= HOST else device.network
    out = {
        "compute": executed / (devices * device.flops * efficiency),
        "memory": config.accumulate * (found["base"] + found["trained"] / 2 + found["scratch"]) / device.bandwidth,
        "collectives": sum(found[kind] for kind in COLLECTIVES) / link,
    }
    return out | {"step": max(out.values()), "serial": sum(out.values()), "floor": out["compute"] * efficiency}


def main(
    config: Path,
    model: Path | None = None,
    mesh: tuple[int, int, int] | None = None,
    accumulate: int | None = None,
    device: Literal["H100", "H200"] = "H100",
    efficiency: float = 0.4,
    depths: tuple[int, int] = (2, 4),
    out: Path | None = None,
) -> dict:
    """Prints the plan of a retrofit, and writes it as JSON.

    Args:
      config: YAML file with the fields of RetrofitConfig.
      model: YAML file with the fields of ModelConfig; default: configs/models/ and the name of the config file.
      mesh: devices along data, fsdp and tensor, in place of the config's.
      accumulate: micro-batches a step, in place of the config's.
      device: what it is to run on.
      efficiency: the share of the peak FLOP/s that is reached.
      depths: how many layers the two models have that are compiled.
      out: JSON file to write.
    """
    require(0 < efficiency <= 1, "efficiency", efficiency, "must lie in (0, 1]")
    require(0 < depths[0] < depths[1], "depths", depths, "expected two numbers of layers, the smaller one first")
    settings = load_yaml(RetrofitConfig, config)
    changes = {"mesh": mesh, "accumulate": accumulate}
    settings = dataclasses.replace(settings, **{k: value for k, value in changes.items() if value is not None})
    model = model or Path("configs/models") / config.name
    require(model.is_file(), "model", str(model), "no such file")
    plan = {"config": config.name, **planned(load_yaml(ModelConfig, model), settings, depths, device, efficiency)}
    _show(plan)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(plan, indent=2) + "\n")
    return plan


def planned(
    shape: ModelConfig, settings: RetrofitConfig, depths: tuple[int, int], device: str, efficiency: float
) -> dict:
    """Memory, FLOP, collectives and time of a step; the arguments are those of `main`."""
    found = measured(shape, settings, depths)
    items = scratch(shape, settings, found)
    found["scratch"] = sum(items.values())
    kinds = ("trained", "moments", "base", "batch", "scratch")
    memory = {kind: found[kind] for kind in kinds}
    tokens = settings.batch_size * settings.context
    gpu = flops.DEVICES[device]
    return {
        "mesh": settings.mesh,
        "mode": settings.mode,
        "batch_size": settings.batch_size,
        "context": settings.context,
        "accumulate": settings.accumulate,
        "remat": settings.remat,
        "parameters": flops.num_params(shape),
        "trained_parameters": found["trained_parameters"],
        "memory_bytes_per_device": memory | {"all": sum(memory.values())},
        "scratch_bytes_per_device": items,
        "xla_cpu_scratch_bytes_per_device": found["xla_cpu"],
        "device": device,
        "fits": sum(memory.values()) < gpu.memory,
        "model_flops_per_step": flops.step_flops(shape, settings, tokens, settings.context / 2),
        "executed_flops_per_step": flops.executed_flops(shape, settings, tokens, settings.context / 2),
        "collective_bytes_per_device": {kind: found[kind] for kind in COLLECTIVES},
        "seconds": estimate(shape, settings, found, gpu, efficiency),
        "efficiency": efficiency,
        "method": "xla_cpu_scratch and collectives: a line through compiled models of "
        f"{depths[0]} and {depths[1]} layers, evaluated at {shape.num_layers}; XLA for CPU, jax {jax.__version__}",
    }


def _show(plan: dict) -> None:
    giga = {key: np.round(value / 1e9, 2) for key, value in plan["memory_bytes_per_device"].items()}
    moved = {key: np.round(value / 1e9, 2) for key, value in plan["collective_bytes_per_device"].items() if value}
    seconds = {key: float(f"{value:.3g}") for key, value in plan["seconds"].items()}
    rows = {
        "parameters": f"{plan['parameters']:,}, trained {plan['trained_parameters']:,} (mode {plan['mode']})",
        "mesh": "data {} x fsdp {} x tensor {}".format(*plan["mesh"]),
        "batch": f"{plan['batch_size']} x {plan['context']} tokens in {plan['accumulate']} micro-batches",
        "memory, GB a device": ", ".join(f"{key} {value:g}" for key, value in giga.items()),
        f"fits {plan['device']}": "yes" if plan["fits"] else "NO",
        "FLOPs a step": f"model {plan['model_flops_per_step']:.3g}, executed {plan['executed_flops_per_step']:.3g}",
        "collectives, GB a device": ", ".join(f"{key} {value:g}" for key, value in moved.items()) or "none",
        "seconds": ", ".join(f"{key} {value:g}" for key, value in seconds.items()),
        "by": plan["method"],
    }
    for key, value in rows.items():
        print(f"{key:26} {value}")


if __name__ == "__main__":
    command.run(main)
