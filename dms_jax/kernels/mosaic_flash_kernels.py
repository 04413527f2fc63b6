"""The kernels of `mosaic_flash` for Hopper, in Pallas (Mosaic GPU); `mosaic_flash` explains and launches them.

A program has three warpgroups: two compute, each 64 rows of the tile that stays, and one fetches the tiles that pass by
(TMA), `stages` of them ahead. While one of the two is at its softmax the other has the tensor cores. Scores are in base
2: they are multiplied by D ** -0.5 * log2(e), and the biases by log2(e).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]

from dms_jax.kernels.launch import LOG2E

DEAD = -1e30  # score of a key that is not seen
FLOOR = -1e29  # where the running maximum starts: exp2(DEAD - FLOOR) is exactly 0
NOTHING_SEEN = 1e30  # log-sum-exp of a query that sees no key: makes its weights 0 in the backward pass

GROUPS = 2  # warpgroups that compute
ROWS = 64  # of each: what one wgmma instruction multiplies
REGISTERS, FETCHER_REGISTERS = 240, 24  # 2 * 240 + 24 of the 512 that a thread of each warpgroup could have together
VARIES_ALONG = (plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0))  # of a vector: rows, columns


class Shape(NamedTuple):
    """What is known when a kernel is compiled; `tile`: rows of a tile that passes by."""

    T: int
    S: int
    H: int
    K: int
    D: int
    window: int
    segments: bool
    tile: int
    stages: int

    @property
    def group(self) -> int:
        return self.H // self.K

    @property
    def scale(self) -> float:
        return self.D**-0.5 * LOG2E


class Inputs(NamedTuple):
    """In the GPU's memory. `entries` and `counts` are the `tiles.Plan`; bias: `[B, K, S]` and a tile of 0."""

    q: Any
    k: Any
    v: Any
    query_pos: Any
    key_pos: Any
    query_segments: Any
    key_segments: Any
    bias: Any
    entries: Any
    counts: Any


class Passing(NamedTuple):
    """`stages` buffers for two tiles that pass by, each with a vector; which are full, and which may be filled."""

    first: Any
    second: Any
    first_vector: Any
    second_vector: Any
    first_full: Any
    second_full: Any
    first_free: Any
    second_free: Any


def zeros(*shape: int) -> jax.Array:
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else VARIES_ALONG[0]
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def spread(vector: jax.Array, axis: int, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, [axis])


def from_memory(ref, axis: int) -> jax.Array:
    """A vector from the GPU's memory, in registers as rows (axis 0) or columns (1) of scores lie."""
    return plgpu.load(ref, layout=VARIES_ALONG[axis], optimized=False)


def multiply_add(*products: tuple, meanwhile: Callable[[], None] = lambda: None) -> tuple:
    """`acc + a @ b` of each `(acc, a, b)`; `meanwhile` is called when all were started."""

    def run(refs):
        for ref, (_, a, b) in zip(refs, products, strict=True):
            plgpu.wgmma(ref, a, b)
        meanwhile()

    return pl.run_state(run)(tuple(ACC.init(acc) for acc, _, _ in products))


def masks(shape: Shape, x: Inputs, where: tuple, scores: tuple[int, int], query_axis: int) -> tuple:
    """Which scores are seen, and which lie beyond the window; where: b, KV head, queries and keys as slices."""
    b, kv, queries, keys = where
    key_axis = 1 - query_axis
    query_pos = spread(from_memory(x.query_pos.at[b, queries], query_axis), query_axis, scores)
    distance = query_pos - spread(from_memory(x.key_pos.at[b, kv, keys], key_axis), key_axis, scores)
    seen = distance >= 0
    if shape.segments:
        query_segments = spread(from_memory(x.query_segments.at[b, queries], query_axis), query_axis, scores)
        seen &= query_segments == spread(from_memory(x.key_segments.at[b, kv, keys], key_axis), key_axis, scores)
    return seen, distance > shape.window


def biased(scores: jax.Array, bias: jax.Array, seen_far: tuple | None) -> jax.Array:
    if seen_far is None:
        return scores + bias
    seen, far = seen_far
    return jnp.where(seen, scores + jnp.where(far, bias, 0.0), DEAD)


def entry(x: Inputs, shape: Shape, at: tuple) -> tuple:
    """Of the tile that comes at `at` (b, KV head, tile that stays, place): its slice, its number, whether it is far."""
    code = x.entries[at]
    number = lax.shift_right_logical(code, jnp.int32(1))
    return pl.ds(number * shape.tile, shape.tile), number, code & 1


def over_tiles(step: Callable, plain, count, carry):
    """`step(place, carry, masked)` over the tiles that need no masks, then over those that do."""
    carry = lax.fori_loop(0, plain, functools.partial(step, masked=False), carry)
    return lax.fori_loop(plain, count, functools.partial(step, masked=True), carry)


