"""TOVA: the token that the newest query attends to least goes (Oren et al. 2024, arXiv 2401.06104).

As in the authors' code the weights are averaged over all heads of a layer, so its heads keep the same tokens. The
weights of one step decide who leaves at the next, so that a head never holds more than its budget while it is read;
the authors read budget + 1 tokens and evict afterwards, which is the same with a budget larger by one.
"""

import functools

import jax.numpy as jnp

from dms_jax.policies.base import Policy
from dms_jax.policies.scored import budgeted


@functools.cache
def tova(budget: int) -> Policy:
    """Keeps the `budget` tokens with the largest weights of the last query."""
    return budgeted(
        "tova",
        budget,
        # All heads of a layer hold the same tokens in the same slots, so their weights can be averaged slot by slot.
        update=lambda score, weights: jnp.broadcast_to(weights.mean(axis=1, keepdims=True), weights.shape),
        weights="last",
    )
