"""StreamingLLM: attention sinks and a window (Xiao et al. 2023, arXiv 2309.17453).

Keeps the first tokens of a sequence and the most recent ones. Deviation: keys keep the RoPE of their own positions,
where the authors renumber positions inside the cache, which only matters beyond the trained context.
"""

import functools

import jax.numpy as jnp

from dms_jax.policies.base import Policy
from dms_jax.policies.scored import budgeted

SINKS = 4  # the paper's


@functools.cache
def streaming(budget: int) -> Policy:
    """`SINKS` first tokens and the `budget - SINKS` newest."""
    return budgeted(
        "streaming",
        budget,
        begin=lambda k, pos, keys: pos.astype(jnp.float32),  # the oldest goes first
        safe=lambda pos, last: (pos >= 0) & (pos < SINKS),
        safe_tokens=SINKS,
    )