def fetch(shape: Shape, count, passing: Passing, copy_first: Callable, copy_second: Callable) -> None:
    """Keeps the buffers full; `copy_first(place, slot)` starts two copies that report to `first_full[slot]`."""
    sides = ((copy_first, passing.first_free), (copy_second, passing.second_free))

    def fill(place, wait: bool):
        slot = lax.rem(place, jnp.int32(shape.stages))
        for copy, free in sides:
            if wait:
                plgpu.barrier_wait(free.at[slot])
            copy(place, slot)

    def drain(slot):
        for _, free in sides:
            plgpu.barrier_wait(free.at[slot])

    for place in range(shape.stages):
        pl.when(place < count)(functools.partial(fill, jnp.int32(place), wait=False))
    pl.loop(jnp.int32(shape.stages), jnp.maximum(count, shape.stages))(functools.partial(fill, wait=True))
    for slot in range(shape.stages):
        pl.when(slot < count)(functools.partial(drain, slot))


def fetch_keys(shape: Shape, x: Inputs, passing: Passing, at: tuple, plain, count) -> None:
    """Keys with their biases, and values. A tile that is near and needs no masks comes with the tile of zeros."""
    b, kv = at[:2]

    def copy_keys(place, slot):
        keys, number, far = entry(x, shape, (*at, place))
        number = jnp.where((place < plain) & (far == 0), shape.S // shape.tile, number)
        bias = x.bias.at[b, kv, pl.ds(number * shape.tile, shape.tile)]
        plgpu.copy_gmem_to_smem(x.k.at[b, keys, kv], passing.first.at[slot], passing.first_full.at[slot])
        plgpu.copy_gmem_to_smem(bias, passing.first_vector.at[slot], passing.first_full.at[slot])

    def copy_values(place, slot):
        keys, _, _ = entry(x, shape, (*at, place))
        plgpu.copy_gmem_to_smem(x.v.at[b, keys, kv], passing.second.at[slot], passing.second_full.at[slot])

    fetch(shape, count, passing, copy_keys, copy_values)


def query_program(shape: Shape, x: Inputs) -> tuple:
    """`(b, KV head, tile)` of this program, its query head, and how many tiles come plain and in all.

    The last tiles have most to do and start first.
    """
    head, b = lax.axis_index("head"), lax.axis_index("batch")
    tile = shape.T // (GROUPS * ROWS) - 1 - lax.axis_index("tile")
    at = b, lax.div(head, jnp.int32(shape.group)), tile
    return at, head, x.counts[(*at, 0)], x.counts[(*at, 1)]


def forward(shape: Shape, *refs) -> None:
    """One tile of queries of one query head; keys and values pass by."""
    x, (out, lse, queries, passing, ready, turn) = Inputs(*refs[:10]), refs[10:]
    at, head, plain, count = query_program(shape, x)
    group = lax.axis_index("group")

    @pl.when(group < GROUPS)
    def compute():
        plgpu.set_max_registers(REGISTERS, action="increase")
        forward_rows(shape, x, (at, head, plain, count), (out, lse), (queries, passing, ready, turn))

    @pl.when(group == GROUPS)
    def fetcher():
        plgpu.set_max_registers(FETCHER_REGISTERS, action="decrease")
        fetch_keys(shape, x, passing, at, plain, count)


def forward_rows(shape: Shape, x: Inputs, program: tuple, outputs: tuple, buffers: tuple) -> None:
    """What one warpgroup computes: the online softmax. The two take turns at the tensor cores."""
    (at, head, plain, count), (out, lse) = program, outputs
    group, (b, kv, tile) = lax.axis_index("group"), at
    queries, passing, ready, turn = buffers[0].at[group], *buffers[1:]
    rows = pl.ds((tile * GROUPS + group) * ROWS, ROWS)
    plgpu.copy_gmem_to_smem(x.q.at[b, rows, head], queries, ready.at[group])
    plgpu.barrier_wait(ready.at[group])

    def switch():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def await_keys(place):
        full = passing.first_full.at[lax.rem(place, jnp.int32(shape.stages))]
        pl.when(place < count)(lambda: plgpu.barrier_wait(full))

    def step(place, carry, masked):
        acc, top, total = carry
        slot = lax.rem(place, jnp.int32(shape.stages))

        def products(ref):
            plgpu.wgmma(ref, queries, passing.first.at[slot].transpose((1, 0)))
            switch()
            return ref[...]

        scores = pl.run_scoped(products, ACC((ROWS, shape.tile), jnp.float32))
        bias = plgpu.load(passing.first_vector.at[slot], layout=VARIES_ALONG[1])
        plgpu.barrier_arrive(passing.first_free.at[slot])
        keys, _, _ = entry(x, shape, (*at, place))
        seen_far = masks(shape, x, (b, kv, rows, keys), scores.shape, 0) if masked else None
        scores = biased(scores * shape.scale, spread(bias, 1, scores.shape), seen_far)
        higher = jnp.maximum(top, scores.max(axis=1))
        shrink = jnp.exp2(top - higher)
        weights = jnp.exp2(scores - spread(higher, 0, scores.shape))
        acc *= spread(shrink, 0, acc.shape)
        total = total * shrink + weights.sum(axis=1)
        # Nothing of the softmax is to be moved past the barriers, or this warpgroup holds up the other.
        acc, total, higher, weights = lax.optimization_barrier((acc, total, higher, weights.astype(x.q.dtype)))
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(passing.second_full.at[slot])
        plgpu.barrier_wait(turn)
        values = passing.second.at[slot]
        (acc,) = multiply_add((acc, weights, values), meanwhile=functools.partial(await_keys, place + 1))
        plgpu.barrier_arrive(passing.second_free.at[slot])
        return acc, higher, total

    await_keys(jnp.int32(0))
    pl.when(group == 1)(switch)
    start = zeros(ROWS, shape.D), zeros(ROWS) + FLOOR, zeros(ROWS)
    acc, top, total = over_tiles(step, plain, count, start)
    pl.when(group == 0)(switch)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    lse.at[b, head, rows][...] = jnp.where(empty, NOTHING_SEEN, top + jnp.log2(total))
    store_rows((acc * spread(1 / total, 0, acc.shape), queries, out.at[b, rows, head]))


def store_rows(*results: tuple) -> None:
    """Writes each `(rows, buffer, target)` to the GPU's memory."""
    for rows, buffer, _ in results:
        buffer[...] = rows.astype(buffer.dtype)
    plgpu.commit_smem()
    for _, buffer, target in results:
        plgpu.copy_smem_to_gmem(buffer, target)
    plgpu.wait_smem_to_gmem(0)


def query_gradients(shape: Shape, *refs) -> None:
    """dq of one tile of queries of one query head; keys and values pass by."""
    x, (dout, lse, delta, dq, queries, douts, passing, ready) = Inputs(*refs[:10]), refs[10:]
    at, head, plain, count = query_program(shape, x)
    group = lax.axis_index("group")

    @pl.when(group < GROUPS)
    def compute():
        plgpu.set_max_registers(REGISTERS, action="increase")
        rows = pl.ds((at[2] * GROUPS + group) * ROWS, ROWS)
        tiles = queries.at[group], douts.at[group]
        for array, tile in zip((x.q, dout), tiles, strict=True):
            plgpu.copy_gmem_to_smem(array.at[at[0], rows, head], tile, ready.at[group])
        vectors = [from_memory(vector.at[at[0], head, rows], 0) for vector in (lse, delta)]
        plgpu.barrier_wait(ready.at[group])
        step = functools.partial(query_gradient_step, shape, x, (at, rows), (*tiles, *vectors), passing)
        acc = over_tiles(step, plain, count, zeros(ROWS, shape.D))
        store_rows((acc * shape.D**-0.5, tiles[0], dq.at[at[0], rows, head]))

    @pl.when(group == GROUPS)
    def fetcher():
        plgpu.set_max_registers(FETCHER_REGISTERS, action="decrease")
        fetch_keys(shape, x, passing, at, plain, count)


def query_gradient_step(shape, x, program, stays, passing, place, acc, masked):
    """Adds what a tile of keys gives to the gradient of 64 queries."""
    (at, rows), (queries, douts, log, delta) = program, stays
    slot = lax.rem(place, jnp.int32(shape.stages))
    keys, values = passing.first.at[slot], passing.second.at[slot]
    scores_type = ACC((ROWS, shape.tile), jnp.float32)

    def products(scores_ref, dweights_ref):
        plgpu.barrier_wait(passing.first_full.at[slot])
        plgpu.wgmma(scores_ref, queries, keys.transpose((1, 0)))
        plgpu.barrier_wait(passing.second_full.at[slot])
        plgpu.wgmma(dweights_ref, douts, values.transpose((1, 0)))
        scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
        bias = spread(plgpu.load(passing.first_vector.at[slot], layout=VARIES_ALONG[1]), 1, scores.shape)
        columns, _, _ = entry(x, shape, (*at, place))
        seen_far = masks(shape, x, (*at[:2], rows, columns), scores.shape, 0) if masked else None
        weights = jnp.exp2(biased(scores * shape.scale, bias, seen_far) - spread(log, 0, scores.shape))
        return weights * (plgpu.wgmma_accumulator_load(dweights_ref, wait_n=0) - spread(delta, 0, scores.shape))

    dscores = pl.run_scoped(products, scores_type, scores_type)
    plgpu.barrier_arrive(passing.second_free.at[slot])
    (acc,) = multiply_add((acc, dscores.astype(x.q.dtype), keys))
    plgpu.barrier_arrive(passing.first_free.at[slot])
    return acc


def key_gradients(shape: Shape, *refs) -> None:
    """dk, dv and dlog_keep_prob of one tile of keys of one KV head; the queries of its G query heads pass by.

    Scores are transposed, `[keys, queries]`. Of place n in the loops, n % G is the query head and n // G the place of
    the tile.
    """
    x, (dout, lse, delta, dk, dv, dbias, keys, values, passing, ready) = Inputs(*refs[:10]), refs[10:]
    at = b, kv, _ = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
    group, G = lax.axis_index("group"), jnp.int32(shape.group)
    plain, count = x.counts[(*at, 0)] * G, x.counts[(*at, 1)] * G

    @pl.when(group < GROUPS)
    def compute():
        plgpu.set_max_registers(REGISTERS, action="increase")
        rows = pl.ds((at[2] * GROUPS + group) * ROWS, ROWS)
        tiles = keys.at[group], values.at[group]
        for array, tile in zip((x.k, x.v), tiles, strict=True):
            plgpu.copy_gmem_to_smem(array.at[b, rows, kv], tile, ready.at[group])
        bias = from_memory(x.bias.at[b, kv, rows], 0)
        plgpu.barrier_wait(ready.at[group])
        step = functools.partial(key_gradient_step, shape, x, (at, rows), (*tiles, bias), passing)
        start = zeros(ROWS, shape.D), zeros(ROWS, shape.D), zeros(ROWS)
        dk_rows, dv_rows, dbias_rows = over_tiles(step, plain, count, start)
        dbias.at[b, kv, rows][...] = dbias_rows
        targets = dk.at[b, rows, kv], dv.at[b, rows, kv]
        store_rows((dk_rows * shape.D**-0.5, tiles[0], targets[0]), (dv_rows, tiles[1], targets[1]))

    def copies(array, vector, tile, tile_vector, full):
        def copy(place, slot):
            rows, _, _ = entry(x, shape, (*at, lax.div(place, G)))
            head = kv * G + lax.rem(place, G)
            plgpu.copy_gmem_to_smem(array.at[b, rows, head], tile.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(vector.at[b, head, rows], tile_vector.at[slot], full.at[slot])

        return copy

    @pl.when(group == GROUPS)
    def fetcher():
        plgpu.set_max_registers(FETCHER_REGISTERS, action="decrease")
        copy_queries = copies(x.q, lse, passing.first, passing.first_vector, passing.first_full)
        copy_douts = copies(dout, delta, passing.second, passing.second_vector, passing.second_full)
        fetch(shape, count, passing, copy_queries, copy_douts)


def key_gradient_step(shape, x, program, stays, passing, place, carry, masked):
    """Adds what a tile of queries gives to the gradients of 64 keys."""
    (at, rows), (keys, values, bias), (dk, dv, dbias) = program, stays, carry
    slot = lax.rem(place, jnp.int32(shape.stages))
    queries, douts = passing.first.at[slot], passing.second.at[slot]
    columns, _, far = entry(x, shape, (*at, lax.div(place, jnp.int32(shape.group))))
    share = far.astype(jnp.float32)
    scores_type = ACC((ROWS, shape.tile), jnp.float32)

    def products(scores_ref, dweights_ref):
        plgpu.barrier_wait(passing.first_full.at[slot])
        plgpu.wgmma(scores_ref, keys, queries.transpose((1, 0)))
        plgpu.barrier_wait(passing.second_full.at[slot])
        plgpu.wgmma(dweights_ref, values, douts.transpose((1, 0)))
        scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
        log, delta = (
            spread(plgpu.load(vector.at[slot], layout=VARIES_ALONG[1]), 1, scores.shape)
            for vector in (passing.first_vector, passing.second_vector)
        )
        seen_far = masks(shape, x, (*at[:2], columns, rows), scores.shape, 1) if masked else None
        scores = biased(scores * shape.scale, spread(bias if masked else bias * share, 0, scores.shape), seen_far)
        weights = jnp.exp2(scores - log)
        dscores = weights * (plgpu.wgmma_accumulator_load(dweights_ref, wait_n=0) - delta)
        dbiases = jnp.where(seen_far[1], dscores, 0.0).sum(axis=1) if seen_far else dscores.sum(axis=1) * share
        return weights, dscores, dbiases

    weights, dscores, dbiases = pl.run_scoped(products, scores_type, scores_type)
    weights, dscores = weights.astype(x.q.dtype), dscores.astype(x.q.dtype)
    dv, dk = multiply_add((dv, weights, douts), (dk, dscores, queries))
    plgpu.barrier_arrive(passing.first_free.at[slot])
    plgpu.barrier_arrive(passing.second_free.at[slot])
    return dk, dv, dbias + dbiases
