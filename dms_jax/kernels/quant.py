"""Keys and values in fewer bits: a scale for each token and head, symmetric around 0.

A latent entry has two: one for the latent vector, which is the value too, and one for the key that RoPE turned.

Eviction and quantization compose: what the paper leaves open (section 7) is a choice of CacheConfig here.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

LARGEST = {"int8": 127.0, "fp8": 448.0}  # of int8, and of float8_e4m3fn
STORED = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def encode(x: Float[Array, "... D"], quant: str) -> tuple[Num[Array, "... D"], Float[Array, "..."]]:
    """What is stored of `x`, and its float32 scales: `x ~ stored * scale`."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / LARGEST[quant]
    scaled = x / jnp.where(scale == 0, 1.0, scale)[..., None]
    if quant == "int8":
        scaled = jnp.round(scaled)
    return scaled.astype(STORED[quant]), scale


def decode(stored: Num[Array, "... D"], scale: Float[Array, "..."] | None, dtype) -> Float[Array, "... D"]:
    """The values meant by `stored`; without a scale they are stored as they are. A scale may be one for each number."""
    if scale is None:
        return stored.astype(dtype)
    scale = scale if scale.ndim == stored.ndim else scale[..., None]
    return (stored.astype(jnp.float32) * scale).astype(dtype)


def joined(v_scale: Float[Array, "..."], k_scale: Float[Array, "..."], U: int, D: int) -> Float[Array, "... D"]:
    """The scale of each number of a latent entry, of which the first U are the value."""
    return jnp.where(jnp.arange(D) < U, v_scale[..., None], k_scale[..., None])
