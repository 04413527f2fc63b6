"""Delayed-eviction flash attention for Hopper in Pallas, forward and backward. Imported only where it is launched.

It computes what `triton_flash` does, tile by tile in the same classes, and is faster: one warpgroup of a program
fetches while two compute by turns. Which tiles matter is found before a kernel starts (`tiles.plan`): some tiles stay
in a program, the others pass by. Each sum is made by one program in one order, so two runs agree bit for bit.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from dms_jax.kernels import mosaic_flash_kernels as on_device
from dms_jax.kernels.attention import EvictionMask
from dms_jax.kernels.launch import LOG2E
from dms_jax.kernels.tiles import FAR_AWAY, as_arrays, plan

STAYS = on_device.GROUPS * on_device.ROWS  # rows of the tile that stays in a program
HEAD_DIMS = (64, 128)


class Tile(NamedTuple):
    """Of what passes by a program: rows, and how many tiles are fetched ahead."""

    rows: int
    stages: int


class Tiling(NamedTuple):
    forward: Tile = Tile(128, 2)
    dkv: Tile = Tile(64, 2)
    dq: Tile = Tile(128, 2)


class Options(NamedTuple):
    """What is known when the kernels are compiled."""

    window: int
    hard: bool
    segments: bool
    tiles: Tiling


def fits(q, k) -> bool:
    """Whether there is a kernel for these arrays and this device: 16 bits, whole tiles, Hopper, and jax 0.11."""
    whole = q.shape[1] % STAYS == k.shape[1] % STAYS == 0 and q.shape[3] in HEAD_DIMS and q.dtype.itemsize == 2
    hopper = getattr(jax.devices()[0], "compute_capability", None) == "9.0"
    return whole and hopper and jax.__version_info__ >= (0, 11)


def flash(q, k, v, mask: EvictionMask, *, hard: bool, tiles: Tiling | None = None):
    """`kernels.flash_attention`; arguments are checked by the caller, positions are those of each head."""
    options = Options(int(mask.window), hard, mask.query_segments is not None, tiles or Tiling())
    return _flash(options, q, k, v, as_arrays(mask))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(options, q, k, v, mask):
    return _forward(options, q, k, v, mask)[0]


def _prepare(options, q, k, v, mask, tile: Tile, keys_stay: bool) -> tuple[on_device.Shape, on_device.Inputs]:
    """An empty slot of keys is put where no query sees it; the biases of one tile, all 0, follow the last."""
    (_, T, H, D), (S, K) = q.shape, k.shape[1:3]
    sizes = (tile.rows, STAYS) if keys_stay else (STAYS, tile.rows)
    told = mask if options.segments else mask._replace(query_segments=None, key_segments=None)
    tiles = plan(told, *sizes, keys_stay=keys_stay, window=options.window, hard=options.hard)
    key_pos = jnp.where(mask.key_pos < 0, FAR_AWAY, mask.key_pos)
    bias = jnp.pad(mask.log_keep_prob * LOG2E, ((0, 0), (0, 0), (0, tile.rows)))
    inputs = on_device.Inputs(q, k, v, mask.query_pos, key_pos, mask.query_segments, mask.key_segments, bias, *tiles)
    return on_device.Shape(T, S, H, K, D, options.window, options.segments, *tile), inputs


def _launch(kernel, prepared, *more, out, staying: int) -> tuple:
    """Runs a kernel: its buffers are `staying` tiles and those of what passes by."""
    shape, inputs = prepared
    forward, keys_stay = kernel is on_device.forward, kernel is on_device.key_gradients
    swizzled = {"transforms": (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))}
    stays = plgpu.SMEM((on_device.GROUPS, on_device.ROWS, shape.D), inputs.q.dtype, **swizzled)
    passes = plgpu.SMEM((shape.stages, shape.tile, shape.D), inputs.q.dtype, **swizzled)
    vector = plgpu.SMEM((shape.stages, shape.tile), jnp.float32)
    barriers = functools.partial(plgpu.Barrier, num_barriers=shape.stages)
    full = barriers(num_arrivals=2), barriers(num_arrivals=1 + keys_stay)  # each copy is an arrival
    free = [barriers(num_arrivals=on_device.GROUPS)] * 2
    scratch = [stays] * staying
    scratch += [on_device.Passing(passes, passes, vector, vector if keys_stay else None, *full, *free)]
    scratch += [plgpu.Barrier(num_arrivals=staying, num_barriers=on_device.GROUPS)]
    scratch += [plgpu.Barrier(num_arrivals=on_device.GROUPS)] if forward else []
    heads, length = (shape.K, shape.S) if keys_stay else (shape.H, shape.T)
    return plgpu.kernel(
        functools.partial(kernel, shape),
        kernel_name=f"flash_{kernel.__name__}",
        out_type=out,
        scratch_types=scratch,
        grid=(heads, length // STAYS, inputs.q.shape[0]),
        grid_names=("head", "tile", "batch"),
        num_threads=on_device.GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(*inputs, *more)


# Under jit, as the backward pass, so that all layers share one lowering: another takes a third of a second, and is
# another kernel to XLA, which compiles it for a second or more and nothing else meanwhile.
@functools.partial(jax.jit, static_argnums=0)
def _forward(options, q, k, v, mask):
    B, T, H, _ = q.shape
    prepared = _prepare(options, q, k, v, mask, options.tiles.forward, keys_stay=False)
    out = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32))
    out, lse = _launch(on_device.forward, prepared, out=out, staying=1)
    return out, (q, k, v, mask, out, lse)


@functools.partial(jax.jit, static_argnums=0)
def _backward(options, saved, dout):
    *inputs, out, lse = saved
    q, k, v, mask = inputs
    delta = jnp.einsum("BTHD,BTHD->BHT", dout, out, preferred_element_type=jnp.float32)
    more = (dout, lse, delta)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, mask.log_keep_prob)]
    prepared = _prepare(options, *inputs, options.tiles.dkv, keys_stay=True)
    dk, dv, dbias = _launch(on_device.key_gradients, prepared, *more, out=tuple(shapes[1:]), staying=2)
    prepared = _prepare(options, *inputs, options.tiles.dq, keys_stay=False)
    (dq,) = _launch(on_device.query_gradients, prepared, *more, out=(shapes[0],), staying=2)
    return dq, dk, dv, EvictionMask(None, None, dbias, None)  # integers have no gradient


_flash.defvjp(_forward, _backward)
