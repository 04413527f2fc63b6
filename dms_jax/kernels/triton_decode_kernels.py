"""The kernels of paged decode attention; `triton_decode` explains and launches them.

Scores are in base 2: `SCALE` holds D ** -0.5 * log2(e). Sizes in capitals are known when compiled.
"""

import triton
import triton.language as tl

# A dead slot's score, and where the running maximum starts: finite, so that no inf - inf arises, and so far apart
# that a dead slot's weight is exactly 0 even in a tile without a live one.
DEAD = tl.constexpr(-1e30)
FLOOR = tl.constexpr(-1e29)


@triton.jit
def pages_of(
    table, order, t, span, within,
    PAGES: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Index in the head's table, and id in the pool, of the pages under tile t: scalars where it lies in one page."""
    if PAGE % BLOCK == 0:
        page = tl.minimum(t * BLOCK // PAGE, PAGES - 1)  # t may be one past the last tile
        if ORDERED:  # a head has a tile, too, where no page may be read
            page = tl.load(order + page, mask=t * BLOCK < span, other=PAGES)
            page_id = tl.load(table + page, mask=page < PAGES, other=0)
        else:
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


# To four bytes at a time, which Triton's own operations would take apart. As float16 the bits 0x6400 are 1024, and the
# last of them count ones; with its sign turned an int8 is 128 too large.
WIDEN_INT8 = tl.constexpr("""{
    .reg .b32 turned, high;
    xor.b32 turned, $2, 0x80808080;
    mov.b32 high, 0x64646464;
    prmt.b32 $0, turned, high, 0x4240;
    prmt.b32 $1, turned, high, 0x4341;
}""")
WIDEN_FLOAT8 = tl.constexpr("""{
    .reg .b32 sorted;
    .reg .b16 low, high;
    prmt.b32 sorted, $2, 0, 0x3120;
    mov.b32 {low, high}, sorted;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}""")


@triton.jit
def widened(pairs, FLOAT8: tl.constexpr):
    """The numbers in the low and in the high bytes, as float16, which holds them all."""
    ptx: tl.constexpr = WIDEN_FLOAT8 if FLOAT8 else WIDEN_INT8
    halves: tl.constexpr = (tl.float16, tl.float16)
    low, high = tl.inline_asm_elementwise(ptx, "=r,=r,r", [pairs], halves, is_pure=True, pack=2)
    return (low, high) if FLOAT8 else (low - 1152.0, high - 1152.0)


@triton.jit
def places(part, PAD: tl.constexpr, PARTS: tl.constexpr):
    """Where the numbers of a part lie in a row padded to PAD: there is one part, or those of even and of odd places."""
    return tl.arange(0, PAD // PARTS) * PARTS + part


@triton.jit
def load_queries(first, live, WIDTH: tl.constexpr, PAD: tl.constexpr, PARTS: tl.constexpr):
    """The first WIDTH numbers of each row, padded to PAD, in parts."""
    queries = ()
    for part in tl.static_range(PARTS):
        dims = places(part, PAD, PARTS)
        mask = live[:, None] & (dims < WIDTH)[None, :]
        queries = queries + (tl.load(first[:, None] + dims[None, :], mask=mask, other=0.0),)
    return queries


@triton.jit
def load_rows(first, row, live, queries, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """WIDTH numbers of each row from `first` on, STRIDE apart, padded as the queries are and in their dtype.

    Tensor cores take their numbers from shared memory 16 bits at a time. So bytes are loaded in pairs, and those in
    even and in odd places become two parts: the order of the numbers does not matter to a product.
    """
    FLOAT8: tl.constexpr = first.dtype.element_ty == tl.float8e4nv
    PARTS: tl.constexpr = len(queries)
    if PARTS == 2:
        first = first.to(tl.pointer_type(tl.uint16))
    dims = tl.arange(0, queries[0].shape[1])
    mask = live[:, None] & (dims < WIDTH // PARTS)[None, :]
    x = tl.load((first + row * (STRIDE // PARTS))[:, None] + dims[None, :], mask=mask, other=0)
    parts = widened(x, FLOAT8) if PARTS == 2 else (x,)
    return [part.to(queries[0].dtype) for part in parts]


@triton.jit
def products(queries, keys, scores):
    """`scores` and the products of queries with keys, both in as many parts."""
    for part in tl.static_range(len(queries)):
        scores = tl.dot(queries[part], tl.trans(keys[part]), scores, input_precision="ieee")
    return scores


@triton.jit
def accumulated(acc, weights, values, shrink):
    """Each part of the sums, shrunk, with the weighted values of that part."""
    sums = ()
    for part in tl.static_range(len(acc)):
        sums = sums + (tl.dot(weights, values[part], acc[part] * shrink[:, None], input_precision="ieee"),)
    return sums


@triton.jit
def about_log2(x):
    """log2 of float32 numbers to within 0.09, from their bits; of those below 1e-30 as of 1e-30."""
    bits = tl.maximum(x, 1e-30).to(tl.int32, bitcast=True)
    return bits.to(tl.float32) * 2.0**-23 - 127


@triton.jit
def attend_tiles(
    queries, rest, rows, head, tile, stop, length, span, new_slot, k_pages, v_pages, table, order, k_scale, v_scale,
    scores_out,
    PAGES: tl.constexpr, PAGE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    SCALE: tl.constexpr, ORDERED: tl.constexpr, SCORES: tl.constexpr, WRITE: tl.constexpr, LATENT: tl.constexpr,
):  # fmt: skip
    """The online softmax over the tiles [tile, stop) of a head: running maximum, sum and weighted values."""
    QUANTIZED: tl.constexpr = len(queries) > 1
    within = tl.arange(0, BLOCK)
    top = tl.full([queries[0].shape[0]], FLOOR, tl.float32)
    denominator = tl.zeros([queries[0].shape[0]], tl.float32)
    acc = [tl.zeros(part.shape, tl.float32) for part in queries]
    nothing = tl.zeros([top.shape[0], BLOCK], tl.float32)
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
        scores = products(queries, keys, nothing)
        if QUANTIZED:
            v_scales = tl.load(v_scale + row, mask=live, other=0.0)
            k_scales = tl.load(k_scale + row, mask=live, other=0.0)
            scores *= (v_scales if LATENT else k_scales)[None, :]
        if R > 0:
            turned = load_rows(k_pages + D, row, live, rest, R, D + R)
            if QUANTIZED:
                scores += products(rest, turned, nothing) * k_scales[None, :]
            else:
                scores = products(rest, turned, scores)
        scores = tl.where(live[None, :], scores * SCALE, DEAD)
        if SCORES:
            target = scores_out + (head * G + rows).to(tl.int64)[:, None] * (PAGES * PAGE) + slot[None, :]
            tl.store(target, scores, mask=(rows < G)[:, None] & live[None, :])
        # float16 holds weights times scales where those are about 1 at most.
        largest = scores + about_log2(v_scales)[None, :] if QUANTIZED else scores
        higher = tl.maximum(top, tl.max(largest, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        denominator = denominator * shrink + tl.sum(weights, 1)
        values = keys if LATENT else load_rows(v_pages, row, live, queries, D, D)
        if QUANTIZED:
            weights *= v_scales[None, :]
        acc = accumulated(acc, weights.to(queries[0].dtype), values, shrink)
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
    return higher, denominator * shrink + weight, (acc,)


@triton.jit
def splits_of(tile_ends, head, programs, HEADS: tl.constexpr):
    """The first of the programs that share a head, and how many they are."""
    total = tl.load(tile_ends + HEADS - 1).to(tl.int64)
    before = tl.load(tile_ends + head - 1, mask=head > 0, other=0).to(tl.int64)
    after = tl.load(tile_ends + head).to(tl.int64)
    programs = busy(programs, total)
    # Tile t belongs to the program w with w * total // programs <= t < (w + 1) * total // programs.
    first_program = ((before + 1) * programs - 1) // total
    return first_program, ((after * programs - 1) // total - first_program + 1).to(tl.int32)


@triton.jit
def store_attended(
    out, lse, head, rows, dims, top, denominator, acc,
    G: tl.constexpr, D: tl.constexpr, LN2: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Writes the attention of some query heads of a KV head, and with LSE the logarithm of their sums."""
    empty = denominator == 0
    total = tl.where(empty, 1.0, denominator)
    target = (head * G + rows).to(tl.int64)
    mask = (rows < G)[:, None] & (dims < D)[None, :]
    tl.store(
        out + target[:, None] * D + dims[None, :], (acc * (1 / total)[:, None]).to(out.dtype.element_ty), mask=mask
    )
    if LSE:
        log = (top + tl.log2(total)) * LN2
        tl.store(lse + target, tl.where(empty, float("-inf"), log), mask=rows < G)


@triton.jit
def merge(
    acc_in, top_in, sum_in, tile_ends, head, rows, programs, out, lse,
    HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, CHUNK: tl.constexpr, LN2: tl.constexpr,
):  # fmt: skip
    """Merges the splits of some query heads of a KV head in program order; they lie side by side, at program + head."""
    first_program, count = splits_of(tile_ends, head, programs, HEADS)
    dims = tl.arange(0, D_PAD)
    within = tl.arange(0, CHUNK)
    top = tl.full(rows.shape, FLOOR, tl.float32)
    denominator = tl.zeros(rows.shape, tl.float32)
    acc = tl.zeros([rows.shape[0], D_PAD], tl.float32)
    for done in range(0, count, CHUNK):
        valid = (done + within < count)[:, None] & (rows < G)[None, :]
        index = (first_program + head + done + within)[:, None] * G + rows[None, :]
        tops = tl.load(top_in + index, mask=valid, other=DEAD)
        sums = tl.load(sum_in + index, mask=valid, other=0.0)
        mask = valid[:, :, None] & (dims < D)[None, None, :]
        accs = tl.load(acc_in + index[:, :, None] * D + dims[None, None, :], mask=mask, other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        factors = tl.exp2(tops - higher[None, :])
        shrink = tl.exp2(top - higher)
        denominator = denominator * shrink + tl.sum(sums * factors, 0)
        acc = acc * shrink[:, None] + tl.sum(accs * factors[:, :, None], 0)
        top = higher
    store_attended(out, lse, head, rows, dims, top, denominator, acc, G, D, LN2, True)


@triton.jit
def split_kv(
    inputs, k_pages, v_pages, table, lengths, spans, tile_ends, order, k_scale, v_scale, new_slots, first, counters,
    acc_out, top_out, sum_out, scores_out, out, lse, k_out, v_out,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, K: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, ORDERED: tl.constexpr, SCORES: tl.constexpr,
    WRITE: tl.constexpr, LATENT: tl.constexpr, SLOTS_OF_ALL: tl.constexpr, LAYERS: tl.constexpr,
    MERGE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, LN2: tl.constexpr,
):  # fmt: skip
    """Attention over this program's share of the tiles, one split for each head that it touches.

    `inputs [B, H, D + R]` are the queries; with WRITE new keys and, unless LATENT, values follow as K more heads each.
    "head" is a KV head of a sequence, `b * K + k`. Table, lengths, spans and tile_ends hold those of all LAYERS, this
    layer's from `first` on, and so does new_slots with SLOTS_OF_ALL: a head's place among them is `place`. `spans` is
    how many tokens of a head are walked over: its length, or with ORDERED the whole pages that `order` lists.
    `tile_ends` counts the tiles up to each head's last; every head has one, be it empty. A value has D numbers, a key
    D + R. With MERGE the last of a head's programs to be counted merges its splits; `counters` are 0 before a launch
    and after it.
    """
    INPUTS: tl.constexpr = K * G + (0 if not WRITE else K if LATENT else 2 * K)  # heads
    program = tl.program_id(1)
    first = tl.load(first) if LAYERS > 1 else 0
    head, tile, left = share_of(tile_ends + first, program, tl.num_programs(1), HEADS, HEADS_PAD)
    if WRITE:  # an aliased pool is at hand as the output
        k_pages = k_out
        v_pages = v_out
    rows = tl.program_id(0) * G_PAD + tl.arange(0, G_PAD)
    while left > 0:
        place = first + head
        pages = place * PAGES
        length = tl.load(lengths + place)
        span = tl.load(spans + place)
        stop = tl.minimum(tl.maximum(tl.cdiv(span, BLOCK), 1), tile + left)
        q_rows = inputs + (head // K * INPUTS + head % K * G + rows) * (D + R)
        queries = load_queries(q_rows, rows < G, D, D_PAD, PARTS)
        rest = load_queries(q_rows + D, rows < G, R, R_PAD, PARTS)
        new_slot = tl.load(new_slots + (place if SLOTS_OF_ALL else head)) if WRITE else -1
        # The tiles are shared out, so the program whose tile holds the slot is the only one to write it.
        writes = (new_slot >= tile * BLOCK) & (new_slot < stop * BLOCK) & (new_slot < length)
        if WRITE:  # asked for before the tiles, so that nothing waits for it afterwards
            key_row = inputs + (head // K * INPUTS + K * G + head % K) * (D + R)
            row, key, turned, value = load_new(
                new_slot, writes, key_row, key_row + K * D, table + pages, queries[0], rest[0], k_out, v_out,
                PAGE, D, R, LATENT,
            )  # fmt: skip
        top, denominator, acc = attend_tiles(
            queries, rest, rows, head, tile, stop, length, span, new_slot, k_pages, v_pages, table + pages,
            order + pages, k_scale, v_scale, scores_out,
            PAGES, PAGE, G, D, R, BLOCK, SCALE, ORDERED, SCORES, WRITE, LATENT,
        )  # fmt: skip
        if WRITE:  # noqa: SIM102 (known when compiled; what follows is not)
            if writes:
                top, denominator, acc = write_and_attend(
                    top, denominator, acc[0], queries[0], rest[0], rows, head, new_slot, row, key, turned, value,
                    k_out, v_out, scores_out, PAGES, PAGE, G, D, R, SCALE, SCORES, LATENT,
                )  # fmt: skip
        splits = splits_of(tile_ends + first, head, tl.num_programs(1), HEADS)[1] if MERGE else 2
        if splits == 1:
            for part in tl.static_range(PARTS):
                dims = places(part, D_PAD, PARTS)
                store_attended(out, lse, head, rows, dims, top, denominator, acc[part], G, D, LN2, part == 0)
        else:
            index = (program + head).to(tl.int64) * G + rows
            tl.store(top_out + index, top, mask=rows < G)
            tl.store(sum_out + index, denominator, mask=rows < G)
            for part in tl.static_range(PARTS):
                dims = places(part, D_PAD, PARTS)
                mask = (rows < G)[:, None] & (dims < D)[None, :]
                tl.store(acc_out + index[:, None] * D + dims[None, :], acc[part], mask=mask)
            if MERGE:
                tl.debug_barrier()  # every thread has stored its part before the program is counted
                if tl.atomic_add(counters + head, 1, sem="acq_rel") == splits - 1:
                    for own in range(0, G, ROWS):
                        merge(
                            acc_out, top_out, sum_out, tile_ends + first, head, own + tl.arange(0, ROWS),
                            tl.num_programs(1), out, lse, HEADS, G, D, D_PAD, CHUNK, LN2,
                        )  # fmt: skip
                    tl.store(counters + head, 0)
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
    """Merges the splits of one query head, in a launch of its own."""
    rows = tl.program_id(1) + tl.arange(0, 1)
    tile_ends += tl.load(first)
    merge(
        acc_in, top_in, sum_in, tile_ends, tl.program_id(0), rows, PROGRAMS, out, lse, HEADS, G, D, D_PAD, CHUNK, LN2
    )  # fmt: skip
