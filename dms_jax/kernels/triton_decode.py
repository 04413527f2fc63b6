"""Paged decode attention in Triton. Imported only where it is launched.

The live tokens of all heads, laid end to end in tiles, are shared out evenly over a fixed number of
programs; a program may hold a part of one head or several heads. With tiles of 5 heads and 3 programs:

    tiles of head    0 0 0 0 0 0 0 1 2 2 3 4        12 tiles, head 0 much longer than the rest
    program          0 0 0 0 1 1 1 1 2 2 2 2        4 tiles each
    splits           (0,0)   (1,0) (1,1) (2,2) (2,3) (2,4), stored at index program + head, which no two share

In latent attention a value is the first U numbers of its key: each entry is read once, in two parts, and the first
serves both products. One KV head has up to 128 query heads; more than a program holds are split over programs that lie
side by side in the grid, so that a tile comes from the L2 cache for all but the first.

The splits of a head are merged by their log-sum-exp in program order, so two runs agree bit for bit: by a launch of
`merge_splits` or, where most heads lie in one program and have nothing to merge, by whichever of a head's programs is
the last to be counted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dms_jax.kernels import triton_decode_kernels
from dms_jax.kernels.launch import LN2, LOG2E, hopper, launch, multiprocessors, power_of_two, unused
from dms_jax.kernels.reference import DecodeAttention, Pages


class Tiling(NamedTuple):
    """How the work is tiled.

    block: tokens in a tile. programs: shares of the tiles; 0 means three for each multiprocessor. heads: the most query
    heads of a program.
    """

    block: int
    num_warps: int = 4
    num_stages: int = 3
    programs: int = 0
    heads: int = 16


def tiling(head_dim: int, itemsize: int) -> Tiling:
    """Tiles of 16 KB of keys, two of them in flight, or of quantized keys 8 KB, three of them.

    With as many values that is 64 KB a program, or 48 KB of quantized ones, and at least two run on a multiprocessor at
    a time, within the registers and the shared memory of an A100. A third share for each evens out the end; quantized
    pages take half the time, and more programs to begin and to merge would cost more than that.
    """
    block = min(max(16384 // (power_of_two(head_dim, 16) * max(itemsize, 2)), 16), 128)
    return Tiling(block) if itemsize > 1 else Tiling(block, num_stages=4, programs=2 * multiprocessors())


def latent_tiling(group: int, pages: Pages) -> Tiling:
    """Tiles of 64 tokens of 576 numbers (72 KB of bfloat16), one of them in flight while one is worked on.

    The queries lie in shared memory, and a program's sums, a row of U float32 numbers for each of its query heads, in
    registers: two programs run on a multiprocessor. More query heads and small pages leave less for tiles, of which
    then, as of quantized ones, two are in flight.

    On Hopper more than 16 query heads go 64 to a program, the fewest that its own tensor core instructions take, and
    with sums as wide as 512 it has the multiprocessor to itself.
    """
    few, (_, page, _), (*_, U), itemsize = group <= 16, pages.k.shape, pages.v.shape, pages.k.dtype.itemsize
    large = itemsize <= 2 and page % 64 == 0
    if large and itemsize == 2 and not few and hopper():
        wide = U > 256
        return Tiling(64, 8 if wide else 4, 2, (1 if wide else 2) * multiprocessors() // -(-group // 64), 64)
    numbers = (32768 if large and few else 16384 if few else 8192) * 2 // max(itemsize, 2)
    block = min(max(numbers // power_of_two(U, 16), 16), 64)
    stages = 2 if large and few and itemsize == 2 else 3
    return Tiling(block, 4, stages, 2 * multiprocessors(), 16 if few else 32)


def read_order(readable, lengths, page):
    """Which pages to walk over: `order [B, K, P]`, the readable ones first, and `spans [B, K]`, tokens in them.

    With readable = [1 0 1 1] and 3 pages in use: order [0 2 1 3], spans 2 * page.
    """
    P = readable.shape[2]
    used = readable & (jnp.arange(P)[None, None, :] * page < lengths[..., None])
    order = jnp.argsort(~used, axis=2, stable=True).astype(jnp.int32)
    return order, used.sum(axis=2, dtype=jnp.int32) * page


class _Work(NamedTuple):
    """What is shared out: tokens walked over and tiles of the heads of all layers; this layer's begin at `first`."""

    spans: jax.Array
    tile_ends: jax.Array
    order: jax.Array | None
    first: jax.Array
    tiles: Tiling
    merged: bool  # by split_kv


