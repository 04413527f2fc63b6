"""Dense attention against an independent rendering in numpy, blockwise against dense, and the memory of both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import kernels
from dms_jax.config import ConfigError
from dms_jax.kernels import EvictionMask, attention
from dms_jax.types import MASK_VALUE


def inputs(seed, B, T, K, G, D, hard):
    """Right-padded keys (position -1), queries and keys that start at a position other than 0, and p for each key."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, K * G, D)) * 2
    k, v = rng.normal(size=(2, B, T, K, D))
    query_pos = np.arange(T) + rng.integers(0, 5, (B, 1))
    lengths = rng.integers(max(T // 2, 1), T + 1, (B, 1))
    key_pos = np.where(np.arange(T) < lengths, query_pos, -1)
    p = rng.random((B, K, T)) < 0.6 if hard else 1 / (1 + np.exp(-4 * rng.normal(size=(B, K, T))))
    return q, k, v, query_pos, key_pos, p.astype(float)


def as_jax(q, k, v, query_pos, key_pos, p):
    log_keep_prob = np.where(p == 1, MASK_VALUE, np.log1p(-np.where(p == 1, 0, p)))
    return (
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
        *(jnp.asarray(x, jnp.int32) for x in (query_pos, key_pos)),
        jnp.asarray(log_keep_prob, jnp.float32),
    )


def by_loops(q, k, v, query_pos, key_pos, p, window):
    """float64, keys repeated for each query head; a late key's weight is multiplied by 1 - p, no logs anywhere."""
    B, T, H, D = q.shape
    k, v, p = np.repeat(k, H // k.shape[2], 2), np.repeat(v, H // v.shape[2], 2), np.repeat(p, H // p.shape[1], 1)
    out = np.zeros_like(q)
    for b, h, t in np.ndindex(B, H, T):
        weights = np.exp(k[b, :, h] @ q[b, t, h] / np.sqrt(D))
        for s in range(k.shape[1]):
            distance = query_pos[b, t] - key_pos[b, s]
            if key_pos[b, s] == -1 or distance < 0:
                weights[s] = 0
            elif distance > window:
                weights[s] *= 1 - p[b, h, s]
        out[b, t, h] = weights @ v[b, :, h] / weights.sum()
    return out


@pytest.mark.parametrize("hard", (False, True))
@pytest.mark.parametrize("K, G, D, window", [(3, 1, 7, 2), (2, 3, 10, 0), (1, 7, 5, 30)])
def test_dense_against_loops(K, G, D, window, hard):
    arrays = inputs(D, 2, 13, K, G, D, hard)
    q, k, v, *mask = as_jax(*arrays)
    got = attention.dense(q, k, v, EvictionMask(*mask, window))
    np.testing.assert_allclose(got, by_loops(*arrays, window), atol=2e-5)


def test_padded_queries_stay_finite():
    """A query that sees no key (all slots empty) must not make NaN, neither forward nor backward."""
    q, k, v, query_pos, key_pos, log_keep_prob = as_jax(*inputs(0, 1, 4, 1, 1, 4, True))
    mask = EvictionMask(query_pos, jnp.full_like(key_pos, -1), log_keep_prob, 1)

    def total(*x):
        return attention.dense(*x, mask).sum()

    for value in jax.grad(total, (0, 1, 2))(q, k, v):
        assert np.isfinite(value).all()


def with_gradients(fn, window, query_pos, key_pos, weights, **options):
    """Attention's output, and the gradients of a sum that tells its elements apart."""

    def loss(q, k, v, log_keep_prob):
        out = fn(q, k, v, EvictionMask(query_pos, key_pos, log_keep_prob, window), **options)
        return (out * weights).sum(), out

    grad = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
    return lambda *x: grad(*x)[::-1]


@pytest.mark.parametrize("T, block", [(37, 16), (33, 32), (48, 16)])
def test_blockwise_equals_dense_with_gradients(T, block):
    """Lengths that are no multiple of the block, one more than a block, and a multiple; soft and hard."""
    *soft, p = inputs(T, 2, T, 2, 3, 6, hard=False)
    q, k, v, query_pos, key_pos, log_keep_prob = as_jax(*soft, p)
    weights = np.random.default_rng(1).normal(size=q.shape)
    dense = with_gradients(attention.dense, 3, query_pos, key_pos, weights)
    blockwise = with_gradients(attention.blockwise, 3, query_pos, key_pos, weights, block=block)
    for logs in (log_keep_prob, as_jax(*soft, (p > 0.5).astype(float))[-1]):
        want, want_grads = dense(q, k, v, logs)
        got, got_grads = blockwise(q, k, v, logs)
        np.testing.assert_allclose(got, want, atol=1e-5)
        for name, g, w in zip(("q", "k", "v", "log_keep_prob"), got_grads, want_grads, strict=True):
            np.testing.assert_allclose(g, w, atol=1e-4, err_msg=name)
            assert np.isfinite(w).all() and np.abs(w).max() > 0.01, name
    evicted = np.asarray(logs) == np.float32(MASK_VALUE)
    assert evicted.any() and not np.asarray(want_grads[3])[evicted].any(), "an evicted key gets no gradient"


def temp_bytes(fn, T, **options):
    """Scratch memory of the compiled forward and backward pass."""
    B, K, G, D = 1, 2, 2, 8
    q = jax.ShapeDtypeStruct((B, T, K * G, D), jnp.float32)
    k = jax.ShapeDtypeStruct((B, T, K, D), jnp.float32)
    log_keep_prob = jax.ShapeDtypeStruct((B, K, T), jnp.float32)
    positions = jnp.arange(T)[None]

    def loss(q, k, v, log_keep_prob):
        return (fn(q, k, v, EvictionMask(positions, positions, log_keep_prob, 16), **options) ** 2).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(q, k, k, log_keep_prob).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_values_narrower_than_keys():
    """As with values filled up with zeros, for more query heads than the kernel takes; wider ones are refused."""
    q, k, v, query_pos, key_pos, keep = as_jax(*inputs(4, 2, 140, 1, 20, 10, True))
    mask = EvictionMask(query_pos, key_pos, keep, 7)
    want = attention.dense(q, k, v.at[..., 6:].set(0), mask)[..., :6]
    np.testing.assert_allclose(kernels.flash_attention(q, k, v[..., :6], mask, hard=True), want, atol=1e-5)
    with pytest.raises(ConfigError, match="v=.*: the kernel needs values as wide as keys, 10"):
        kernels.flash_attention(q, k, v[..., :6], mask, implementation="triton")
    with pytest.raises(ConfigError, match="k, v=.* no wider values"):
        kernels.flash_attention(q, k, jnp.concatenate([v, v], axis=-1), mask)


def test_blockwise_memory_grows_linearly():
    """Doubling T doubles the scratch of blockwise (within 15%) and quadruples dense's, so the test can fail."""
    sizes = [temp_bytes(attention.blockwise, T, block=64) for T in (512, 1024, 2048)]
    assert sizes[1] < 2.15 * sizes[0] and sizes[2] < 2.15 * sizes[1], sizes
    quadratic = [temp_bytes(attention.dense, T) for T in (512, 1024)]
    assert quadratic[1] > 3.5 * quadratic[0], quadratic
    assert sizes[1] < quadratic[1] / 4
