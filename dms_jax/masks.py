"""Level 0. The delayed-eviction mask: the one place that defines who sees whom.

Key `j` is visible to query `i` iff `j <= i` and (`i - j <= w` or not `alpha_j`)   (paper, section 3.2)

A decision is read off the token `o` places later (`decision_offset`), so `alpha_j` is known once token
`j + o` has been seen, and `o <= w + 1` makes sure that this is no later than when it is needed.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from dms_jax.types import NEGATIVE, Counts, Lengths, ScoreBias, SlotFlags, Slots, Visible


def visible(
    query_pos: Int[Array, "B T"], key_pos: Int[Array, "B K S"], evicted: Shaped[Array, "B K S"], window: int
) -> Visible:
    """`[B, K, T, S]` bool, True where the key may be read; a key with position -1 is an empty slot."""
    i = query_pos[:, None, :, None]
    j = key_pos[:, :, None, :]
    return (j >= 0) & (j <= i) & ((i - j <= window) | ~evicted[:, :, None, :])


def bias(
    query_pos: Int[Array, "B T"],
    key_pos: Int[Array, "B K S"],
    keep_log: Float[Array, "B K S"],
    window: int,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B K S"] | None = None,
) -> ScoreBias:
    """The soft form of `visible`, `[B, K, T, S]` float: what is added to the attention scores.

    0 inside the window, `keep_log = log(1 - p_j)` beyond it, NEGATIVE where `visible` is False for every p.
    With `keep_log` in {0, NEGATIVE} it is the hard mask. Where documents are packed into a row, each is a segment
    with positions of its own, and nothing is seen across segments.
    """
    i = query_pos[:, None, :, None]
    j = key_pos[:, :, None, :]
    delayed = jnp.where(i - j <= window, 0.0, keep_log[:, :, None, :])
    seen = (j >= 0) & (j <= i)
    if query_segments is not None:
        seen &= query_segments[:, None, :, None] == key_segments[:, :, None, :]
    return jnp.where(seen, delayed, NEGATIVE)


def shift(values: Shaped[Array, "B K T"], offset: int, lengths: Lengths, kept) -> Shaped[Array, "B K T"]:
    """Gives token j what was predicted at token j + offset; `kept` where that token has not been seen.

    With offset 1 and three real tokens of four: [a b c -] -> [b c kept kept].
    """
    real = jnp.arange(values.shape[-1]) < lengths[:, None]
    return shift_segments(values, offset, real.astype(jnp.int32), kept)


def shift_segments(
    values: Shaped[Array, "B K T"], offset: int, segments: Int[Array, "B T"], kept
) -> Shaped[Array, "B K T"]:
    """`shift` in rows of packed documents: `kept` where token j + offset is of another document, or padding.

    With offset 1, two documents and padding, segments [1 1 1 2 2 0]: [a b c d e -] -> [b c kept e kept kept].
    """
    T = values.shape[-1]
    source = jnp.arange(T) + offset
    index = jnp.minimum(source, T - 1)
    same = (source < T) & (jnp.take(segments, index, axis=1) == segments) & (segments > 0)
    return jnp.where(same[:, None], jnp.take(values, index, axis=-1), kept)


def live_counts(key_pos: Slots, evicted: SlotFlags, start: Counts, T: int, window: int) -> Int[Array, "B K T"]:
    """How many keys each of the queries at `start + 0 .. start + T - 1` sees, `[B, K, T]`, in O(S + T).

    A key comes in at its position and, if marked, leaves w + 1 later. With w = 1, start = 0 and evicted = [1 0 0 1]:
    come 1 1 1 1, leave 0 0 1 0, live 1 2 2 3.
    """
    first = start[:, None, None]
    come = jnp.where(key_pos >= 0, jnp.clip(key_pos - first, 0, T), T)
    leave = jnp.where(evicted & (key_pos >= 0), jnp.clip(key_pos + window + 1 - first, 0, T), T)
    B, K, _ = key_pos.shape
    b, h = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    change = jnp.zeros((B, K, T + 1), jnp.int32).at[b, h, come].add(1).at[b, h, leave].add(-1)
    return jnp.cumsum(change[..., :T], axis=-1)
