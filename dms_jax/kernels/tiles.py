"""Which tiles of queries and keys matter to each other in flash attention; the Triton kernels explain the classes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dms_jax.kernels.attention import EvictionMask
from dms_jax.types import MASK_VALUE

FAR_AWAY = 2**30  # a position that no token has; the difference of two fits 32 bits
CHUNK = 64  # tiles that the Triton kernels classify at a time


def as_arrays(mask: EvictionMask) -> EvictionMask:
    """The mask as kernels take it: int32 and float32, always with segments, without the window."""
    mask = mask.one_segment() if mask.query_segments is None else mask
    integers = jax.tree.map(lambda x: x.astype(jnp.int32), mask._replace(log_keep_prob=None, window=None))
    return integers._replace(log_keep_prob=mask.log_keep_prob.astype(jnp.float32))


def tile_bounds(position, segment, size, log_keep_prob=None):
    """Bounds of each tile of `size` tokens: int32 `[..., rows, tiles]`, tiles filled up to a multiple of CHUNK.

    Rows: smallest position of a token (FAR_AWAY if none), largest (-1 if none), smallest and largest segment; for
    keys also the smallest entry with empty slots (-1) counted, and the smallest position of a key that is kept.
    segment: None where there is one, 0.
    """
    tokens = position.shape[-1]
    tiles = -(-tokens // size)

    def tiled(x, fill):
        x = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, tiles * size - tokens)), constant_values=fill)
        return x.reshape(*x.shape[:-1], tiles, size)

    here = tiled(position, -1)
    last, one = here.max(-1), jnp.zeros((*here.shape[:-1],), jnp.int32)
    # A query at -1 sees nothing, but it is there; a key at -1 is an empty slot.
    here_or_far = tiled(position, FAR_AWAY) if log_keep_prob is None else jnp.where(here >= 0, here, FAR_AWAY)
    # XLA computes on the host what it knows beforehand, entry by entry: so one segment is no array of zeros.
    low, high = (one, one) if segment is None else (tiled(segment, FAR_AWAY).min(-1), tiled(segment, -FAR_AWAY).max(-1))
    rows = [(here_or_far.min(-1), FAR_AWAY), (last, -1), (low, FAR_AWAY), (high, -FAR_AWAY)]
    if log_keep_prob is not None:
        kept = (here >= 0) & (tiled(log_keep_prob, MASK_VALUE) > MASK_VALUE / 2)
        rows += [(here.min(-1), -1), (jnp.where(kept, here, FAR_AWAY).min(-1), FAR_AWAY)]
    more = (*((0, 0),) * (last.ndim - 1), (0, -tiles % CHUNK))
    filled = [jnp.pad(row, more, constant_values=fill) for row, fill in rows]
    return jnp.stack(filled, axis=-2).astype(jnp.int32)


class Plan(NamedTuple):
    """For each tile that stays in a program the tiles that pass by, those that need no masks first.

    Attributes:
      entries: int32 `[B, K, tiles that stay, places]`, 2 * tile + far.
      counts: int32 `[B, K, tiles that stay, 2]`, of those that need no masks, and of all that matter.
    """

    entries: jax.Array
    counts: jax.Array


def plan(mask: EvictionMask, queries: int, keys: int, *, keys_stay: bool, window: int, hard: bool) -> Plan:
    """The rules of `triton_flash_kernels.classify`, for tiles of `queries` and `keys` tokens; segments may be None."""
    q = tile_bounds(mask.query_pos, mask.query_segments, queries)[:, None, :, :, None]
    # A soft mask hides no tile, so all layers have the same plan, and XLA sees that if it is made of the same arrays.
    kept = mask.log_keep_prob if hard else jnp.zeros_like(mask.log_keep_prob)
    k = tile_bounds(mask.key_pos, mask.key_segments, keys, kept)[:, :, :, None]
    q_low, q_high, q_seg_low, q_seg_high = (q[:, :, row] for row in range(4))
    k_low, k_high, k_seg_low, k_seg_high, k_first, k_kept = (k[:, :, row] for row in range(6))
    far = q_low - k_high > window
    matters = (k_low <= q_high) & (k_seg_low <= q_seg_high) & (q_seg_low <= k_seg_high)
    if hard:
        matters &= (k_kept <= q_high) | ~far
    one_segment = (k_seg_low == k_seg_high) & (q_seg_low == q_seg_high) & (k_seg_low == q_seg_low)
    plain = matters & one_segment & (k_first >= 0) & (k_high <= q_low) & (far | (q_high - k_low <= window))
    if keys_stay:
        matters, plain, far = (x.swapaxes(2, 3) for x in (matters, plain, far))
    kind = jnp.where(plain, 0, jnp.where(matters, 1, 2))
    codes = 2 * far.shape[-1]
    # No two are equal, so the order need not be stable, which would be a sort of two arrays.
    entries = jnp.sort(kind * codes + jnp.arange(0, codes, 2) + far, stable=False) % codes
    counts = jnp.stack([plain.sum(-1), matters.sum(-1)], -1)
    return Plan(entries.astype(jnp.int32), counts.astype(jnp.int32))
