"""RMSNorm, RoPE and the linear maps of a Llama-like block. Modules hold parameters, functions compute."""

import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from dms_jax.config import RopeConfig
from dms_jax.types import Positions

Init = nn.initializers.Initializer
normal: Init = nn.initializers.normal(0.02)


class RMSNorm(nn.Module):
    """`x / rms(x) * scale` over the last axis, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*axes n"]) -> Float[Array, "*axes n"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * (1.0 / jnp.sqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps))
        return scale.astype(x.dtype) * x32.astype(x.dtype)


class Linear(nn.Module):
    """A linear map from the last `len(inputs)` axes to `outputs` axes; kernel `[*inputs, *outputs]`.

    Where its parameters hold a low-rank update, a `[*inputs, r]` and b `[r, *outputs]`, it is added: `x W + (x a) b`.
    """

    outputs: tuple[int, ...]
    bias: bool = False
    contract: int = 1
    init: Init = normal

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        inputs = x.shape[-self.contract :]
        kernel = self.param("kernel", self.init, (*inputs, *self.outputs))
        # One flat matrix product: a dot over several axes is slower on CPU.
        flat = x.reshape(*x.shape[: x.ndim - self.contract], -1)
        out = flat @ kernel.reshape(flat.shape[-1], -1).astype(x.dtype)
        if self.has_variable("params", "lora"):
            lora = self.get_variable("params", "lora")
            rank = lora["b"].shape[0]
            low = flat @ lora["a"].reshape(-1, rank).astype(x.dtype)
            out += low @ lora["b"].reshape(rank, -1).astype(x.dtype)
        out = out.reshape(*flat.shape[:-1], *self.outputs)
        if self.bias:
            out += self.param("bias", nn.initializers.zeros, self.outputs).astype(x.dtype)
        return out


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    mlp_dim: int
    bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "*axes E"]) -> Float[Array, "*axes E"]:
        gate = Linear((self.mlp_dim,), self.bias, name="gate")(x)
        up = Linear((self.mlp_dim,), self.bias, name="up")(x)
        return Linear((x.shape[-1],), self.bias, name="down")(nn.silu(gate) * up)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies `[D / 2]` (radians a token) and the scale of cos and sin.

    linear: Chen et al. 2023; llama3: the Llama 3.1 release; yarn: Peng et al. 2023 (arXiv 2309.00071); longrope: Ding
    et al. 2024 (arXiv 2402.13753).
    """
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        return inverse / rope.factor, 1.0
    if rope.kind == "longrope":
        return inverse / np.asarray(rope.short_factor), 1.0
    if rope.kind == "llama3":
        return _llama3(inverse, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(inverse, rope, head_dim), _yarn_scale(rope)
    return inverse, 1.0


def _llama3(inverse: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * np.pi / inverse
    turns = rope.original_max_positions / wavelength
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * inverse / rope.factor + smooth * inverse


def _yarn(inverse: np.ndarray, rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Dims that turn more than beta_fast times in the original context are kept, fewer than beta_slow slowed."""

    def dim_of(turns: float) -> float:
        ratio = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2) - low) / (high - low if high != low else 0.001)
    slowed = np.clip(ramp, 0.0, 1.0)
    return slowed * inverse / rope.factor + (1 - slowed) * inverse


def yarn_mscale(rope: RopeConfig, mscale: float) -> float:
    """How much longer contexts sharpen attention, by one of yarn's factors."""
    return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0


def _yarn_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope, rope.mscale) / yarn_mscale(rope, rope.mscale_all_dim)
    return yarn_mscale(rope, 1.0)


def apply_rope(
    x: Float[Array, "B T H D"], positions: Positions, rope: RopeConfig, interleaved: bool = False
) -> Float[Array, "B T H D"]:
    """Rotates dim d with dim d + D / 2 (the layout of HF checkpoints); angles in float32.

    interleaved: dim 2d with dim 2d + 1, and these two go to d and d + D / 2: products of queries and keys are the same.
    """
    inverse, scale = rope_frequencies(rope, x.shape[-1])
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inverse, jnp.float32)
    cos = (jnp.cos(angles) * scale).astype(x.dtype)[:, :, None]
    sin = (jnp.sin(angles) * scale).astype(x.dtype)[:, :, None]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
