"""A new gate in one file: eviction logits from the residual stream as it is, by a linear map with a bias.

usage: python examples/new_gate.py
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

import dms_jax
from dms_jax import dms
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.models import gates, layers, transformer
from dms_jax.models.gates import Gate, GateTensor


class Linear(nn.Module):
    """`W x + b` for each KV head, zero at the start; `[B, T, K]`."""

    num_kv_heads: int

    @nn.compact
    def __call__(self, x):
        return layers.Linear((self.num_kv_heads,), bias=True, init=nn.initializers.zeros, name="proj")(x)


@dataclass(frozen=True)
class LinearGate(Gate):
    """The gate of the authors' release without its norm, and with a bias for each head."""

    tensors: ClassVar[tuple[GateTensor, ...]] = (  # how they are laid out, and named in a file
        GateTensor("gate/proj/kernel", "self_attn.linear_gate.weight", "E | K"),
        GateTensor("gate/proj/bias", "self_attn.linear_gate.bias", "| K"),
    )

    def logits(self, q, residual, model: ModelConfig):
        return dms.affine(Linear(model.num_kv_heads, name="gate")(residual), self.dms)

    def with_gate(self, params, model: ModelConfig):
        params = jax.tree.map(lambda x: x, params)  # a new tree: the original model's is the teacher's
        for n in range(model.num_layers):
            zeros = {"kernel": jnp.zeros((model.model_dim, model.num_kv_heads)), "bias": jnp.zeros(model.num_kv_heads)}
            params[f"layers_{n}"]["attn"]["gate"] = {"proj": zeros}
        return params


gates.add("linear", LinearGate)


def main() -> tuple[float, float]:
    config = DMSConfig(gate="linear", window=4)
    model = ModelConfig("llama", 64, 2, 32, 4, 2, 8, 64)
    params = LinearGate(config).with_gate(transformer.init(jax.random.key(0), model), model)
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, model.vocab_size)

    def effect(params) -> float:
        """How far the logits with eviction are from those without."""
        lm = dms_jax.LM(model, params, None, config)
        return float(jnp.abs(lm.logits(tokens, dms=config) - lm.logits(tokens)).max())

    fresh = effect(params)
    for n in range(model.num_layers):  # stands for training
        gate = params[f"layers_{n}"]["attn"]["gate"]["proj"]
        gate["kernel"] = jax.random.normal(jax.random.key(n), gate["kernel"].shape)
    trained = effect(params)
    print(f"eviction changes the logits by up to {fresh:.3f} at the start, {trained:.3f} with other weights")
    return fresh, trained


if __name__ == "__main__":
    main()
