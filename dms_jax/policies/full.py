"""Level 2. The vanilla model: nothing is evicted."""

import functools

import jax.numpy as jnp

from dms_jax.policies.base import Policy


@functools.cache
def full() -> Policy:
    """The policy of an ordinary KV cache. Its state is empty."""
    return Policy(
        name="full",
        window=0,
        mark=lambda k, logit, lengths: jnp.zeros((k.shape[0], k.shape[2], k.shape[1]), bool),
        settle=lambda alpha, slots, lengths: (),
        choose=lambda state, position, k, logit: (jnp.full((k.shape[0], k.shape[2]), -1, jnp.int32), state),
        record=lambda state, position, slot, logit: state,
    )
