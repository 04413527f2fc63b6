"""Delayed-eviction flash attention in Triton, forward and backward. Imported only where it is launched.

Queries and keys come in tiles. From the smallest and largest positions in each (`tiles.tile_bounds`) a program tells
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
from dms_jax.kernels.attention import EvictionMask
from dms_jax.kernels.launch import LOG2E, launch, power_of_two
from dms_jax.kernels.tiles import as_arrays, tile_bounds


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


class Options(NamedTuple):
    """What is known when the kernels are compiled."""

    window: int
    hard: bool
    segments: bool
    tiles: Tiling


def flash(q, k, v, mask: EvictionMask, *, hard: bool, tiles: Tiling | None = None):
    """`kernels.flash_attention`; arguments are checked by the caller, positions are those of each head."""
    segments = mask.query_segments is not None
    options = Options(int(mask.window), hard, segments, tiles or tiling(q.shape[3], q.dtype.itemsize))
    return _flash(options, q, k, v, as_arrays(mask))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(options, q, k, v, mask):
    return _forward(options, q, k, v, mask)[0]


def _run(kernel, options, tile, inputs, *more, out, grid):
    """Launches a kernel on `(q, k, v, mask)`, the bounds of the tiles, and more arrays."""
    q, k, v, mask = inputs
    (_, T, H, D), (S, K) = q.shape, k.shape[1:3]
    segments = (mask.query_segments, mask.key_segments) if options.segments else (None, None)
    q_bounds = tile_bounds(mask.query_pos, segments[0], tile.queries)
    k_bounds = tile_bounds(mask.key_pos, segments[1], tile.keys, mask.log_keep_prob)
    constants = {"T": T, "S": S, "H": H, "K": K, "D": D, "D_PAD": power_of_two(D, 16), "SCALE": D**-0.5 * LOG2E}
    constants |= {"BM": tile.queries, "BN": tile.keys, "Q_TILES": q_bounds.shape[-1], "K_TILES": k_bounds.shape[-1]}
    constants |= {"WINDOW": options.window, "HARD": options.hard, "SEGMENTS": options.segments}
    constants |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    arrays = (mask.query_pos, mask.key_pos, mask.log_keep_prob, mask.query_segments, mask.key_segments)
    return launch(kernel, q, k, v, *arrays, q_bounds, k_bounds, *more, out=out, grid=grid, **constants)


def _forward(options, q, k, v, mask):
    B, T, H, _ = q.shape
    tile = options.tiles.forward
    out = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32))
    grid = (B * H, -(-T // tile.queries))
    out, lse = _run(triton_flash_kernels.forward, options, tile, (q, k, v, mask), out=out, grid=grid)
    return out, (q, k, v, mask, out, lse)


def _backward(options, saved, dout):
    *inputs, out, lse = saved
    q, k, v, mask = inputs
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    delta = jnp.einsum("BTHD,BTHD->BHT", dout, out, preferred_element_type=jnp.float32)
    more = (dout, lse, delta)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, mask.log_keep_prob)]
    tile, grid = options.tiles.dkv, (B * K, -(-S // options.tiles.dkv.keys))
    dk, dv, dbias = _run(
        triton_flash_kernels.key_gradients, options, tile, inputs, *more, out=tuple(shapes[1:]), grid=grid
    )
    tile, grid = options.tiles.dq, (B * H, -(-T // options.tiles.dq.queries))
    (dq,) = _run(triton_flash_kernels.query_gradients, options, tile, inputs, *more, out=(shapes[0],), grid=grid)
    return dq, dk, dv, EvictionMask(None, None, dbias, None)  # integers have no gradient


_flash.defvjp(_forward, _backward)
