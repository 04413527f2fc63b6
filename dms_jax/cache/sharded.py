"""Paged storage over several devices: each holds some of the KV heads, in a pool of its own.

Nothing of another head is ever needed, so every function runs on each device by itself (`sharding.per_device`). The
devices have to agree on one thing only: which sequences have room for a step.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax import sharding
from dms_jax.cache.base import Storage, View
from dms_jax.cache.paged import PagedCache
from dms_jax.config import ModelConfig, require

VIEW = View("B K W D", "B K W D", "B K W")


def letters_of(quantized: bool) -> PagedCache:
    """What lies where; `top` is one number a device."""
    scale = "N p" if quantized else None
    return PagedCache("N p D", "N p D", "N p", scale, scale, "L B K P", "L B K", "N", "N")


def sharded_storage(store: Storage, parts: int, quantized: bool) -> Storage:
    """`store`, one of paged storage, over the `parts` devices of the mesh in force."""
    cache_letters = letters_of(quantized)

    def on_each(function, inputs, outputs, changes=False):
        """Runs `function(cache, *inputs)`; with `changes` its first result is the new cache."""

        def local(cache, *arguments):
            out = function(cache._replace(top=cache.top[0]), *arguments)
            if not changes:
                return out
            new, *rest = out if outputs else (out,)
            return (new._replace(top=new.top[None]), *rest)

        results = (cache_letters, *outputs) if changes else outputs
        run = sharding.per_device(local, (cache_letters, *inputs), results)
        if changes and not outputs:
            return lambda *arguments: run(*arguments)[0]
        return run

    def init(model: ModelConfig, batch: int, dtype, pages: int) -> PagedCache:
        K = model.num_kv_heads
        require(K % parts == 0, "tensor", parts, f"must divide the {K} KV heads")
        part = types.SimpleNamespace(num_layers=model.num_layers, num_kv_heads=K // parts, head_dim=model.head_dim)

        def local(_):
            cache = store.init(part, batch, dtype, pages)
            return cache._replace(top=cache.top[None])

        return sharding.per_device(local, ("",), cache_letters)(jnp.zeros(()))

    def admit(cache, active):
        def local(cache, active):
            return sharding.all_agree(store.admit(cache, active))

        return on_each(local, ("B",), "B")(cache, active)

    def place(cache, layer, position, victim, active):
        def local(cache, *arguments):
            return store.place(cache, layer, *arguments)

        return on_each(local, ("B", "L B K", "B"), ("L B K",), changes=True)(cache, position, victim, active)

    def attend(cache, layer, q, k, v, slots, readable, weights):
        def local(cache, *arguments):
            return store.attend(cache, layer, *arguments, weights)

        inputs = ("B H D", "B K D", "B K D", "L B K", None if readable is None else "B K P")
        outputs = ("B H D", "B K S" if weights else None)
        return on_each(local, inputs, outputs, changes=True)(cache, q, k, v, slots, readable)

    def view(cache, layer, width):
        return on_each(lambda cache: store.view(cache, layer, width), (), VIEW)(cache)

    def extend(cache, layer, k, v, position, stay, old=None):
        def local(cache, *arguments):
            return store.extend(cache, layer, *arguments)

        inputs = ("B T K D", "B T K D", "B T", "B K S", None if old is None else VIEW)
        return on_each(local, inputs, ("B K S",), changes=True)(cache, k, v, position, stay, old)

    def live(cache):
        return on_each(store.live, (), "L B K")(cache)

    def take(cache, rows):
        return on_each(store.take, ("B",), (), changes=True)(cache, rows)

    def put(cache, rows, part):
        def local(cache, rows, part):
            return store.put(cache, rows, part._replace(top=part.top[0]))

        return on_each(local, ("B", cache_letters), (), changes=True)(cache, rows, part)

    def fork(cache, source, target, moved, width):
        def local(cache, *arguments):
            return store.fork(cache, *arguments, width)

        return on_each(local, ("B", "B", "B"), (), changes=True)(cache, source, target, moved)

    def release(cache, rows):
        return on_each(store.release, ("B",), (), changes=True)(cache, rows)

    def grow(cache, pages):
        return jax.jit(on_each(lambda cache: store.grow(cache, pages), (), (), changes=True))(cache)

    def pages(tokens):
        return np.concatenate([store.pages(own) for own in np.split(tokens, parts, axis=-1)])

    def pool(cache):
        together = store.pool(cache)
        return together._replace(size=together.size // parts)

    return Storage(
        store.slots, init, admit, place, attend, view, extend, live, take, put, fork, release, pages, pool, grow, parts
    )
