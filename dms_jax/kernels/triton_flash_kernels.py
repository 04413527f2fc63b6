"""The kernels of delayed-eviction flash attention; `triton_flash` explains and launches them.

Scores are in base 2 throughout: `SCALE` holds D ** -0.5 * log2(e). Sizes in capitals are known when compiled.
"""

import math

import triton
import triton.language as tl

DEAD = tl.constexpr(-1e30)  # score of a key that is not seen
FLOOR = tl.constexpr(-1e29)  # where the running maximum starts: exp2(DEAD - FLOOR) is exactly 0
NOTHING_SEEN = tl.constexpr(1e30)  # log-sum-exp of a query that sees no key: makes its weights 0 in the backward pass
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def exp2(x):
    """`tl.exp2` in one instruction, which makes tiny results 0. XLA's takes four."""
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def classify(
    q_low, q_high, q_seg_low, q_seg_high, k_low, k_high, k_seg_low, k_seg_high, k_first, k_kept,
    WINDOW: tl.constexpr, HARD: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Whether a pair of tiles matters, whether it needs no masks, and whether it is far; one side is a vector."""
    matters = k_low <= q_high
    far = q_low - k_high > WINDOW
    if HARD:
        matters = matters & ((k_kept <= q_high) | ~far)
    plain = (k_first >= 0) & (k_high <= q_low) & (far | (q_high - k_low <= WINDOW))
    if SEGMENTS:
        matters = matters & (k_seg_low <= q_seg_high) & (q_seg_low <= k_seg_high)
        one_segment = (k_seg_low == k_seg_high) & (q_seg_low == q_seg_high) & (k_seg_low == q_seg_low)
        plain = plain & one_segment
    return matters, plain & matters, far


@triton.jit
def bits_of(which, lanes):
    """A vector of 64 bools as the bits of an int64."""
    return tl.sum(which.to(tl.int64) << lanes, 0)


@triton.jit
def classify_keys(
    q_bounds, k_bounds, q_tile, first,
    Q_TILES: tl.constexpr, K_TILES: tl.constexpr, WINDOW: tl.constexpr, HARD: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The classes of 64 tiles of keys from `first` on for a tile of queries.

    Returns the bits of those that need no masks, of those that do, and of those that are far; and the number of each
    of the first two.
    """
    lanes = tl.arange(0, 64)
    queries, keys = q_bounds + q_tile, k_bounds + first + lanes
    matters, plain, far = classify(
        tl.load(queries), tl.load(queries + Q_TILES), tl.load(queries + 2 * Q_TILES), tl.load(queries + 3 * Q_TILES),
        tl.load(keys), tl.load(keys + K_TILES), tl.load(keys + 2 * K_TILES), tl.load(keys + 3 * K_TILES),
        tl.load(keys + 4 * K_TILES), tl.load(keys + 5 * K_TILES), WINDOW, HARD, SEGMENTS,
    )  # fmt: skip
    mixed = matters & ~plain
    counts = tl.sum(plain.to(tl.int32), 0), tl.sum(mixed.to(tl.int32), 0)
    return bits_of(plain, lanes), bits_of(mixed, lanes), bits_of(far, lanes), counts[0], counts[1]


@triton.jit
def lowest(bits):
    """Index of the lowest bit that is set, read off the exponent of that power of two as a float."""
    power = (bits & -bits).to(tl.float32)
    return ((power.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def load_rows(base, rows, dims, limit, STRIDE: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """`[rows, D_PAD]` of a `[tokens, ..., D]` array; 0 past `limit` tokens (where MASKED) and past D."""
    pointers = base + rows[:, None] * STRIDE + dims[None, :]
    if MASKED:
        return tl.load(pointers, mask=(rows < limit)[:, None] & (dims < D)[None, :], other=0.0)
    return tl.load(pointers, mask=(dims < D)[None, :], other=0.0)


@triton.jit
def masked_scores(products, distance, bias, there, SCALE: tl.constexpr, WINDOW: tl.constexpr):
    """Base-2 scores with the delayed bias, DEAD where the key is not seen; and where the bias was added."""
    far = distance > WINDOW
    return tl.where(there & (distance >= 0), tl.fma(products, SCALE, tl.where(far, bias, 0.0)), DEAD), far


@triton.jit
def biased(
    products, cols, far_share, q_pos, q_seg, key_pos, log_keep_prob, key_seg,
    S: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores `[BM, BN]` of the keys `cols`, masked; where plain, log_keep_prob times far_share (0 or 1) is added."""
    if MASKED:
        k_pos = tl.load(key_pos + cols, mask=cols < S, other=-1)
        bias = tl.load(log_keep_prob + cols, mask=cols < S, other=0.0) * LOG2E
        there = (k_pos >= 0)[None, :]
        if SEGMENTS:
            there = there & (q_seg[:, None] == tl.load(key_seg + cols, mask=cols < S, other=0)[None, :])
        distance = q_pos[:, None] - k_pos[None, :]
        scores, _far = masked_scores(products, distance, bias[None, :], there, SCALE, WINDOW)
    else:
        scores = tl.fma(products, SCALE, (tl.load(log_keep_prob + cols) * (LOG2E * far_share))[None, :])
    return scores


@triton.jit
def forward_tiles(
    bits, fars, count, first_tile, acc, top, denominator, queries, q_pos, q_seg,
    k, v, key_pos, log_keep_prob, key_seg,
    S: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax over the tiles of keys whose bits are set."""
    dims = tl.arange(0, queries.shape[1])
    for _ in range(count):
        lane = lowest(bits)
        bits = bits & (bits - 1)
        cols = (first_tile + lane) * BN + tl.arange(0, BN)
        keys = load_rows(k, cols, dims, S, STRIDE, D, MASKED)
        far_share = ((fars >> lane) & 1).to(tl.float32)
        products = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        scores = biased(
            products, cols, far_share, q_pos, q_seg, key_pos, log_keep_prob, key_seg, S, SCALE, WINDOW, SEGMENTS, MASKED
        )
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = exp2(scores - higher[:, None])
        shrink = exp2(top - higher)
        denominator = denominator * shrink + tl.sum(weights, 1)
        values = load_rows(v, cols, dims, S, STRIDE, D, MASKED)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        top = higher
    return acc, top, denominator


@triton.jit
def forward(
    q, k, v, query_pos, key_pos, log_keep_prob, query_seg, key_seg, q_bounds, k_bounds,
    out, lse,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, Q_TILES: tl.constexpr, K_TILES: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, HARD: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one query head. The last tiles have most to do and start first."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    kv_head = b * K + h // (H // K)
    q_row, k_row = b.to(tl.int64) * T, b.to(tl.int64) * S
    rows = tile * BM + tl.arange(0, BM)
    dims = tl.arange(0, D_PAD)
    queries = load_rows(q + q_row * H * D + h * D, rows, dims, T, H * D, D, True)
    q_pos = tl.load(query_pos + q_row + rows, mask=rows < T, other=-1)
    q_seg = tl.load(query_seg + q_row + rows, mask=rows < T, other=0) if SEGMENTS else q_pos
    k += (k_row * K + h // (H // K)) * D
    v += (k_row * K + h // (H // K)) * D
    key_pos += kv_head.to(tl.int64) * S
    log_keep_prob += kv_head.to(tl.int64) * S
    key_seg += kv_head.to(tl.int64) * S if SEGMENTS else 0
    q_bounds += b * 4 * Q_TILES
    k_bounds += kv_head * 6 * K_TILES
    top = tl.full([BM], FLOOR, tl.float32)
    denominator = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D_PAD], tl.float32)
    for first in range(0, K_TILES, 64):
        plain_bits, mixed_bits, fars, plains, mixed = classify_keys(
            q_bounds, k_bounds, tile, first, Q_TILES, K_TILES, WINDOW, HARD, SEGMENTS
        )
        acc, top, denominator = forward_tiles(
            plain_bits, fars, plains, first, acc, top, denominator, queries, q_pos, q_seg,
            k, v, key_pos, log_keep_prob, key_seg, S, K * D, D, BN, SCALE, WINDOW, SEGMENTS, False,
        )  # fmt: skip
        acc, top, denominator = forward_tiles(
            mixed_bits, fars, mixed, first, acc, top, denominator, queries, q_pos, q_seg,
            k, v, key_pos, log_keep_prob, key_seg, S, K * D, D, BN, SCALE, WINDOW, SEGMENTS, True,
        )  # fmt: skip
    empty = denominator == 0
    denominator = tl.where(empty, 1.0, denominator)
    acc = acc / denominator[:, None]
    mask = (rows < T)[:, None] & (dims < D)[None, :]
    out += q_row * H * D + h * D
    tl.store(out + rows[:, None] * (H * D) + dims[None, :], acc.to(out.dtype.element_ty), mask=mask)
    log = tl.where(empty, NOTHING_SEEN, top + tl.log2(denominator))
    tl.store(lse + (b.to(tl.int64) * H + h) * T + rows, log, mask=rows < T)


@triton.jit
def key_gradient_tiles(
    bits, fars, count, first_tile, dk, dv, dbias, keys, values, k_pos, bias, k_seg,
    q, dout, lse, delta, query_pos, query_seg,
    T: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the tiles of queries whose bits are set give to the gradients of a tile of keys, for all G heads.

    Everything is transposed: scores are `[BN, BM]`.
    """
    dims = tl.arange(0, keys.shape[1])
    left = bits
    g = 0
    for _ in range(count * G):
        lane = lowest(left)
        rows = (first_tile + lane) * BM + tl.arange(0, BM)
        inside = rows < T
        queries = load_rows(q + g * D, rows, dims, T, STRIDE, D, T % BM != 0)
        products = tl.dot(keys, tl.trans(queries), input_precision="ieee")
        far_share = ((fars >> lane) & 1).to(tl.float32)
        far = tl.full([1, 1], 1, tl.int1)
        if MASKED:
            distance = tl.load(query_pos + rows, mask=inside, other=-1)[None, :] - k_pos[:, None]
            there = (k_pos >= 0)[:, None]
            if SEGMENTS:
                there = there & (tl.load(query_seg + rows, mask=inside, other=0)[None, :] == k_seg[:, None])
            scores, far = masked_scores(products, distance, bias[:, None], there, SCALE, WINDOW)
        else:
            scores = tl.fma(products, SCALE, (bias * far_share)[:, None])
        weights = exp2(scores - tl.load(lse + g * T + rows, mask=inside, other=NOTHING_SEEN)[None, :])
        douts = load_rows(dout + g * D, rows, dims, T, STRIDE, D, T % BM != 0)
        dv = tl.dot(weights.to(douts.dtype), douts, dv, input_precision="ieee")
        dscores = tl.dot(values, tl.trans(douts), input_precision="ieee")
        dscores = weights * (dscores - tl.load(delta + g * T + rows, mask=inside, other=0.0)[None, :])
        if MASKED:
            dbias += tl.sum(tl.where(far, dscores, 0.0), 1)
        else:
            dbias += tl.sum(dscores, 1) * far_share
        dk = tl.dot(dscores.to(queries.dtype), queries, dk, input_precision="ieee")
        left = left & (left - 1)
        g += (left == 0).to(tl.int32)  # the tiles are through for this head: once more for the next
        left = tl.where(left == 0, bits, left)
    return dk, dv, dbias


@triton.jit
def key_gradients(
    q, k, v, query_pos, key_pos, log_keep_prob, query_seg, key_seg, q_bounds, k_bounds, dout, lse, delta,
    dk_out, dv_out, dbias_out,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, Q_TILES: tl.constexpr, K_TILES: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, HARD: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """dk, dv and dlog_keep_prob of one tile of keys of one KV head, over all queries of its G query heads."""
    b, kv = tl.program_id(0) // K, tl.program_id(0) % K
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    G: tl.constexpr = H // K
    q_row, k_row = b.to(tl.int64) * T, b.to(tl.int64) * S
    cols = tile * BN + tl.arange(0, BN)
    dims = tl.arange(0, D_PAD)
    keys = load_rows(k + (k_row * K + kv) * D, cols, dims, S, K * D, D, True)
    values = load_rows(v + (k_row * K + kv) * D, cols, dims, S, K * D, D, True)
    k_at = kv_head.to(tl.int64) * S + cols
    k_pos = tl.load(key_pos + k_at, mask=cols < S, other=-1)
    bias = tl.load(log_keep_prob + k_at, mask=cols < S, other=0.0) * LOG2E
    k_seg = tl.load(key_seg + k_at, mask=cols < S, other=0) if SEGMENTS else k_pos
    q += (q_row * H + kv * G) * D
    dout += (q_row * H + kv * G) * D
    lse += (b.to(tl.int64) * H + kv * G) * T
    delta += (b.to(tl.int64) * H + kv * G) * T
    query_pos += q_row
    query_seg += q_row if SEGMENTS else 0
    k_bounds += kv_head * 6 * K_TILES + tile
    k_low, k_high = tl.load(k_bounds), tl.load(k_bounds + K_TILES)
    k_seg_low, k_seg_high = tl.load(k_bounds + 2 * K_TILES), tl.load(k_bounds + 3 * K_TILES)
    k_first, k_kept = tl.load(k_bounds + 4 * K_TILES), tl.load(k_bounds + 5 * K_TILES)
    dk = tl.zeros([BN, D_PAD], tl.float32)
    dv = tl.zeros([BN, D_PAD], tl.float32)
    dbias = tl.zeros([BN], tl.float32)
    lanes = tl.arange(0, 64)
    for first in range(0, Q_TILES, 64):
        bounds = q_bounds + b * 4 * Q_TILES + first + lanes
        matters, plain, far = classify(
            tl.load(bounds), tl.load(bounds + Q_TILES), tl.load(bounds + 2 * Q_TILES), tl.load(bounds + 3 * Q_TILES),
            k_low, k_high, k_seg_low, k_seg_high, k_first, k_kept, WINDOW, HARD, SEGMENTS,
        )  # fmt: skip
        plain_bits, mixed_bits, fars = bits_of(plain, lanes), bits_of(matters & ~plain, lanes), bits_of(far, lanes)
        plains, all_tiles = tl.sum(plain.to(tl.int32), 0), tl.sum(matters.to(tl.int32), 0)
        dk, dv, dbias = key_gradient_tiles(
            mixed_bits, fars, all_tiles - plains, first, dk, dv, dbias, keys, values, k_pos, bias, k_seg,
            q, dout, lse, delta, query_pos, query_seg, T, H * D, D, G, BM, SCALE, WINDOW, SEGMENTS, True,
        )  # fmt: skip
        dk, dv, dbias = key_gradient_tiles(
            plain_bits, fars, plains, first, dk, dv, dbias, keys, values, k_pos, bias, k_seg,
            q, dout, lse, delta, query_pos, query_seg, T, H * D, D, G, BM, SCALE, WINDOW, SEGMENTS, False,
        )  # fmt: skip
    mask = (cols < S)[:, None] & (dims < D)[None, :]
    target = (k_row * K + kv) * D + cols[:, None] * (K * D) + dims[None, :]
    tl.store(dk_out + target, (dk * (SCALE / LOG2E)).to(dk_out.dtype.element_ty), mask=mask)
    tl.store(dv_out + target, dv.to(dv_out.dtype.element_ty), mask=mask)
    tl.store(dbias_out + k_at, dbias, mask=cols < S)


@triton.jit
def query_gradient_tiles(
    bits, fars, count, first_tile, dq, queries, douts, lse, delta, q_pos, q_seg,
    k, v, key_pos, log_keep_prob, key_seg,
    S: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the tiles of keys whose bits are set give to the gradient of a tile of queries."""
    dims = tl.arange(0, queries.shape[1])
    for _ in range(count):
        lane = lowest(bits)
        bits = bits & (bits - 1)
        cols = (first_tile + lane) * BN + tl.arange(0, BN)
        keys = load_rows(k, cols, dims, S, STRIDE, D, MASKED)
        far_share = ((fars >> lane) & 1).to(tl.float32)
        products = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        scores = biased(
            products, cols, far_share, q_pos, q_seg, key_pos, log_keep_prob, key_seg, S, SCALE, WINDOW, SEGMENTS, MASKED
        )
        weights = exp2(scores - lse[:, None])
        values = load_rows(v, cols, dims, S, STRIDE, D, MASKED)
        dscores = weights * (tl.dot(douts, tl.trans(values), input_precision="ieee") - delta[:, None])
        dq = tl.dot(dscores.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit
def query_gradients(
    q, k, v, query_pos, key_pos, log_keep_prob, query_seg, key_seg, q_bounds, k_bounds, dout, lse, delta,
    dq_out,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, Q_TILES: tl.constexpr, K_TILES: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, HARD: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one query head."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    kv_head = b * K + h // (H // K)
    q_row, k_row = b.to(tl.int64) * T, b.to(tl.int64) * S
    rows = tile * BM + tl.arange(0, BM)
    dims = tl.arange(0, D_PAD)
    queries = load_rows(q + q_row * H * D + h * D, rows, dims, T, H * D, D, True)
    douts = load_rows(dout + q_row * H * D + h * D, rows, dims, T, H * D, D, True)
    at = (b.to(tl.int64) * H + h) * T + rows
    logs = tl.load(lse + at, mask=rows < T, other=NOTHING_SEEN)
    deltas = tl.load(delta + at, mask=rows < T, other=0.0)
    q_pos = tl.load(query_pos + q_row + rows, mask=rows < T, other=-1)
    q_seg = tl.load(query_seg + q_row + rows, mask=rows < T, other=0) if SEGMENTS else q_pos
    k += (k_row * K + h // (H // K)) * D
    v += (k_row * K + h // (H // K)) * D
    key_pos += kv_head.to(tl.int64) * S
    log_keep_prob += kv_head.to(tl.int64) * S
    key_seg += kv_head.to(tl.int64) * S if SEGMENTS else 0
    q_bounds += b * 4 * Q_TILES
    k_bounds += kv_head * 6 * K_TILES
    dq = tl.zeros([BM, D_PAD], tl.float32)
    for first in range(0, K_TILES, 64):
        plain_bits, mixed_bits, fars, plains, mixed = classify_keys(
            q_bounds, k_bounds, tile, first, Q_TILES, K_TILES, WINDOW, HARD, SEGMENTS
        )
        dq = query_gradient_tiles(
            plain_bits, fars, plains, first, dq, queries, douts, logs, deltas, q_pos, q_seg,
            k, v, key_pos, log_keep_prob, key_seg, S, K * D, D, BN, SCALE, WINDOW, SEGMENTS, False,
        )  # fmt: skip
        dq = query_gradient_tiles(
            mixed_bits, fars, mixed, first, dq, queries, douts, logs, deltas, q_pos, q_seg,
            k, v, key_pos, log_keep_prob, key_seg, S, K * D, D, BN, SCALE, WINDOW, SEGMENTS, True,
        )  # fmt: skip
    mask = (rows < T)[:, None] & (dims < D)[None, :]
    target = q_row * H * D + h * D + rows[:, None] * (H * D) + dims[None, :]
    tl.store(dq_out + target, (dq * (SCALE / LOG2E)).to(dq_out.dtype.element_ty), mask=mask)
