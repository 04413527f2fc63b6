"""Paged decode attention in Triton. Imported only inside the functions that launch it (it needs triton).

The live tokens of all heads, laid end to end in tiles, are shared out evenly over a fixed number of
programs; a program may hold a part of one head or several heads. With tiles of 5 heads and 3 programs:

    tiles of head    0 0 0 0 0 0 0 1 2 2 3 4        12 tiles, head 0 much longer than the rest
    program          0 0 0 0 1 1 1 1 2 2 2 2        4 tiles each
    splits           (0,0)   (1,0) (1,1) (2,2) (2,3) (2,4), stored at index program + head, which no two share

In latent attention a value is the first U numbers of its key: each entry is read once, in two parts, and the first
serves both products. One KV head has up to 128 query heads; more than a program holds are split over programs that lie
side by side in the grid, so that a tile comes from the L2 cache for all but the first.

`merge_splits` then merges the splits of each head by their log-sum-exp, in program order: no atomics, so two
runs agree bit for bit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from dms_jax.kernels.launch import LN2, LOG2E, launch, multiprocessors, power_of_two, unused
from dms_jax.kernels.reference import DecodeAttention, Pages

# A dead slot's score, and where the running maximum starts: finite, so that no inf - inf arises, and so far apart
# that a dead slot's weight is exactly 0 even in a tile without a live one.
DEAD = tl.constexpr(-1e30)
FLOOR = tl.constexpr(-1e29)


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
    """Tiles of 16 KB of keys, of quantized keys 8 KB, two of them in flight.

    With as many values that is 64 KB a program, or 32 KB of quantized ones, and at least two run on a multiprocessor at
    a time, within the registers and the shared memory of an A100. A third share for each evens out the end.
    """
    block = min(max(16384 // (power_of_two(head_dim, 16) * max(itemsize, 2)), 16), 128)
    return Tiling(block)


def latent_tiling(group: int, pages: Pages) -> Tiling:
    """Tiles of 64 tokens of 576 numbers (72 KB of bfloat16), one of them in flight while one is worked on.

    The queries lie in shared memory, and a program's sums, a row of U float32 numbers for each of its query heads, in
    registers: two programs run on a multiprocessor. More query heads, quantized pages, which are widened in registers,
    and small pages leave less for tiles, of which then two are in flight.
    """
    few, (_, page, _), itemsize = group <= 16, pages.k.shape, pages.k.dtype.itemsize
    large = few and itemsize == 2 and page % 64 == 0
    numbers = (32768 if large else 16384 if few else 8192) * 2 // max(itemsize, 2)
    block = min(max(numbers // power_of_two(pages.v.shape[2], 16), 16), 64)
    return Tiling(block, 4, 2 if large else 3, 2 * multiprocessors(), 16 if few else 32)


@triton.jit
def pages_of(
    table, order, t, span, within,
    PAGES: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Index in the head's table, and id in the pool, of the pages under tile t: scalars where it lies in one page."""
    if PAGE % BLOCK == 0:
        page = tl.minimum(t * BLOCK // PAGE, PAGES - 1)  # t may be one past the last tile
        if ORDERED:
            page = tl.load(order + page)
        page_id = tl.load(table + page)
    elif ORDERED:
        walked = t * BLOCK + within
        page = tl.load(order + walked // PAGE, mask=walked < span, other=PAGES)
        page_id = tl.load(table + page, mask=(walked < span) & (page < PAGES), other=0)
    else:  # without waiting for the span: what lies past it is no page, and is not followed
        page = (t * BLOCK + within) // PAGE
        page_id = tl.load(table + page, mask=page < PAGES, other=0)
    return page, page_id


@triton.jit
def busy(programs, total):
    """How many programs share the tiles out: none is without one."""
    return tl.maximum(tl.minimum(programs, total), 1)


@triton.jit
def share_of(tile_ends, program, programs, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr):
    """A program's share of the tiles: the head that its first tile lies in, which tile of that head, and how many."""
    all_heads = tl.arange(0, HEADS_PAD)
    before = tl.load(tile_ends + all_heads, mask=all_heads < HEADS, other=2147483647)
    total = tl.load(tile_ends + HEADS - 1).to(tl.int64)
    programs = busy(programs, total)
    start = (program * total // programs).to(tl.int32)
    end = (tl.minimum(program + 1, programs) * total // programs).to(tl.int32)
    head = tl.sum((before <= start).to(tl.int32), 0)
    return head, start - tl.max(tl.where(before <= start, before, 0), 0), end - start


@triton.jit
def load_rows(first, row, live, queries, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """WIDTH numbers of each row from `first` on, STRIDE apart, padded as the queries are and in their dtype."""
    dims = tl.arange(0, queries.shape[1])
    mask = live[:, None] & (dims < WIDTH)[None, :]
    x = tl.load((first + row * STRIDE)[:, None] + dims[None, :], mask=mask, other=0.0)
    return (x.to(tl.float32) if x.dtype == tl.int8 else x).to(queries.dtype)  # int8 to bfloat16 is exact


@triton.jit
def attend_tiles(
    queries, rest, rows, head, tile, stop, length, span, new_slot, k_pages, v_pages, table, order, k_scale, v_scale,
    scores_out,
    PAGES: tl.constexpr, PAGE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    SCALE: tl.constexpr, QUANTIZED: tl.constexpr, ORDERED: tl.constexpr, SCORES: tl.constexpr, WRITE: tl.constexpr,
    LATENT: tl.constexpr,
):  # fmt: skip
    """The online softmax over the tiles [tile, stop) of a head: running maximum, sum and weighted values."""
    within = tl.arange(0, BLOCK)
    top = tl.full([queries.shape[0]], FLOOR, tl.float32)
    denominator = tl.zeros([queries.shape[0]], tl.float32)
    acc = tl.zeros(queries.shape, tl.float32)
    page, page_id = pages_of(table, order, tile, span, within, PAGES, PAGE, BLOCK, ORDERED)
    for t in range(tile, stop):
        offset = t * BLOCK % PAGE + within
        if PAGE % BLOCK != 0:
            offset = (t * BLOCK + within) % PAGE
        slot = page * PAGE + offset
        live = slot < length
        row = page_id.to(tl.int64) * PAGE + offset
        # The next tile's page ids are asked for a step ahead: loads that wait for loads would not be pipelined.
        page, page_id = pages_of(table, order, t + 1, span, within, PAGES, PAGE, BLOCK, ORDERED)
        if WRITE:  # the new token is read from k_new
            live = live & (slot != new_slot)
        keys = load_rows(k_pages, row, live, queries, D, D + R)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if QUANTIZED:
            scores *= tl.load((v_scale if LATENT else k_scale) + row, mask=live, other=0.0)[None, :]
        if R > 0:
            turned = load_rows(k_pages + D, row, live, rest, R, D + R)
            if QUANTIZED:
                own = tl.dot(rest, tl.trans(turned), input_precision="ieee")
                scores += own * tl.load(k_scale + row, mask=live, other=0.0)[None, :]
            else:
                scores = tl.dot(rest, tl.trans(turned), scores, input_precision="ieee")
        scores *= SCALE
        scores = tl.where(live[None, :], scores, DEAD)
        if SCORES:
            target = scores_out + (head * G + rows).to(tl.int64)[:, None] * (PAGES * PAGE) + slot[None, :]
            tl.store(target, scores, mask=(rows < G)[:, None] & live[None, :])
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        denominator = denominator * shrink + tl.sum(weights, 1)
        values = keys if LATENT else load_rows(v_pages, row, live, queries, D, D)
        if QUANTIZED:
            weights *= tl.load(v_scale + row, mask=live, other=0.0)[None, :]
        acc = tl.dot(weights.to(queries.dtype), values, acc * shrink[:, None], input_precision="ieee")
        top = higher
    return top, denominator, acc


@triton.jit
def load_new(
    new_slot, writes, key_row, value_row, table, queries, rest, k_out, v_out,
    PAGE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, LATENT: tl.constexpr,
):  # fmt: skip
    """A head's new key in its two parts, its new value, and the row of the pool that they belong to."""
    dims = tl.arange(0, queries.shape[1])
    more = tl.arange(0, rest.shape[1])
    page_id = tl.load(table + new_slot // PAGE, mask=writes, other=0)
    key = tl.load(key_row + dims, mask=writes & (dims < D), other=0.0).to(k_out.dtype.element_ty)
    turned = tl.load(key_row + D + more, mask=writes & (more < R), other=0.0).to(k_out.dtype.element_ty)
    value = key
    if not LATENT:
        value = tl.load(value_row + dims, mask=writes & (dims < D), other=0.0).to(v_out.dtype.element_ty)
    return page_id.to(tl.int64) * PAGE + new_slot % PAGE, key, turned, value


@triton.jit
def write_and_attend(
    top, denominator, acc, queries, rest, rows, head, new_slot, row, key, turned, value, k_out, v_out, scores_out,
    PAGES: tl.constexpr, PAGE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, SCALE: tl.constexpr,
    SCORES: tl.constexpr, LATENT: tl.constexpr,
):  # fmt: skip
    """Writes a head's new key and value to their row, and adds them to the online softmax.

    Programs of other query heads of the same KV head write the same.
    """
    dims = tl.arange(0, queries.shape[1])
    tl.store(k_out + row * (D + R) + dims, key, mask=dims < D)
    score = tl.sum(queries.to(tl.float32) * key.to(tl.float32)[None, :], 1)
    if R > 0:
        more = tl.arange(0, rest.shape[1])
        tl.store(k_out + row * (D + R) + D + more, turned, mask=more < R)
        score += tl.sum(rest.to(tl.float32) * turned.to(tl.float32)[None, :], 1)
    score *= SCALE
    if not LATENT:
        tl.store(v_out + row * D + dims, value, mask=dims < D)
    if SCORES:
        target = scores_out + (head * G + rows).to(tl.int64) * (PAGES * PAGE) + new_slot
        tl.store(target, score, mask=rows < G)
    higher = tl.maximum(top, score)
    weight = tl.exp2(score - higher)
    shrink = tl.exp2(top - higher)
    acc = acc * shrink[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
    return higher, denominator * shrink + weight, acc


@triton.jit
def split_kv(
    inputs, k_pages, v_pages, table, lengths, spans, tile_ends, order, k_scale, v_scale, new_slots, first,
    acc_out, top_out, sum_out, scores_out, k_out, v_out,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, K: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    BLOCK: tl.constexpr, SCALE: tl.constexpr, QUANTIZED: tl.constexpr, ORDERED: tl.constexpr, SCORES: tl.constexpr,
    WRITE: tl.constexpr, LATENT: tl.constexpr, SLOTS_OF_ALL: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """Attention over this program's share of the tiles, one split for each head that it touches.

    `inputs [B, H, D + R]` are the queries; with WRITE new keys and, unless LATENT, values follow as K more heads each.
    "head" is a KV head of a sequence, `b * K + k`. Table, lengths, spans and tile_ends hold those of all LAYERS, this
    layer's from `first` on, and so does new_slots with SLOTS_OF_ALL: a head's place among them is `place`. `spans` is
    how many tokens of a head are walked over: its length, or with ORDERED the whole pages that `order` lists.
    `tile_ends` counts the tiles up to each head's last. A value has D numbers, a key D + R.
    """
    INPUTS: tl.constexpr = K * G + (0 if not WRITE else K if LATENT else 2 * K)  # heads
    program = tl.program_id(1)
    first = tl.load(first) if LAYERS > 1 else 0
    head, tile, left = share_of(tile_ends + first, program, tl.num_programs(1), HEADS, HEADS_PAD)
    if WRITE:  # an aliased pool is at hand as the output
        k_pages = k_out
        v_pages = v_out
    rows = tl.program_id(0) * G_PAD + tl.arange(0, G_PAD)
    dims = tl.arange(0, D_PAD)
    more = tl.arange(0, R_PAD)
    q_mask = (rows < G)[:, None] & (dims < D)[None, :]
    while left > 0:
        place = first + head
        pages = place * PAGES
        length = tl.load(lengths + place)
        span = tl.load(spans + place)
        stop = tl.minimum(tl.cdiv(span, BLOCK), tile + left)
        q_rows = (inputs + (head // K * INPUTS + head % K * G + rows) * (D + R))[:, None]
        queries = tl.load(q_rows + dims[None, :], mask=q_mask, other=0.0)
        rest = tl.load(q_rows + D + more[None, :], mask=(rows < G)[:, None] & (more < R)[None, :], other=0.0)
        new_slot = tl.load(new_slots + (place if SLOTS_OF_ALL else head)) if WRITE else -1
        # The tiles are shared out, so the program whose tile holds the slot is the only one to write it.
        writes = (new_slot >= tile * BLOCK) & (new_slot < stop * BLOCK) & (new_slot < length)
        if WRITE:  # asked for before the tiles, so that nothing waits for it afterwards
            key_row = inputs + (head // K * INPUTS + K * G + head % K) * (D + R)
            row, key, turned, value = load_new(
                new_slot, writes, key_row, key_row + K * D, table + pages, queries, rest, k_out, v_out,
                PAGE, D, R, LATENT,
            )  # fmt: skip
        top, denominator, acc = attend_tiles(
            queries, rest, rows, head, tile, stop, length, span, new_slot, k_pages, v_pages, table + pages,
            order + pages, k_scale, v_scale, scores_out,
            PAGES, PAGE, G, D, R, BLOCK, SCALE, QUANTIZED, ORDERED, SCORES, WRITE, LATENT,
        )  # fmt: skip
        if WRITE:  # noqa: SIM102 (known when compiled; what follows is not)
            if writes:
                top, denominator, acc = write_and_attend(
                    top, denominator, acc, queries, rest, rows, head, new_slot, row, key, turned, value, k_out, v_out,
                    scores_out, PAGES, PAGE, G, D, R, SCALE, SCORES, LATENT,
                )  # fmt: skip
        index = (program + head).to(tl.int64) * G + rows
        tl.store(top_out + index, top, mask=rows < G)
        tl.store(sum_out + index, denominator, mask=rows < G)
        tl.store(acc_out + index[:, None] * D + dims[None, :], acc, mask=q_mask)
        left -= stop - tile
        tile = 0
        head += 1


@triton.jit
def merge_splits(
    acc_in, top_in, sum_in, tile_ends, first,
    out, lse,
    HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PROGRAMS: tl.constexpr, CHUNK: tl.constexpr, LN2: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one query head. Those of a head lie side by side, at index program + head."""
    head = tl.program_id(0)
    g = tl.program_id(1)
    tile_ends += tl.load(first)
    total = tl.load(tile_ends + HEADS - 1).to(tl.int64)
    before = tl.load(tile_ends + head - 1, mask=head > 0, other=0).to(tl.int64)
    after = tl.load(tile_ends + head).to(tl.int64)
    programs = busy(PROGRAMS, total)
    # Tile t belongs to the program w with w * total // programs <= t < (w + 1) * total // programs.
    first_program = ((before + 1) * programs - 1) // tl.maximum(total, 1)
    last = (after * programs - 1) // tl.maximum(total, 1)
    count = tl.where(after > before, last - first_program + 1, 0).to(tl.int32)

    dims = tl.arange(0, D_PAD)
    within = tl.arange(0, CHUNK)
    top = tl.full([], FLOOR, tl.float32)
    denominator = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([D_PAD], tl.float32)
    for done in range(0, count, CHUNK):
        valid = done + within < count
        index = (first_program + done + within + head) * G + g
        tops = tl.load(top_in + index, mask=valid, other=DEAD)
        sums = tl.load(sum_in + index, mask=valid, other=0.0)
        mask = valid[:, None] & (dims < D)[None, :]
        accs = tl.load(acc_in + index[:, None] * D + dims[None, :], mask=mask, other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        factors = tl.exp2(tops - higher)
        shrink = tl.exp2(top - higher)
        denominator = denominator * shrink + tl.sum(sums * factors, 0)
        acc = acc * shrink + tl.sum(accs * factors[:, None], 0)
        top = higher
    empty = denominator == 0
    acc = acc / tl.where(empty, 1.0, denominator)
    tl.store(out + (head * G + g).to(tl.int64) * D + dims, acc.to(out.dtype.element_ty), mask=dims < D)
    log = (top + tl.log2(tl.where(empty, 1.0, denominator))) * LN2
    tl.store(lse + head * G + g, tl.where(empty, float("-inf"), log))


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
    order, spans = (None, pages.lengths) if readable is None else read_order(readable, own, page)
    # Of all layers, so that XLA makes it once in a step.
    tile_ends = jnp.cumsum(-(-spans.reshape(-1, B * K) // tiles.block), axis=1, dtype=jnp.int32)
    work = _Work(spans, tile_ends, order, jnp.full(1, (layer or 0) * B * K, jnp.int32), tiles)
    *splits, scores, k, v = _split(q, pages, work, weights, new)
    out, lse = _merge(q, splits, work)
    by_slot = _weights(scores, lse, own, readable, page) if weights else None
    if new is None:
        return DecodeAttention(out, lse, by_slot), pages
    return DecodeAttention(out, lse, by_slot), pages._replace(k=k) if pages.latent else pages._replace(k=k, v=v)


def _split(q, pages: Pages, work: _Work, weights: bool, new):
    """Launches split_kv: weighted values, maximum and sum of each split; scores; the pools."""
    (B, H, D), (K, P), page, U = q.shape, pages.table.shape[-2:], pages.k.shape[1], pages.v.shape[2]
    G, heads, tiles, quantized = H // K, B * K, work.tiles, pages.k_scale is not None
    f32, shape = jnp.float32, jax.ShapeDtypeStruct
    compute = q.dtype if quantized else jnp.promote_types(q.dtype, pages.k.dtype)
    *made, slots = new or (unused(),)
    inputs = [q, *made[: 1 if pages.latent else 2]]
    splits, g_pad = tiles.programs + heads, min(power_of_two(G, 16), tiles.heads)
    pools = tuple(shape(x.shape if new and x.size else (1,), x.dtype) for x in (pages.k, pages.v))
    scores = shape((B, K, G, P * page) if weights else (1,), f32)
    return launch(
        split_kv,
        # In one array, which XLA makes with one kernel.
        *(jnp.concatenate([x.astype(compute) for x in inputs], axis=1), pages.k),
        *(unused(pages.v.dtype) if pages.latent else pages.v, pages.table, pages.lengths, work.spans, work.tile_ends),
        *(unused() if work.order is None else work.order,),
        *(unused(f32) if scale is None else scale for scale in (pages.k_scale, pages.v_scale)),
        *(slots, work.first),
        out=(shape((splits, G, U), f32), shape((splits, G), f32), shape((splits, G), f32), scores, *pools),
        grid=(-(-G // g_pad), tiles.programs),
        aliases={} if not new else {1: 4} if pages.latent else {1: 4, 2: 5},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **{"HEADS": heads, "HEADS_PAD": power_of_two(heads), "K": K, "PAGES": P, "PAGE": page, "BLOCK": tiles.block},
        **{"G": G, "G_PAD": g_pad, "D": U, "D_PAD": power_of_two(U, 16), "SCALE": D**-0.5 * LOG2E},
        **{"R": D - U, "R_PAD": power_of_two(D - U, 16), "LATENT": pages.latent},
        **{"QUANTIZED": quantized, "ORDERED": work.order is not None, "SCORES": weights, "WRITE": new is not None},
        **{"SLOTS_OF_ALL": slots.shape == pages.lengths.shape, "LAYERS": work.spans.size // heads},
    )


def _merge(q, splits, work: _Work):
    """Launches merge_splits: out and lse."""
    (B, H, _), (_, G, U) = q.shape, splits[0].shape
    heads = B * H // G
    return launch(
        merge_splits,
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
