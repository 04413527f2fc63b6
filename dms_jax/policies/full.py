"""The vanilla model: nothing is evicted."""

import functools

import jax.numpy as jnp

from dms_jax.policies.base import Policy, nothing_marked, present


@functools.cache
def full() -> Policy:
    """The policy of an ordinary KV cache. Its state is empty."""
    return Policy(
        name="full",
        window=0,
        budget=None,
        weights=None,
        init=lambda batch, heads, slots: (),
        mark=nothing_marked,
        retain=lambda state, span, alpha, weights: (present(span), ()),
        settle=lambda state, span, carry, slots: (),
        choose=lambda state, step, _: (jnp.full_like(step.live, -1), state),
        select=None,
        record=lambda state, step, new: state,
    )
