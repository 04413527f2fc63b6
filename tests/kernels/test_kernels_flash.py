"""Delayed-eviction flash attention: Triton, in the interpreter, against the jnp reference, forward and backward."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import kernels
from dms_jax.config import ConfigError
from dms_jax.kernels import EvictionMask, attention
from dms_jax.types import MASK_VALUE

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # relative to the largest value


@pytest.fixture
def small_tiles(monkeypatch, interpreted):
    """Tiles of 16, so that small problems have many, of every class."""
    from dms_jax.kernels import triton_flash

    tile = triton_flash.Tile(16, 16, 4, 2)
    monkeypatch.setattr(triton_flash, "tiling", lambda *_: triton_flash.Tiling(tile, tile, tile))
    return triton_flash


def logs(rng, shape, hard):
    p = rng.random(shape) < 0.6 if hard else 1 / (1 + np.exp(-4 * rng.normal(size=shape)))
    return jnp.asarray(np.where(p == 1, MASK_VALUE, np.log1p(-np.where(p == 1, 0, p))), jnp.float32)


def inputs(rng, B=2, T=45, K=2, G=3, D=10, S=None, hard=False, dtype="float32"):
    """A training batch: positions from 0, sequences padded on the right (queries and keys at -1)."""
    S = S or T
    q, k, v = (jnp.asarray(rng.normal(size=(B, n, h, D)), dtype) for n, h in ((T, K * G), (S, K), (S, K)))
    lengths = rng.integers(T // 2, T + 1, (B, 1))
    position = np.where(np.arange(T) < lengths, np.arange(T), -1).astype(np.int32)
    key_pos = np.broadcast_to(np.pad(position, ((0, 0), (0, S - T)), constant_values=-1)[:, None], (B, K, S))
    return q, k, v, jnp.asarray(position), jnp.asarray(key_pos), logs(rng, (B, K, S), hard)


def close(got, want, tolerance, name=""):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert np.isfinite(got).all() and got.shape == want.shape, name
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 1), err_msg=name)


def with_gradients(arrays, window, weights, implementation, segments=(), **options):
    """A function of no arguments: the output, and the gradients of a sum that tells the elements of it apart."""
    q, k, v, query_pos, key_pos, log_keep_prob = arrays

    def loss(q, k, v, log_keep_prob):
        mask = EvictionMask(query_pos, key_pos, log_keep_prob, window, *segments)
        out = kernels.flash_attention(q, k, v, mask, **options, implementation=implementation)
        return (out.astype(jnp.float32) * weights).sum(), out

    run = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))

    def results():
        grads, out = run(q, k, v, log_keep_prob)
        return dict(zip(("out", "q", "k", "v", "log_keep_prob"), (out, *grads), strict=True))

    return results


def compare(rng, arrays, window, twice=False, **options):
    """Runs both; returns the kernel's results. With `twice`, a second run agrees bit for bit."""
    weights = jnp.asarray(rng.normal(size=arrays[0].shape), jnp.float32)
    run = with_gradients(arrays, window, weights, "triton", **options)
    got = run()
    again = run() if twice else got
    want = with_gradients(arrays, window, weights, "reference", **options)()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        np.testing.assert_array_equal(*(np.asarray(x[name], np.float32) for x in (got, again)), err_msg=name)
        close(got[name], want[name], TOLERANCE[str(arrays[0].dtype)], name)
    return got


@pytest.mark.parametrize(
    "G, D, window, hard", [(1, 8, 0, False), (1, 8, 0, True), (3, 10, 4, False), (3, 10, 4, True), (7, 20, 100, False)]
)
def test_training_batch(rng, small_tiles, G, D, window, hard):
    """w = 0 and w > T among them; `hard` also skips tiles, which must not show."""
    arrays = inputs(rng, G=G, D=D, K=1 if G == 7 else 2, hard=hard)
    got = compare(rng, arrays, window, twice=window == 4, hard=hard)
    assert window == 100 or np.abs(got["log_keep_prob"]).max() > 0.01


