"""Analytic counts of floating-point operations, and what the devices can do.

A product of a row with a matrix costs 2 operations an entry. Counted are the products with weights and those of
attention; norms, softmax and RoPE are left out, as is usual for model FLOPs utilisation. What is computed twice is not
counted as the model's work (`step_flops`), but is as the device's (`executed_flops`).
"""

import math
from typing import NamedTuple

import jax

from dms_jax.config import ModelConfig
from dms_jax.training.config import RetrofitConfig
from dms_jax.weights.table import specs


class Device(NamedTuple):
    """The rates of one accelerator: dense bf16 FLOP/s (datasheet), memory in bytes, its bandwidth in bytes/s, and the
    bandwidth of its links in bytes/s each way: inside a host of 8 (NVLink), and between hosts (InfiniBand)."""

    flops: float
    memory: float
    bandwidth: float
    nvlink: float
    network: float


DEVICES = {
    "H100": Device(989e12, 80e9, 3.35e12, 450e9, 50e9),
    "H200": Device(989e12, 141e9, 4.8e12, 450e9, 50e9),
}


def device_of(kind: str) -> Device | None:
    """The Device in a name such as "NVIDIA H100 80GB HBM3"; None for one that is not in the table."""
    return next((device for name, device in DEVICES.items() if name in kind), None)


def peak_flops(devices: int) -> float | None:
    """bf16 FLOP/s of so many of the devices here together, None if they are not in the table."""
    device = device_of(jax.devices()[0].device_kind)
    return device and device.flops * devices


def weight_products(model: ModelConfig) -> int:
    """Weights that a token is multiplied by: all but the embedding table, which is only looked up."""
    weights = sum(math.prod(spec.shape) for spec in specs(model, None) if spec.linear and spec.inputs)
    return weights + (model.vocab_size * model.model_dim if model.tie_embeddings else 0)


def num_params(model: ModelConfig) -> int:
    """Weights of the original model, norms and biases included."""
    return sum(math.prod(spec.shape) for spec in specs(model, None))


def forward_flops(model: ModelConfig, keys: float) -> tuple[float, float, float]:
    """A token's forward pass: products with the layers' weights, with the unembedding, and in attention.

    keys: how many keys a token attends to, on average; half the context for one document a row.
    """
    c, head = model, 2.0 * model.model_dim * model.vocab_size
    layers = 2.0 * weight_products(c) - head
    return layers, head, 2.0 * c.num_layers * c.num_heads * (c.head_dim + c.value_dim) * keys


def step_flops(model: ModelConfig, config: RetrofitConfig, tokens: float, keys: float) -> float:
    """Model FLOPs of a step: the teacher forward, the student forward and backward.

    The backward pass costs a forward for the activations and, in full mode, another for the weights; in attention,
    which has no weights, always two.
    """
    layers, head, attention = forward_flops(model, keys)
    backward = 2.0 if config.mode == "full" else 1.0
    return tokens * ((layers + head) * (2.0 + backward) + attention * 4.0)


def executed_flops(model: ModelConfig, config: RetrofitConfig, tokens: float, keys: float) -> float:
    """`step_flops` and what is computed twice.

    In the backward pass that is the whole block, or its attention alone; of several micro-batches the student's
    layers run once more before them, to count what the batch evicts.
    """
    layers, _, attention = forward_flops(model, keys)
    again = {"none": 0.0, "dots": attention, "block": layers + attention}[config.remat]
    count = layers + attention if config.accumulate > 1 else 0.0
    return step_flops(model, config, tokens, keys) + tokens * (again + count)
