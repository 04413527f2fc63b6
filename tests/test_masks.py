"""Every mask function against brute-force loops over the definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import dms
from dms_jax.types import MASK_VALUE

WINDOWS = (0, 1, 4, 8, 50)  # 50: wider than any sequence here


def slots(seed: int, B=3, K=2, T=5, S=9):
    """Queries anywhere, and a cache in disorder: the heads hold other tokens, some slots are empty."""
    rng = np.random.default_rng(seed)
    query_pos = rng.integers(0, 12, (B, T))
    key_pos = np.stack([[rng.permutation(12)[:S] for _ in range(K)] for _ in range(B)])
    key_pos[rng.random(key_pos.shape) < 0.25] = -1
    p = rng.random((B, K, S))
    p[rng.random(p.shape) < 0.5] = 0
    return query_pos, key_pos, p


def brute_visible(query_pos, key_pos, evicted, window):
    B, K, S = key_pos.shape
    out = np.zeros((B, K, query_pos.shape[1], S), bool)
    for b, h, t, s in np.ndindex(*out.shape):
        i, j = query_pos[b, t], key_pos[b, h, s]
        if j == -1 or j > i:
            continue
        if i - j <= window or not evicted[b, h, s]:
            out[b, h, t, s] = True
    return out


@pytest.mark.parametrize("window", WINDOWS)
def test_visible(window):
    query_pos, key_pos, p = slots(window)
    want = brute_visible(query_pos, key_pos, p > 0, window)
    got = dms.visible(*map(jnp.asarray, (query_pos, key_pos, p > 0)), window)
    np.testing.assert_array_equal(got, want)
    assert want.any() and not want.all()


def test_visible_by_hand():
    """w = 1, token 0 and token 3 marked: token 0 is last seen by query 1."""
    pos = jnp.arange(5)[None]
    evicted = jnp.array([[[True, False, False, True, False]]])
    got = np.asarray(dms.visible(pos, pos[None], evicted, 1)[0, 0]).astype(int).tolist()
    assert got == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]


@pytest.mark.parametrize("window", WINDOWS)
def test_bias(window):
    query_pos, key_pos, p = slots(window + 100)
    want = np.full((3, 2, 5, 9), float(MASK_VALUE))
    for b, h, t, s in np.ndindex(*want.shape):
        i, j = query_pos[b, t], key_pos[b, h, s]
        if 0 <= j <= i:
            want[b, h, t, s] = 0 if i - j <= window else np.log(1 - p[b, h, s])
    log_keep_prob = jnp.asarray(np.log(1 - p), jnp.float32)
    got = dms.bias(jnp.asarray(query_pos), jnp.asarray(key_pos), log_keep_prob, window)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
def test_bias_of_hard_decisions_is_the_hard_mask(window):
    query_pos, key_pos, p = map(jnp.asarray, slots(window + 200))
    got = dms.bias(query_pos, key_pos, jnp.where(p > 0, MASK_VALUE, 0.0), window)
    visible = dms.visible(query_pos, key_pos, p > 0, window)
    np.testing.assert_array_equal(got, np.where(visible, 0, np.float32(MASK_VALUE)))


@pytest.mark.parametrize("window", (0, 3, 20))
@pytest.mark.parametrize("T, lengths", [(7, (7, 1, 4, 6)), (1, (1, 1))])
def test_shift(window, T, lengths):
    """Offsets 0, 1, w, w + 1, and decisions that no token has told yet."""
    rng = np.random.default_rng(window)
    values = rng.normal(size=(len(lengths), 2, T)).astype(np.float32)
    for offset in sorted({0, 1, window, window + 1}):
        want = np.full_like(values, MASK_VALUE)
        for b, h, j in np.ndindex(*values.shape):
            if j + offset < lengths[b]:
                want[b, h, j] = values[b, h, j + offset]
        given = jnp.asarray(values)
        np.testing.assert_array_equal(dms.shift(given, offset, jnp.asarray(lengths), MASK_VALUE), want)
        alpha = dms.shift(given > 0, offset, jnp.asarray(lengths), False)
        assert alpha.dtype == bool
        np.testing.assert_array_equal(alpha, want > 0)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("start", (0, 4))
def test_live_counts(window, start):
    """Counts of queries from `start` on, over keys in any order, some slots empty."""
    rng = np.random.default_rng(start)
    key_pos = rng.permuted(np.broadcast_to(np.where(np.arange(11) < 9, np.arange(11), -1), (3, 2, 11)), axis=-1)
    evicted = rng.random(key_pos.shape) < 0.6
    pos = np.broadcast_to(np.arange(start, 9), (3, 9 - start))
    want = brute_visible(pos, key_pos, evicted, window).sum(-1)
    got = dms.live_counts(jnp.asarray(key_pos), jnp.asarray(evicted), jnp.full(3, start), 9 - start, window)
    np.testing.assert_array_equal(got, want)
    if window < 7:
        assert (want < np.arange(start + 1, 10)).any()


@pytest.mark.parametrize("offset", (0, 1, 3))
def test_shift_segments(offset):
    """Token j gets what token j + offset of its own document predicted; at its end, and in padding, `kept`."""
    rng = np.random.default_rng(offset)
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 0]])
    values = rng.normal(size=(3, 2, 8)).astype(np.float32)
    got = dms.shift_segments(jnp.asarray(values), offset, jnp.asarray(segments), -7.0)
    for b, k, j in np.ndindex(*values.shape):
        same = j + offset < 8 and segments[b, j + offset] == segments[b, j] > 0
        assert got[b, k, j] == (values[b, k, j + offset] if same else -7.0)


def test_protect_sinks():
    """The first tokens of every document are kept, whatever their logits; with 0 sinks nothing changes."""
    positions = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])
    values = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    for sinks in (0, 1, 2, 9):
        got = dms.protect_sinks(jnp.asarray(values), jnp.asarray(positions), sinks, MASK_VALUE)
        for b, k, j in np.ndindex(*values.shape):
            assert got[b, k, j] == (np.float32(MASK_VALUE) if positions[b, j] < sinks else values[b, k, j])
        alpha = dms.protect_sinks(jnp.asarray(values > 0), jnp.asarray(positions), sinks, False)
        np.testing.assert_array_equal(alpha, got > 0)


def test_bias_of_packed_rows():
    """Nothing is seen across documents, and inside one it is the bias of that document alone."""
    segments, positions = np.array([[1, 1, 1, 2, 2]]), np.array([[0, 1, 2, 0, 1]])
    log_keep_prob = np.log(np.random.default_rng(0).random((1, 2, 5))).astype(np.float32)
    heads = np.broadcast_to(positions[:, None], (1, 2, 5))
    by_head = jnp.broadcast_to(jnp.asarray(segments)[:, None], heads.shape)
    got = dms.bias(*map(jnp.asarray, (positions, heads, log_keep_prob)), 1, jnp.asarray(segments), by_head)
    for part in (slice(0, 3), slice(3, 5)):
        alone = dms.bias(*map(jnp.asarray, (positions[:, part], heads[..., part], log_keep_prob[..., part])), 1)
        np.testing.assert_array_equal(got[:, :, part, part], alone)
    assert (got[:, :, 3:, :3] == MASK_VALUE).all() and (got[:, :, :3, 3:] == MASK_VALUE).all()