def test_random_shape(rng, small_tiles):
    shape = dict(zip("BTKGD", rng.integers(1, (3, 50, 3, 4, 40)).tolist(), strict=True))
    window, hard = int(rng.integers(0, 20)), bool(rng.random() < 0.5)
    print(shape, window, hard)
    compare(rng, inputs(rng, **shape, hard=hard), window, hard=hard)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_packed_segments(rng, small_tiles, hard):
    """Sequences one behind the other, positions from 0 in each: a tile holds parts of several."""
    q, k, v, _, _, log_keep_prob = inputs(rng, B=1, T=70, K=2, G=2, hard=hard)
    segments = np.repeat(np.arange(4), [5, 40, 7, 18])[None]
    position = np.concatenate([np.arange(n) for n in (5, 40, 7, 18)])[None]
    position, segments = jnp.asarray(position, jnp.int32), jnp.asarray(segments, jnp.int32)
    key_pos = jnp.broadcast_to(position[:, None], (1, 2, 70))
    arrays = (q, k, v, position, key_pos, log_keep_prob)
    got = compare(rng, arrays, 3, segments=(segments, segments), hard=hard)
    q, k, v, position = (x[:, 45:52] for x in (q, k, v, position))
    alone = attention.dense(q, k, v, EvictionMask(position, position, log_keep_prob[:, :, 45:52], 3))
    close(got["out"][:, 45:52], alone, 1e-5)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_chunked_prefill(rng, small_tiles, hard):
    """Slots in any order, other positions in every head, empty slots; a query of padding sees nothing and gives 0."""
    B, K, T, S = 2, 2, 20, 75
    q, k, v, _, _, log_keep_prob = inputs(rng, B=B, T=T, K=K, G=2, S=S, hard=hard)
    key_pos = np.stack([rng.permutation(100)[:S] for _ in range(B * K)]).reshape(B, K, S)
    key_pos = np.where(rng.random(key_pos.shape) < 0.2, -1, key_pos)
    query_pos = 60 + np.arange(T) + np.zeros((B, 1), int)
    query_pos[0, -3:] = -1
    arrays = (q, k, v, *(jnp.asarray(x, jnp.int32) for x in (query_pos, key_pos)), log_keep_prob)
    got = compare(rng, arrays, 5, hard=hard)
    assert not np.asarray(got["out"][0, -3:]).any() and not np.asarray(got["q"][0, -3:]).any()


@pytest.mark.parametrize("T, S", [(1040, 20), (20, 1040)])
def test_more_tiles_than_are_classified_at_once(rng, small_tiles, T, S):
    q, k, v, _, _, log_keep_prob = inputs(rng, B=1, T=T, K=1, G=1, D=4, S=max(T, S))
    k, v, log_keep_prob = k[:, :S], v[:, :S], log_keep_prob[:, :, :S]
    query_pos = jnp.asarray(rng.permutation(1040)[:T], jnp.int32)[None]
    key_pos = jnp.asarray(rng.permutation(1040)[:S], jnp.int32)[None, None]
    arrays = (q, k, v, query_pos, key_pos, log_keep_prob)
    if T > S:  # key_gradients goes through the tiles of queries as forward does through those of keys
        compare(rng, arrays, 30)
    else:
        mask = EvictionMask(query_pos, key_pos, log_keep_prob, 30)
        both = (kernels.flash_attention(q, k, v, mask, implementation=name) for name in ("triton", "reference"))
        close(*both, 1e-5)


def test_bfloat16(rng, small_tiles):
    compare(rng, inputs(rng, B=1, T=40, dtype="bfloat16"), 4)


def test_tiles_nobody_sees_are_not_read(rng, small_tiles):
    """Keys 16 to 47, whole tiles, are evicted: NaN there reaches no query beyond the window, but does without `hard`.

    Nor does NaN in the future reach an earlier tile.
    """
    T, window = 80, 4
    q, k, v, _, _, log_keep_prob = inputs(rng, B=1, T=T, K=1, G=2)
    position = jnp.arange(T, dtype=jnp.int32)[None]
    log_keep_prob = jnp.where((position >= 16) & (position < 48), MASK_VALUE, 0.0)[:, None]

    def run(v, hard):
        mask = EvictionMask(position, position, log_keep_prob, window)
        return kernels.flash_attention(q, k, v, mask, hard=hard, implementation="triton")

    clean = run(v, True)
    broken = run(v.at[:, 16:48].set(jnp.nan), True)
    np.testing.assert_array_equal(broken[:, 64:], clean[:, 64:])
    np.testing.assert_array_equal(broken[:, :16], clean[:, :16])
    assert np.isnan(run(v.at[:, 16:48].set(jnp.nan), False)[:, 64:]).all()
    np.testing.assert_array_equal(run(v.at[:, 64:].set(jnp.nan), True)[:, :64], clean[:, :64])


