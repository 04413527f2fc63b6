"""Delayed-eviction flash attention for Hopper, in Pallas's interpreter (jax 0.11), against the jnp reference.

The interpreter's threads wait for each other in XLA's pool: with few cores they need NPROC=16, or they hang.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.kernels import EvictionMask, attention
from dms_jax.types import MASK_VALUE

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
TOLERANCE = 1e-2  # relative to the largest value; products are of bfloat16


@pytest.fixture
def flash(monkeypatch):
    """`mosaic_flash.flash`, interpreted."""
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip("this jax has no interpreter for Mosaic GPU")
    from dms_jax.kernels import mosaic_flash, mosaic_flash_kernels

    def multiply_add(*products, meanwhile=lambda: None):
        """The interpreter knows neither accumulators that start at a value nor operands in registers."""
        meanwhile()
        read = lambda x: jnp.asarray(x if isinstance(x, jax.Array) else x[...], jnp.float32)  # noqa: E731
        return tuple(acc + read(a) @ read(b) for acc, a, b in products)

    monkeypatch.setattr(mosaic_flash_kernels, "multiply_add", multiply_add)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield mosaic_flash.flash


def ordered(rng, B, T, S, K):
    """Training: positions from 0, sequences padded on the right."""
    position = np.where(np.arange(T) < np.asarray([[T], [T - 150]])[:B], np.arange(T), -1)
    return position, np.broadcast_to(position[:, None], (B, K, S))


def shuffled(rng, B, T, S, K):
    """A cache: queries that continue, keys in any order, of each head its own, with empty slots."""
    keys = np.stack([rng.permutation(S + 60)[:S] for _ in range(B * K)]).reshape(B, K, S)
    return np.broadcast_to(np.arange(S - 50, S - 50 + T), (B, T)), np.where(keys % 5 == 0, -1, keys)


@pytest.mark.parametrize(
    "positions, window, hard, segments, lengths",
    [(ordered, 40, False, False, (256, 256)), (ordered, 30, True, True, (256, 256)),
     (shuffled, 60, False, False, (128, 384))],
    ids=["soft", "hard in segments", "keys in any order"],
)  # fmt: skip
def test_output_and_gradients(flash, positions, window, hard, segments, lengths):
    rng = np.random.default_rng(5)
    B, (T, S), K, G, D = 1 + hard, lengths, 2, 2, 64
    query_pos, key_pos = (jnp.asarray(x, jnp.int32) for x in positions(rng, B, T, S, K))
    q, k, v, weights = (jnp.asarray(rng.normal(size=(B, n, h, D)), jnp.bfloat16) for n, h in
                        ((T, K * G), (S, K), (S, K), (T, K * G)))  # fmt: skip
    evicted = np.where(rng.random((B, K, S // 16)).repeat(16, -1) < 0.6, MASK_VALUE, 0)
    log_keep_prob = jnp.asarray(evicted if hard else -rng.exponential(size=(B, K, S)), jnp.float32)
    segment = jnp.asarray(np.arange(T) // 150, jnp.int32)
    of_tokens = (jnp.broadcast_to(segment, (B, T)), jnp.broadcast_to(segment, (B, K, S))) if segments else ()
    mask = EvictionMask(query_pos, key_pos, log_keep_prob, window, *of_tokens)
    told = mask if segments else mask.one_segment()

    def loss(q, k, v, log_keep_prob, attend):
        given = told if attend is attention.dense else mask
        out = attend(q, k, v, given._replace(log_keep_prob=log_keep_prob)).astype(jnp.float32)
        return (out * weights).sum(), out

    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    (want, want_out), (got, got_out) = (
        jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*arrays, log_keep_prob, attend)
        for arrays, attend in ((wide, attention.dense), ((q, k, v), lambda *x: flash(*x, hard=hard)))
    )
    for name, x, y in zip(("out", "q", "k", "v", "log_keep_prob"), (got_out, *got), (want_out, *want), strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE * np.abs(y).max(), err_msg=name)


def test_layers_share_kernels():
    """Of two layers each kernel is lowered once: of every further lowering XLA would compile a kernel of its own."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("this jax is too old for the kernels")
    from dms_jax.kernels import mosaic_flash

    B, T, K, H, D = 1, 256, 2, 4, 64
    position = jnp.arange(T)[None]

    def loss(q, k, v, log_keep_prob):
        mask = EvictionMask(position, jnp.broadcast_to(position, (B, K, T)), log_keep_prob, 16)
        for _ in range(2):
            q = mosaic_flash.flash(q, k, v, mask, hard=False)
        return jnp.asarray(q, jnp.float32).sum()

    of = lambda heads: jax.ShapeDtypeStruct((B, T, heads, D), jnp.bfloat16)  # noqa: E731
    arrays = of(H), of(K), of(K), jax.ShapeDtypeStruct((B, K, T), jnp.float32)
    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3))).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 3  # forward, key_gradients, query_gradients
