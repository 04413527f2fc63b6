"""A paged cache over several devices: each holds some of the KV heads, in a pool of its own.

Nothing of another head is ever needed, so every method runs on each device by itself (`sharding.per_device`). The
devices have to agree on one thing only: which sequences have room for a step.
"""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax import sharding
from dms_jax.cache.base import DecodeQuery, KVCache, Pool, View
from dms_jax.cache.paged import PagedArrays, PagedCache
from dms_jax.config import ModelConfig, require

VIEW = View("B K W D", "B K W D", "B K W")  # what lies where, in the letters of types.py


@dataclass(frozen=True)
class ShardedPagedCache(KVCache):
    """A `PagedCache` over the `ways` devices of the mesh in force; its `top` is one number a device."""

    ways: int = 1

    @property
    def local(self) -> PagedCache:
        """What each device runs on its part."""
        return PagedCache(self.config)

    @property
    def parts(self) -> int:
        return self.ways

    @property
    def slots(self) -> int:
        return self.local.slots

    @property
    def letters(self) -> PagedArrays:
        quantized = self.config.quant != "none"
        scale, offset = ("N p", "L K D") if quantized else (None, None)
        return PagedArrays("N p D", "N p D", "N p", scale, scale, offset, "L B K P", "L B K", "N", "N")

    def allocate(self, model: ModelConfig, batch: int, dtype, pages: int = 0) -> PagedArrays:
        K = model.num_kv_heads
        require(K % self.ways == 0, "tensor", self.ways, f"must divide the {K} KV heads")

        part = dataclasses.replace(model, num_heads=model.num_heads // self.ways, num_kv_heads=K // self.ways)

        def empty(_):
            cache = self.local.allocate(part, batch, dtype, pages)
            return cache._replace(top=cache.top[None])

        return sharding.per_device(empty, ("",), self.letters)(jnp.zeros(()))

    def center(self, cache, offset):
        return self.local.center(cache, offset)

    def can_append(self, cache, active):
        def local(cache, active):
            return sharding.all_agree(self.local.can_append(cache, active))

        return self._compute(local, ("B",), "B")(cache, active)

    def append(self, cache, layer, position, victim, active):
        def local(cache, position, victim, active):
            return self.local.append(cache, layer, position, victim, active)

        return self._change(local, ("B", "L B K", "B"), ("L B K",))(cache, position, victim, active)

    def attend(self, cache, layer, query, weights):
        letters = DecodeQuery("B H D", "B K D", "B K D", "L B K", None if query.readable is None else "B K P")

        def local(cache, query):
            return self.local.attend(cache, layer, query, weights)

        return self._change(local, (letters,), ("B H D", "B K S" if weights else None))(cache, query)

    def view(self, cache, layer, width):
        return self._compute(lambda cache: self.local.view(cache, layer, width), (), VIEW)(cache)

    def write_prefill(self, cache, layer, k, v, position, keep, old=None):
        def local(cache, k, v, position, keep, old):
            return self.local.write_prefill(cache, layer, k, v, position, keep, old)

        letters = ("B T K D", "B T K D", "B T", "B K S", None if old is None else VIEW)
        return self._change(local, letters, ("B K S",))(cache, k, v, position, keep, old)

    def live(self, cache):
        return self._compute(self.local.live, (), "L B K")(cache)

    def take_rows(self, cache, rows):
        return self._change(self.local.take_rows, ("B",))(cache, rows)

    def put_rows(self, cache, rows, part):
        def local(cache, rows, part):
            return self.local.put_rows(cache, rows, part._replace(top=part.top[0]))

        return self._change(local, ("B", self.letters))(cache, rows, part)

    def fork(self, cache, source, target, moved, width):
        def local(cache, source, target, moved):
            return self.local.fork(cache, source, target, moved, width)

        return self._change(local, ("B", "B", "B"))(cache, source, target, moved)

    def free(self, cache, rows):
        return self._change(self.local.free, ("B",))(cache, rows)

    def grow(self, cache, pages):
        return jax.jit(self._change(functools.partial(self.local.grow, pages=pages), ()))(cache)

    def pages_needed(self, tokens):
        return np.concatenate([self.local.pages_needed(own) for own in np.split(tokens, self.ways, axis=-1)])

    def pool_size(self, cache) -> int:
        return len(cache.free) // self.ways

    def pool(self, cache) -> Pool:
        together = self.local.pool(cache)
        return together._replace(size=together.size // self.ways)

    def _compute(self, function, inputs, outputs):
        """`function(cache, *inputs)` on each device's part; letters say how inputs and outputs are split."""

        def run(cache, *arguments):
            return function(cache._replace(top=cache.top[0]), *arguments)

        return sharding.per_device(run, (self.letters, *inputs), outputs)

    def _change(self, function, inputs, outputs=()):
        """The same for a function whose first result is the new cache (and its only one, without outputs)."""

        def run(cache, *arguments):
            out = function(cache._replace(top=cache.top[0]), *arguments)
            cache, *others = out if outputs else (out,)
            cache = cache._replace(top=cache.top[None])
            return (cache, *others) if outputs else cache

        return sharding.per_device(run, (self.letters, *inputs), (self.letters, *outputs) if outputs else self.letters)