def decode(q, pages: Pages, layer: int | None = None, *, weights=False, readable=None, new=None, tiles=None):
    """DecodeAttention, and the pages with what was written; arguments are checked by the caller.

    layer: one of L, with tables and lengths of all, since a layer's part of them would have to be copied for a kernel.
    readable: of pages of one layer. new: `(k_new [B, K, D], v_new [B, K, D], slots)` to be written first, the slots
    `[L, B, K]`, or `[1, B, K]` for this layer alone. tiles: a Tiling other than the default.
    """
    (B, H, D), K, page = q.shape, pages.table.shape[-2], pages.k.shape[1]
    own = pages.lengths if layer is None else pages.lengths[layer]
    tiles = tiles or (latent_tiling(H // K, pages) if pages.latent else tiling(D, pages.k.dtype.itemsize))
    tiles = tiles._replace(programs=tiles.programs or 3 * multiprocessors())
    merged = not pages.latent and B * K >= 2 * tiles.programs
    order, spans = (None, pages.lengths) if readable is None else read_order(readable, own, page)
    # Of all layers, so that XLA makes it once in a step. An empty head has a tile too, so that its zeros are written.
    tile_ends = jnp.cumsum(jnp.maximum(1, -(-spans.reshape(-1, B * K) // tiles.block)), axis=1, dtype=jnp.int32)
    work = _Work(spans, tile_ends, order, jnp.full(1, (layer or 0) * B * K, jnp.int32), tiles, merged)
    *splits, scores, out, lse, k, v = _split(q, pages, work, weights, new)
    if not work.merged:
        out, lse = _merge(q, splits, work)
    by_slot = _weights(scores, lse, own, readable, page) if weights else None
    if new is None:
        return DecodeAttention(out, lse, by_slot), pages
    return DecodeAttention(out, lse, by_slot), pages._replace(k=k) if pages.latent else pages._replace(k=k, v=v)


def _queries(q, pages: Pages):
    """The queries in the dtype of the products, and the factor of their products with keys.

    Quantized pages are multiplied in float16, which holds their numbers exactly; queries up to 2**23 fit it so.
    """
    factor = q.shape[2] ** -0.5 * LOG2E
    if pages.k_scale is None:
        return q.astype(jnp.promote_types(q.dtype, pages.k.dtype)), factor
    if q.dtype == jnp.float32:
        return q, factor
    return (q * 2**-8).astype(jnp.float16), factor * 2**8


def _split(q, pages: Pages, work: _Work, weights: bool, new):
    """Launches split_kv: weighted values, maximum and sum of each split; scores; out and lse if merged; the pools."""
    (B, H, D), (K, P), page, U = q.shape, pages.table.shape[-2:], pages.k.shape[1], pages.v.shape[2]
    G, heads, tiles, quantized = H // K, B * K, work.tiles, pages.k_scale is not None
    f32, shape = jnp.float32, jax.ShapeDtypeStruct
    (queries, factor), parts = _queries(q, pages), 2 if quantized else 1
    *made, slots = new or (unused(),)
    inputs = [queries, *(x.astype(queries.dtype) for x in made[: 1 if pages.latent else 2])]
    splits, g_pad = tiles.programs + heads, min(power_of_two(G, 16), tiles.heads)
    pools = tuple(shape(x.shape if new and x.size else (1,), x.dtype) for x in (pages.k, pages.v))
    scores = shape((B, K, G, P * page) if weights else (1,), f32)
    attended = shape((B, H, U), q.dtype), shape((B, H), f32)
    rows = min(power_of_two(G), 4)  # query heads that are merged at a time
    return launch(
        triton_decode_kernels.split_kv,
        # In one array, which XLA makes with one kernel.
        *(jnp.concatenate(inputs, axis=1), pages.k, unused(pages.v.dtype) if pages.latent else pages.v),
        *(pages.table, pages.lengths, work.spans, work.tile_ends),
        *(unused() if work.order is None else work.order,),
        *(unused(f32) if scale is None else scale for scale in (pages.k_scale, pages.v_scale)),
        *(slots, work.first, jnp.zeros(heads, jnp.int32) if work.merged else unused()),
        out=(shape((splits, G, U), f32), shape((splits, G), f32), shape((splits, G), f32), scores, *attended, *pools),
        grid=(-(-G // g_pad), tiles.programs),
        aliases={} if not new else {1: 6} if pages.latent else {1: 6, 2: 7},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **{"HEADS": heads, "HEADS_PAD": power_of_two(heads), "K": K, "PAGES": P, "PAGE": page, "BLOCK": tiles.block},
        **{"G": G, "G_PAD": g_pad, "D": U, "D_PAD": power_of_two(U, 16 * parts), "PARTS": parts, "SCALE": factor},
        **{"R": D - U, "R_PAD": power_of_two(D - U, 16 * parts), "LATENT": pages.latent},
        **{"ORDERED": work.order is not None, "SCORES": weights, "WRITE": new is not None},
        **{"MERGE": work.merged, "ROWS": rows, "CHUNK": max(1, 2048 // (rows * power_of_two(U))), "LN2": LN2},
        **{"SLOTS_OF_ALL": slots.shape == pages.lengths.shape, "LAYERS": work.spans.size // heads},
    )


def _merge(q, splits, work: _Work):
    """Launches merge_splits: out and lse."""
    (B, H, _), (_, G, U) = q.shape, splits[0].shape
    heads = B * H // G
    return launch(
        triton_decode_kernels.merge_splits,
        *(*splits, work.tile_ends, work.first),
        out=(jax.ShapeDtypeStruct((B, H, U), q.dtype), jax.ShapeDtypeStruct((B, H), jnp.float32)),
        grid=(heads, G),
        num_warps=1,
        num_stages=2,
        **{"HEADS": heads, "G": G, "D": U, "D_PAD": power_of_two(U, 16)},
        **{"PROGRAMS": work.tiles.programs, "CHUNK": 8 if U > 128 else 16, "LN2": LN2},
    )


def _weights(scores, lse, lengths, readable, page):
    """Softmax weights `[B, K, S]`, summed over a KV head's query heads, from scores `[B, K, G, S]`."""
    B, K, G, S = scores.shape
    live = jnp.arange(S) < lengths[..., None]
    if readable is not None:
        live &= jnp.repeat(readable, page, axis=2)
    # The scores of dead slots were never written: they may hold anything.
    log = scores - lse.reshape(B, K, G, 1) * LOG2E
    return jnp.where(live[:, :, None], jnp.exp2(log), 0.0).sum(axis=2)
