"""Attention over given keys as pure functions: a dense oracle and a blockwise form with O(T) memory.

Both take the mask that `dms.bias` defines, so one rule decides visibility on every path.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dms_jax import dms
from dms_jax.config import require
from dms_jax.types import MASK_VALUE, Attended, LogKeepProb, Positions, Queries, ScoreBias, Segments, Slots, Window

OrderedKeys = Float[Array, "B S K D"]  # in the order of the tokens
OrderedValues = Float[Array, "B S K U"]


class EvictionMask(NamedTuple):
    """The delayed-eviction mask of T queries over S keys, in O(T + S): what `dms.bias` spreads out.

    Attributes:
      query_pos: `[B, T]`.
      key_pos: `[B, S]`, or `[B, K, S]` where heads hold different tokens, in any order; -1 for an empty slot.
      log_keep_prob: float32, log(1 - p) of each key, added where i - j > window; 0 keeps, MASK_VALUE evicts.
      window: w, of which the Triton kernel is compiled for one value; the reference takes a traced one, too.
      query_segments, key_segments: which of the documents packed into a row a token is of, in the shapes of the
        positions; no attention across different ones. Both, or neither where a row is one.
    """

    query_pos: Positions
    key_pos: Int[Array, "B *K S"]
    log_keep_prob: LogKeepProb
    window: Window
    query_segments: Segments | None = None
    key_segments: Int[Array, "B *K S"] | None = None

    def per_head(self) -> "EvictionMask":
        """With key_pos and key_segments `[B, K, S]`."""
        shape = self.log_keep_prob.shape
        keys = (self.key_pos, self.key_segments)
        key_pos, segments = (x if x is None or x.ndim == 3 else jnp.broadcast_to(x[:, None], shape) for x in keys)
        return self._replace(key_pos=key_pos, key_segments=segments)

    def one_segment(self) -> "EvictionMask":
        """With segments, of which there is one."""
        return self._replace(query_segments=jnp.zeros_like(self.query_pos), key_segments=jnp.zeros_like(self.key_pos))

    def check(self, B: int, T: int, K: int, S: int) -> None:
        """ConfigError for shapes that do not fit T queries, S keys and K KV heads, and for a negative window."""
        traced = isinstance(self.window, Array)  # without a value to check
        require(traced or self.window >= 0, "window", self.window, "must not be negative")
        given = (self.query_segments is not None, self.key_segments is not None)
        require(given[0] == given[1], "query_segments, key_segments", given, "give both or neither")
        queries, keys = [(B, T)], [(B, K, S), (B, S)]
        wanted = {"query_pos": queries, "key_pos": keys, "log_keep_prob": keys[:1]}
        wanted |= {"query_segments": queries, "key_segments": keys} if given[0] else {}
        for name, shapes in wanted.items():
            shape = getattr(self, name).shape
            require(shape in shapes, name, shape, f"expected {' or '.join(map(str, shapes))}")


def attend(q: Queries, k: OrderedKeys, v: OrderedValues, bias: ScoreBias) -> Attended:
    """Softmax attention with an additive bias; `[B, T, H, U]`. Scores and softmax are float32.

    Grouped-query: the G query heads of a KV head are folded into one axis, keys are never repeated.
    """
    B, T, H, D = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, H // K, D)
    scores = jnp.einsum("BTKGD,BSKD->BKGTS", q, k, preferred_element_type=jnp.float32) * D**-0.5
    weights = jax.nn.softmax(scores + bias[:, :, None], axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKU->BTKGU", weights, v).reshape(B, T, H, v.shape[-1])


def dense(q: Queries, k: OrderedKeys, v: OrderedValues, mask: EvictionMask) -> Attended:
    """The readable oracle: the whole `[B, K, T, S]` bias at once. With segments a query that sees no key gives 0."""
    bias = dms.bias(*mask.per_head())
    out = attend(q, k, v, bias)
    if mask.query_segments is None:
        return out
    # With segments a row may hold padding that sees nothing at all, where a softmax would read everything alike.
    seen = jnp.any(bias > MASK_VALUE / 2, axis=-1).swapaxes(1, 2)  # [B, T, K]
    return jnp.where(jnp.repeat(seen, q.shape[2] // k.shape[2], axis=2)[..., None], out, 0)


def blockwise(q: Queries, k: OrderedKeys, v: OrderedValues, mask: EvictionMask, block: int = 128) -> Attended:
    """`dense` in O(T) memory, forward and backward: one block of queries at a time, recomputed for the gradient.

    Only `[B, H, block, S]` scores are alive at once; `jax.checkpoint` keeps them from being saved.
    """
    B, T, H, D = q.shape
    if T <= block:
        return dense(q, k, v, mask)
    pad = -T % block
    blocks = (T + pad) // block
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(B, blocks, block, H, D)

    def split(x):
        # A padded query repeats a real one: it must see some key, and its row is cut off below.
        return jnp.pad(x, ((0, 0), (0, pad)), mode="edge").reshape(B, blocks, block).swapaxes(0, 1)

    @jax.checkpoint
    def one(q_block, pos, segments):
        return dense(q_block, k, v, mask._replace(query_pos=pos, query_segments=segments))

    blocked = jax.tree.map(split, (mask.query_pos, mask.query_segments))
    out = jax.lax.map(lambda x: one(*x), (q.swapaxes(0, 1), *blocked))
    return out.swapaxes(0, 1).reshape(B, T + pad, H, v.shape[-1])[:, :T]


def key_weights(
    q: Queries,
    k: OrderedKeys,
    query_pos: Positions,
    key_pos: Slots,
    counted: Float[Array, "B T"],
    block: int = 128,
) -> Float[Array, "B K S"]:
    """Causal attention weight that each key gets, summed over the G query heads and over the queries counted.

    What H2O and TOVA see of a prompt. One block of queries at a time, as in `blockwise`.
    """
    B, T, H, D = q.shape
    K = k.shape[2]
    pad = -T % block
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(B, -1, block, K, H // K, D)
    query_pos = jnp.pad(query_pos, ((0, 0), (0, pad)), mode="edge").reshape(B, -1, block)
    counted = jnp.pad(counted, ((0, 0), (0, pad))).reshape(B, -1, block)
    keep = jnp.zeros(key_pos.shape)

    def add(total, piece):
        q_block, pos_block, counted_block = piece
        scores = jnp.einsum("BTKGD,BSKD->BKGTS", q_block, k, preferred_element_type=jnp.float32) * D**-0.5
        weights = jax.nn.softmax(scores + dms.bias(pos_block, key_pos, keep, 0)[:, :, None], axis=-1)
        return total + jnp.einsum("BKGTS,BT->BKS", weights, counted_block), None

    pieces = (q.swapaxes(0, 1), query_pos.swapaxes(0, 1), counted.swapaxes(0, 1))
    return jax.lax.scan(add, jnp.zeros(key_pos.shape), pieces)[0]
