"""Evicting several tokens of a head at once, between decode steps; and a policy's state, layer by layer.

What stays is moved together as at the end of a prompt, by a `write_prefill` without tokens: live slots are again
`[0, length)`, and pages that become empty go back to the pool.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dms_jax.cache import KVCache
from dms_jax.policies import DecodeStep, Policy, Stored
from dms_jax.types import Layer

LAYER_AXES = DecodeStep(layer=0, position=None, active=None, live=0, keys=None)  # that of a policy's state is 1


def step_of(step: DecodeStep, layers: Layer | slice) -> DecodeStep:
    """The step of all layers in one of them, or in several."""
    return step._replace(layer=step.layer[layers], live=step.live[layers])


def layers_of(policy_state, layers: Layer | slice):
    """The policy's state of one layer, or of several."""
    return jax.tree.map(lambda x: x[:, layers], policy_state)


def joined(states, together=jnp.stack):
    """The policy's states of all layers as one: each of one layer, or with jnp.concatenate of several."""
    return jax.tree.map(lambda *xs: together(xs, axis=1), *states)


def over_layers(kv_cache: KVCache, function, cache: Any, layers: int) -> tuple[Any, Any]:
    """`function(cache, layer)`, a cache and the policy's state of this layer, for one layer after another."""
    cache, states = kv_cache.over_layers(function, cache, layers)
    return cache, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), states)


def prune(
    policy: Policy, kv_cache: KVCache, cache: Any, states: Any, step: DecodeStep, latent: bool = False
) -> tuple[Any, Any, Int[Array, "B L K"]]:
    """The cache and the policy's states with every head pruned that is due, and the KV tokens read for it.

    Args:
      states: of all layers. step: of all layers, before the new token is stored.
      latent: keys hold the values, so that an eviction that reads the keys reads all there is.
    """
    due = jax.vmap(policy.due, (1, LAYER_AXES))(states, step)
    run = functools.partial(_prune, policy, kv_cache, step, due)
    cache, states = jax.lax.cond(due.any(), run, lambda *same: same, cache, states)
    share = min(1.0, 2 * policy.rereads) if latent else policy.rereads
    reread = jnp.where(due, jnp.ceil(share * step.live), 0).astype(jnp.int32)
    return cache, states, jnp.moveaxis(reread, 0, 1)


def _prune(policy: Policy, kv_cache: KVCache, step: DecodeStep, due: Bool[Array, "L B K"], cache, states):
    def one(cache, layer):
        old = kv_cache.view(cache, layer, kv_cache.slots)
        keep, own = policy.prune(layers_of(states, layer), step_of(step, layer), Stored(old.k, old.v))
        keep = (keep | ~due[layer][..., None]) & (old.pos >= 0)
        k, v = (x[:, :, :0].swapaxes(1, 2) for x in (old.k, old.v))  # no token is new
        cache, slots = kv_cache.write_prefill(cache, layer, k, v, old.pos[:, 0, :0], keep, old)
        return cache, policy.move(own, slots)

    return over_layers(kv_cache, one, cache, len(due))
