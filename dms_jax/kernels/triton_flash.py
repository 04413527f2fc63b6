"""Delayed-eviction flash attention in Triton, forward and backward. Imported only where it is launched.

Queries and keys come in tiles. From the smallest and largest positions in each (`tile_bounds`) a program tells
which tiles it may skip, and which need no masks:

    keys j ->                                         class of a tile       what is added to its scores
    . . . . . . . . . . . . .     queries i           future                (skipped)
    F F F F M N M                   |                 M mixed               all masks, element by element
      F F F F M N M                 v                 N near, within w      nothing
        F F F F M N M                                 F far, beyond w       log_keep_prob[j], one row for all queries
                                                      F and all evicted     (skipped where `hard`)

The class of 64 tiles at a time is kept as the bits of an integer, so the inner loops run over nothing but tiles that
matter, in any order of positions. Only out and the log-sum-exp are kept for the backward pass, which recomputes the
weights twice: for a tile of keys over all its queries (dk, dv, dlog_keep_prob), and the other way round (dq). Each
sum is made by one program in one order, so two runs agree bit for bit.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dms_jax.kernels import triton_flash_kernels
from dms_jax.kernels.launch import LOG2E, launch, power_of_two
from dms_jax.types import MASK_VALUE

FAR_AWAY = 2**30  # a position that no token has; the difference of two fits 32 bits
CHUNK = 64  # tiles classified at a time


class Tile(NamedTuple):
    queries: int
    keys: int
    num_warps: int
    num_stages: int


class Tiling(NamedTuple):
    """Tile sizes of the three kernels."""

    forward: Tile
    dkv: Tile
    dq: Tile


def tiling(head_dim: int, itemsize: int) -> Tiling:
    """What keeps accumulators in registers and two or three tiles in shared memory."""
    if itemsize == 4:  # exact float32 products run on the plain cores
        return Tiling(Tile(32, 32, 8, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2))
    if head_dim <= 64:
        return Tiling(Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3))
    if head_dim <= 128:
        return Tiling(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 3))
    return Tiling(Tile(64, 32, 8, 3), Tile(32, 64, 8, 2), Tile(64, 32, 8, 2))


def tile_bounds(position, segment, size, log_keep_prob=None):
    """Bounds of each tile of `size` tokens: int32 `[..., rows, tiles]`, tiles filled up to a multiple of CHUNK.

    Rows: smallest position of a token (FAR_AWAY if none), largest (-1 if none), smallest and largest segment; for
    keys also the smallest entry with empty slots (-1) counted, and the smallest position of a key that is kept.
    """
    tokens = position.shape[-1]
    tiles = -(-tokens // size)

    def tiled(x, fill):
        wide = ((0, 0),) * (x.ndim - 1)
        x = jnp.pad(x, (*wide, (0, tiles * size - tokens)), constant_values=fill)
        x = x.reshape(*x.shape[:-1], tiles, size)
        return jnp.pad(x, (*wide, (0, -tiles % CHUNK), (0, 0)), constant_values=fill)

    here = tiled(position, -1)
    # A query at -1 sees nothing, but it is there; a key at -1 is an empty slot.
    here_or_far = tiled(position, FAR_AWAY) if log_keep_prob is None else jnp.where(here >= 0, here, FAR_AWAY)
    rows = [here_or_far.min(-1), here.max(-1), tiled(segment, FAR_AWAY).min(-1), tiled(segment, -FAR_AWAY).max(-1)]
    if log_keep_prob is not None:
        kept = (here >= 0) & (tiled(log_keep_prob, MASK_VALUE) > MASK_VALUE / 2)
        rows += [here.min(-1), jnp.where(kept, here, FAR_AWAY).min(-1)]
    return jnp.stack(rows, axis=-2).astype(jnp.int32)


class Options(NamedTuple):
    """What is known when the kernels are compiled."""

    window: int
    hard: bool
    segments: bool
    tiles: Tiling


def flash(
    q,
    k,
    v,
    query_pos,
    key_pos,
    log_keep_prob,
    window,
    *,
    query_segments,
    key_segments,
    hard,
    tiles: Tiling | None = None,
):
    """`kernels.flash_attention`; arguments are checked by the caller."""
    segments = query_segments is not None
    options = Options(int(window), hard, segments, tiles or tiling(q.shape[3], q.dtype.itemsize))
    if not segments:
        query_segments, key_segments = jnp.zeros_like(query_pos), jnp.zeros_like(key_pos)
    integers = (x.astype(jnp.int32) for x in (query_pos, key_pos, query_segments, key_segments))
    return _flash(options, q, k, v, log_keep_prob.astype(jnp.float32), *integers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(options, q, k, v, log_keep_prob, query_pos, key_pos, query_segments, key_segments):
    return _forward(options, q, k, v, log_keep_prob, query_pos, key_pos, query_segments, key_segments)[0]


def _prepare(options, tile, q, k, log_keep_prob, query_pos, key_pos, query_segments, key_segments):
    """Bounds of the tiles, and the constants that all kernels take."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    q_bounds = tile_bounds(query_pos, query_segments, tile.queries)
    k_bounds = tile_bounds(key_pos, key_segments, tile.keys, log_keep_prob)
    constants = {"T": T, "S": S, "H": H, "K": K, "D": D, "D_PAD": power_of_two(D, 16), "SCALE": D**-0.5 * LOG2E}
    constants |= {"BM": tile.queries, "BN": tile.keys, "Q_TILES": q_bounds.shape[-1], "K_TILES": k_bounds.shape[-1]}
    constants |= {"WINDOW": options.window, "HARD": options.hard, "SEGMENTS": options.segments}
    return (q_bounds, k_bounds), constants | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _forward(options, q, k, v, log_keep_prob, query_pos, key_pos, query_segments, key_segments):
    B, T, H, _ = q.shape
    tile = options.tiles.forward
    bounds, constants = _prepare(options, tile, q, k, log_keep_prob, query_pos, key_pos, query_segments, key_segments)
    out, lse = launch(
        triton_flash_kernels.forward,
        *(q, k, v, query_pos, key_pos, log_keep_prob, query_segments, key_segments, *bounds),
        out=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)),
        grid=(B * H, -(-T // tile.queries)),
        **constants,
    )
    return out, (q, k, v, log_keep_prob, query_pos, key_pos, query_segments, key_segments, out, lse)


def _backward(options, saved, dout):
    q, k, v, log_keep_prob, query_pos, key_pos, query_segments, key_segments, out, lse = saved
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    shape = jax.ShapeDtypeStruct
    positions = (query_pos, key_pos, query_segments, key_segments)
    delta = jnp.einsum("BTHD,BTHD->BHT", dout, out, preferred_element_type=jnp.float32)

    def run(kernel, tile, out, grid):
        bounds, constants = _prepare(options, tile, q, k, log_keep_prob, *positions)
        arrays = (q, k, v, query_pos, key_pos, log_keep_prob, query_segments, key_segments, *bounds, dout, lse, delta)
        return launch(kernel, *arrays, out=out, grid=grid, **constants)

    dkv, dq = options.tiles.dkv, options.tiles.dq
    dk, dv, dlog_keep_prob = run(
        triton_flash_kernels.key_gradients,
        dkv,
        (shape(k.shape, k.dtype), shape(v.shape, v.dtype), shape((B, K, S), jnp.float32)),
        (B * K, -(-S // dkv.keys)),
    )
    (dq,) = run(triton_flash_kernels.query_gradients, dq, (shape(q.shape, q.dtype),), (B * H, -(-T // dq.queries)))
    return dq, dk, dv, dlog_keep_prob, None, None, None, None  # integers have no gradient


_flash.defvjp(_forward, _backward)
