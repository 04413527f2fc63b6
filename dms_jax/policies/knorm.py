"""KNorm: keys of a large L2 norm go first (Devoto et al. 2024, arXiv 2406.11430).

The norm is taken after RoPE, which does not change it. No attention weights are needed. The authors leave the first
two layers uncompressed; here every layer has the same budget.
"""

import functools

import jax.numpy as jnp

from dms_jax.policies.base import Policy
from dms_jax.policies.scored import budgeted


@functools.cache
def knorm(budget: int) -> Policy:
    """Keeps the `budget` tokens with the smallest key norms."""

    def begin(k, pos, keys):
        return -jnp.linalg.norm(k.astype(jnp.float32), axis=-1).swapaxes(1, 2)

    return budgeted("knorm", budget, begin=begin)