def test_classes_of_tiles(small_tiles):
    """The diagram of the module: 4 tiles of 16, w = 20, and tile 1 evicted as a whole."""
    position = jnp.arange(64)[None]
    log_keep_prob = jnp.where((position // 16) == 1, MASK_VALUE, -0.5)[:, None]
    queries = np.asarray(small_tiles.tile_bounds(position, position * 0, 16))[0]
    keys = np.asarray(small_tiles.tile_bounds(position[:, None], position[:, None] * 0, 16, log_keep_prob))[0, 0]
    assert queries.shape == (4, 64) and keys.shape == (6, 64)
    np.testing.assert_array_equal(small_tiles.tile_bounds(position, None, 16)[0], queries)
    np.testing.assert_array_equal(keys[0, :5], [0, 16, 32, 48, 2**30])
    np.testing.assert_array_equal(keys[1, :5], [15, 31, 47, 63, -1])
    np.testing.assert_array_equal(keys[5, :5], [0, 2**30, 32, 48, 2**30])
    np.testing.assert_array_equal(queries[0, :5], [0, 16, 32, 48, 2**30])


def test_reference_is_dense_attention(rng):
    """With more queries than a block, and where every query sees a key."""
    q, k, v, _, _, log_keep_prob = inputs(rng, T=150)
    position = jnp.broadcast_to(jnp.arange(150), (2, 150))
    mask = EvictionMask(position, position, log_keep_prob, 3)
    got = kernels.flash_attention(q, k, v, mask, implementation="reference")
    close(got, attention.dense(q, k, v, mask), 1e-6)


def traced_bytes(fn, T):
    """Size of everything that the output and its gradients make on the way, results included; nothing is run."""
    spec = jax.ShapeDtypeStruct
    q, k = spec((1, T, 4, 8), jnp.float32), spec((1, T, 2, 8), jnp.float32)
    position = jnp.arange(T, dtype=jnp.int32)[None]
    gradient = jax.grad(lambda *x: fn(*x[:3], position, *x[3:]).sum(), (0, 1, 2, 3))
    made = [x.aval for eqn in jax.make_jaxpr(gradient)(q, k, k, spec((1, 2, T), jnp.float32)).eqns for x in eqn.outvars]
    return sum(x.size * x.dtype.itemsize for x in made)


def test_memory_grows_linearly(interpreted):
    """Doubling T doubles it (tile sizes are the real ones) and quadruples it for dense attention."""

    def ours(q, k, v, position, log_keep_prob):
        mask = EvictionMask(position, position, log_keep_prob, 16)
        return kernels.flash_attention(q, k, v, mask, implementation="triton")

    def dense(q, k, v, position, log_keep_prob):
        return attention.dense(q, k, v, EvictionMask(position, position, log_keep_prob, 16))

    assert traced_bytes(ours, 16384) < 2.1 * traced_bytes(ours, 8192)
    assert traced_bytes(dense, 16384) > 3.9 * traced_bytes(dense, 8192)


def test_under_shard_map_with_gradients(rng, small_tiles):
    from jax.sharding import AxisType, PartitionSpec

    q, k, v, query_pos, key_pos, log_keep_prob = inputs(rng, T=20, D=4, G=1)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))

    def grads(implementation):
        def each(q, k, v, *mask):
            return kernels.flash_attention(q, k, v, EvictionMask(*mask, 3), implementation=implementation)

        def loss(q, k, v, log_keep_prob):
            run = jax.shard_map(each, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
            return (run(q, k, v, query_pos, key_pos, log_keep_prob) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, log_keep_prob)

    for got, want in zip(grads("triton"), grads("reference"), strict=True):
        close(got, want, 1e-5)


def test_bad_arguments_are_named(rng):
    q, k, v, *arrays = inputs(rng, T=5)
    mask = EvictionMask(*arrays, 3, arrays[0], arrays[0])
    for name in ("query_pos", "key_pos", "log_keep_prob", "query_segments", "key_segments"):
        bad = mask._replace(**{name: getattr(mask, name)[..., :4]})
        with pytest.raises(ConfigError, match=f"^{name}="):
            kernels.flash_attention(q, k, v, bad)
    for window in (-1, np.int32(-1)):
        with pytest.raises(ConfigError, match=re.escape(f"window={window!r}")):
            kernels.flash_attention(q, k, v, mask._replace(window=window))
    with pytest.raises(ConfigError, match=r"q=\(5, 6, 10\): expected \[B, T, H, D\]"):
        kernels.flash_attention(q[0], k, v, mask)
    with pytest.raises(ConfigError, match="give both or neither"):
        kernels.flash_attention(q, k, v, mask._replace(query_segments=None))
    with pytest.raises(ConfigError, match="q's dtype"):
        kernels.flash_attention(q, k.astype(jnp.bfloat16), v, mask)
    with pytest.raises(ConfigError, match="implementation='triton'"):
        kernels.flash_attention(q, k, v, mask, implementation="triton")
