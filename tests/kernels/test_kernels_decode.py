"""Paged decode attention: the Triton kernel, in the interpreter, against the jnp reference, and that against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import kernels
from dms_jax.config import ConfigError
from dms_jax.kernels import Pages, quant, reference

INT8, FP8 = jnp.dtype("int8"), jnp.dtype("float8_e4m3fn")
attend = jax.jit(kernels.paged_decode_attention, static_argnames=("weights", "implementation"))
update = jax.jit(kernels.paged_decode_attention_update, static_argnames=("layer", "weights", "implementation"))
plain = jax.jit(reference.paged_decode_attention)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}  # relative to the largest value


def pools(rng, N, page, D, dtype):
    """Two pools, and their scales or None. Values of a quantized pool are of every size that the scale allows."""
    values = rng.normal(size=(2, N, page, D))
    if dtype not in (INT8, FP8):
        return (*jnp.asarray(values, dtype), None, None)
    top = 127 if dtype == INT8 else 448
    scale = np.abs(values).max(-1) / top
    quantized = values / scale[..., None]
    stored = np.round(quantized).astype(dtype) if dtype == INT8 else quantized.astype(dtype)
    return *jnp.asarray(stored), *jnp.asarray(scale, jnp.float32)


def inputs(rng, lengths, G=3, D=10, page=16, P=3, dtype="float32", pages=None, U=None):
    """Random queries and pools, pages in random order; entries past a head's pages are N, which must not be read.

    U: values are the first so many numbers of the keys.
    """
    lengths = np.array(lengths, np.int32)
    B, K = lengths.shape
    N = B * K * P + 2
    used = np.arange(P) < -(-lengths // page)[..., None]
    table = np.where(used, rng.permutation(N)[: B * K * P].reshape(B, K, P), N).astype(np.int32)
    q = jnp.asarray(rng.normal(size=(B, K * G, D)), dtype)
    k, v, *scales = pools(rng, N, page, D, jnp.dtype(pages or dtype))
    if U is not None:
        v = v[:, :0, :U]
    return q, Pages(k, v, jnp.asarray(table), jnp.asarray(lengths), *scales)


def close(got, want, tolerance):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    got, want = (np.where(np.isinf(x), 0, x) for x in (got, want))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 1))


def compare(arrays, twice=False, **options):
    """Runs both; returns the kernel's result. With `twice`, a second run agrees bit for bit."""
    got = attend(*arrays, **options, implementation="triton")
    again = attend(*arrays, **options, implementation="triton") if twice else got
    want = attend(*arrays, **options, implementation="reference")
    tolerance = TOLERANCE[str(arrays[0].dtype)]
    for name, x, y, z in zip(got._fields, got, want, again, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            assert (x.shape, x.dtype) == (y.shape, y.dtype), name
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(z, np.float32), err_msg=name)
            close(x, y, tolerance)
    return got


@pytest.fixture(params=[5, 1])
def few_programs(request, monkeypatch, interpreted):
    """Five multiprocessors: programs that hold several heads, and heads that several programs share.

    With one, so few programs that they merge their splits themselves.
    """
    from dms_jax.kernels import triton_decode

    monkeypatch.setattr(triton_decode, "multiprocessors", lambda: request.param)
    return triton_decode


def test_reference_by_loops(rng):
    """One float64 softmax for each head over the slots that the table names, one by one."""
    q, pages = inputs(rng, [[0, 1], [37, 48]], G=2, D=6)
    k, v, table, lengths, *_ = pages
    got = kernels.paged_decode_attention(q, pages, weights=True, implementation="reference")
    for x, y in zip(got, kernels.paged_decode_attention(q, pages, weights=True), strict=True):  # what a CPU takes
        close(x, y, 1e-5)
    B, K, P = table.shape
    for b, h in np.ndindex(B, 2 * K):
        n = int(lengths[b, h // 2])
        slots = [(int(table[b, h // 2, s // 16]), s % 16) for s in range(n)]
        scores = [float(np.asarray(k, np.float64)[slot] @ np.asarray(q[b, h], np.float64)) for slot in slots]
        e = np.exp(np.array(scores) / np.sqrt(6))
        out = sum((w * np.asarray(v, np.float64)[slot] for w, slot in zip(e, slots, strict=True)), np.zeros(6))
        np.testing.assert_allclose(got.out[b, h], out / max(e.sum(), 1e-30), atol=1e-5)
        np.testing.assert_allclose(got.lse[b, h], np.log(e.sum()) if n else -np.inf, atol=1e-5)
    np.testing.assert_allclose(got.weights.sum(-1), 2.0 * (lengths > 0), atol=1e-5)
    assert not got.weights[np.arange(P * 16) >= np.asarray(lengths)[..., None]].any()


@pytest.mark.parametrize(
    "lengths, shape",
    [
        ([[0, 1], [48, 33]], {"G": 3}),
        ([[0, 0, 0]], {"G": 1}),  # nothing at all
        ([[1, 0, 2, 1, 0, 3, 1]], {"G": 7, "D": 5}),  # programs that hold several heads
        ([[3, 640, 0], [17, 1, 5]], {"G": 1, "P": 40}),  # one head holds nearly all tokens
        ([[97, 70]], {"G": 16, "page": 32, "P": 4, "D": 24}),
        ([[100, 256]], {"page": 256, "P": 1, "D": 64}),  # several tiles in one page
        ([[45, 72]], {"page": 24, "P": 3}),  # pages that tiles straddle
    ],
    ids=lambda x: str(x) if isinstance(x, list) else "-".join(f"{k}{v}" for k, v in x.items()),
)
def test_kernel_equals_reference(rng, few_programs, lengths, shape):
    arrays = inputs(rng, lengths, **shape)
    compare(arrays, twice="D" in shape, weights=True)


LATENT = {"G": 20, "D": 26, "U": 16}  # more query heads than a program holds


@pytest.mark.parametrize(
    "lengths, shape",
    [
        ([[0], [48], [33]], LATENT),
        ([[3], [640], [17]], {**LATENT, "G": 3, "P": 40}),
        ([[70], [97]], {"G": 40, "D": 37, "U": 33, "page": 64, "P": 2}),
        ([[45], [72]], {**LATENT, "page": 24}),  # pages that tiles straddle
        ([[45], [20]], {**LATENT, "U": 26}),  # the whole key
        ([[40], [17]], {**LATENT, "dtype": "bfloat16"}),
        ([[70], [97]], {**LATENT, "G": 70, "page": 64, "P": 2, "dtype": "bfloat16"}),  # 64 query heads to a program
        ([[40], [17]], {**LATENT, "pages": INT8}),
        ([[40], [17]], {"G": 5, "D": 168, "U": 150, "pages": INT8, "dtype": "bfloat16"}),  # two pairs of parts
        ([[40], [17]], {**LATENT, "pages": FP8, "dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_values_that_are_a_part_of_the_keys(rng, few_programs, lengths, shape):
    """As with a pool of values of their own, and that as from loops above."""
    q, pages = inputs(rng, lengths, **shape)
    got = compare((q, pages), weights=True)
    if pages.k_scale is not None:
        pages = pages._replace(
            k=quant.decode(pages.k, quant.joined(pages.v_scale, pages.k_scale, shape["U"], q.shape[2]), q.dtype)
        )
    wide = plain(q, pages._replace(v=pages.k, k_scale=None, v_scale=None))
    close(got.out, wide.out[..., : shape["U"]], TOLERANCE[str(q.dtype)])
    assert got.out.shape == (*q.shape[:2], shape["U"])


def test_latent_pages_that_may_be_read(rng, few_programs):
    arrays = inputs(rng, [[40], [33]], **LATENT)
    readable = jnp.asarray([[[True, False, True]], [[False, True, True]]])
    compare(arrays, readable=readable, weights=True)


@pytest.mark.parametrize("heads", [16, 32, 64])
def test_latent_result_does_not_depend_on_the_split(rng, few_programs, heads):
    arrays = inputs(rng, [[3], [200], [48]], **{**LATENT, "G": 70}, P=13)
    want = attend(*arrays, implementation="reference")
    for programs in (1, 40):
        got, _ = few_programs.decode(*arrays, tiles=few_programs.Tiling(32, programs=programs, heads=heads))
        close(got.out, want.out, 1e-5), close(got.lse, want.lse, 1e-5)


def test_random_shape(rng, few_programs):
    B, K, P = rng.integers(1, 4, 3)
    page = int(rng.choice([16, 32]))
    lengths = rng.integers(0, P * page + 1, (B, K))
    shape = {"G": int(rng.integers(1, 6)), "D": int(rng.integers(1, 40)), "page": page, "P": int(P)}
    print(lengths, shape)
    arrays = inputs(rng, lengths, **shape)
    compare(arrays)


@pytest.mark.parametrize("dtype, pages", [("bfloat16", None), ("float16", None), ("float32", "bfloat16")])
def test_half_precision(rng, few_programs, dtype, pages):
    arrays = inputs(rng, [[40, 17]], dtype=dtype, pages=pages, D=20)
    compare(arrays)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pages", [INT8, FP8], ids=str)
def test_quantized_pages(rng, few_programs, dtype, pages):
    arrays = inputs(rng, [[40, 17]], dtype=dtype, pages=pages, D=20)
    compare(arrays, weights=True)


@pytest.mark.parametrize("pages", [INT8, FP8], ids=str)
@pytest.mark.parametrize("q_factor, v_factor", [(1, 2**-30), (1, 2**30), (2**17, 1)])
def test_quantized_pages_of_any_size(rng, few_programs, pages, q_factor, v_factor):
    """The products are float16's, which ends at 65504 and 2**-24; some values are 0."""
    q, pages = inputs(rng, [[40, 17]], dtype="bfloat16", pages=pages, D=20)
    pages = pages._replace(v_scale=jnp.where(rng.random(pages.v_scale.shape) < 0.2, 0, pages.v_scale))
    other = pages._replace(k_scale=pages.k_scale / q_factor, v_scale=pages.v_scale * v_factor)
    want = attend(q, pages, implementation="reference")
    got = attend(q * q_factor, other, implementation="triton")
    close(got.out.astype(jnp.float32) / v_factor, want.out, TOLERANCE["bfloat16"])
    close(got.lse, want.lse, 1e-4)


@pytest.mark.parametrize("page, P", [(16, 6), (256, 2)])
def test_readable_pages(rng, few_programs, page, P):
    """Pages that may not be read hold NaN; among the others are some past the length."""
    q, pages = inputs(rng, [[3 * page // 2, P * page, 5]], page=page, P=P)
    readable = rng.random(pages.table.shape) < 0.5
    readable[0, :2, :2] = [[False, True], [True, False]]
    unread = np.setdiff1d(np.arange(len(pages.k)), np.asarray(pages.table)[readable])
    pages = pages._replace(k=pages.k.at[unread].set(jnp.nan), v=pages.v.at[unread].set(jnp.nan))
    got = compare((q, pages), readable=jnp.asarray(readable), weights=True)
    assert not np.asarray(got.weights).reshape(*readable.shape, page)[~readable].any()


@pytest.mark.parametrize("page, P", [(24, 3), (256, 2)])
def test_a_head_of_which_no_page_may_be_read(rng, few_programs, page, P):
    """It gives 0; whether its tile lies in one page or not."""
    readable = jnp.ones((1, 3, P), bool).at[0, 1].set(False)
    got = compare(inputs(rng, [[page, 20, 5]], page=page, P=P), readable=readable, weights=True)
    assert not got.out[:, 3:6].any() and np.isneginf(got.lse[:, 3:6]).all() and not got.weights[:, 1].any()


def test_result_does_not_depend_on_the_split(rng, few_programs):
    """One program, some that merge their splits themselves, and more programs than tiles."""
    arrays = inputs(rng, [[3, 200, 0], [17, 1, 48]], P=13)
    want = attend(*arrays, implementation="reference")
    for programs in (1, 3, 200):
        got, _ = few_programs.decode(*arrays, tiles=few_programs.Tiling(16, programs=programs))
        close(got.out, want.out, 1e-5), close(got.lse, want.lse, 1e-5)


@pytest.mark.parametrize(
    "layer, own, latent", [(0, True, {}), (1, False, {}), (2, False, {}), (1, False, LATENT), (0, True, LATENT)]
)
def test_update_writes_the_new_token(rng, few_programs, layer, own, latent):
    """The pools afterwards are equal bit for bit; slots that are negative or past the length are not written.

    The other layers' tables, lengths and slots are of no account; own: the slots are this layer's alone.
    """
    q, pages = inputs(rng, [[1, 40, 17], [48, 3, 0]], **latent)
    k_new, v_new = jnp.asarray(rng.normal(size=(2, 2, 3, q.shape[2])), jnp.float32)
    new = (k_new, k_new[..., :16] if latent else v_new)
    slots = jnp.asarray([[0, 5, 16], [47, -1, 0]], jnp.int32)

    def among_others(x, other):
        return jnp.full((3, *x.shape), other, x.dtype).at[layer].set(x)

    table, lengths = among_others(pages.table, len(pages.k) + 99), among_others(pages.lengths, 31)
    stacked = pages._replace(table=table, lengths=lengths)
    args = (q, *new, stacked, slots[None] if own else among_others(slots, 2), layer)
    got, got_pages = update(*args, weights=True, implementation="triton")
    want, want_pages = update(*args, weights=True, implementation="reference")
    for x, y in zip(got, want, strict=True):
        close(x, y, 1e-5)
    for x, y, before in list(zip(got_pages[:2], want_pages[:2], pages[:2], strict=True))[: 1 if latent else 2]:
        np.testing.assert_array_equal(x, y)
        assert (np.asarray(x) != before).any(-1).sum() == 4
    for b, k in np.ndindex(2, 2):
        slot = int(slots[b, k])
        if slot >= 0:
            page = pages.table[b, k, slot // 16]
            np.testing.assert_array_equal(got_pages.k[page, slot % 16], k_new[b, k])


def test_under_jit_scan_and_shard_map(rng, few_programs):
    from jax.sharding import AxisType, PartitionSpec

    q, pages = inputs(rng, [[20, 7]], G=2)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("x"), PartitionSpec()

    def step(q, n):
        out = kernels.paged_decode_attention(q, pages._replace(lengths=n), implementation="triton").out
        return out, out

    def steps(q, lengths):
        return jax.lax.scan(step, q, jnp.stack([lengths, lengths + 1]))[1]

    def sharded(q, pages):
        return kernels.paged_decode_attention(q, pages, implementation="triton").out

    got = jax.jit(steps)(q, pages.lengths)
    specs = (rows, Pages(whole, whole, rows, rows))
    over_mesh = jax.jit(jax.shard_map(sharded, mesh=mesh, in_specs=specs, out_specs=rows))
    np.testing.assert_array_equal(over_mesh(q, pages), got[0])
    longer = pages._replace(lengths=pages.lengths + 1)
    close(got[1], plain(got[0], longer).out, 1e-5)


def test_choice_of_implementation(rng, monkeypatch):
    """On a CPU None takes the reference; "triton" by name raises, and so does an unknown name."""
    from dms_jax.kernels import launch

    arrays = inputs(rng, [[20, 7]])
    assert launch.choose(None) == "reference"
    with pytest.raises(ConfigError, match="implementation='fast'"):
        kernels.paged_decode_attention(*arrays, implementation="fast")
    with pytest.raises(ConfigError, match="implementation='triton'"):
        kernels.paged_decode_attention(*arrays, implementation="triton")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert launch.choose(None) == "triton"
    monkeypatch.setattr(launch, "find_spec", lambda _: None)
    assert launch.choose(None) == "reference"
    with pytest.raises(ConfigError, match="implementation='triton'"):
        kernels.paged_decode_attention(*arrays, implementation="triton")


def test_bad_arguments_are_named(rng):
    q, pages = inputs(rng, [[20, 7]], pages=INT8)
    call = kernels.paged_decode_attention
    changes = {
        "pages.k_scale=None": {"k_scale": None},
        "pages.table=": {"table": pages.table[None]},
        "pages.table='float32': expected int32": {"table": pages.table.astype(jnp.float32)},
        "pages.lengths='float32'": {"lengths": pages.lengths.astype(jnp.float32)},
        "pages.lengths=": {"lengths": pages.lengths[:, :1]},
        "pages.k, pages.v=": {"v": pages.v[:, :, :4]},
        "'int16'": {"k": pages.k.astype(jnp.int16), "v": pages.v.astype(jnp.int16)},
    }
    for message, change in changes.items():
        with pytest.raises(ConfigError, match=message):
            call(q, pages._replace(**change))
    for bad, message in ((q[0], r"q=\(6, 10\): expected \[B, H, D\]"), (q[None], r"q=\(1, 1, 6, 10\)")):
        with pytest.raises(ConfigError, match=message):
            call(bad, pages)
    with pytest.raises(ConfigError, match="readable="):
        call(q, pages, readable=jnp.ones((1, 2), bool))
    with pytest.raises(ConfigError, match="D and U must be even"):
        call(q[..., :9], pages._replace(k=pages.k[..., :9], v=pages.v[..., :9]))
    with pytest.raises(ConfigError, match="q=34: at most 16"):
        call(jnp.ones((1, 34, 10)), pages)


def test_bad_arguments_of_an_update_are_named(rng):
    q, quantized = inputs(rng, [[20, 7]], pages=INT8)
    q, pages = inputs(rng, [[20, 7]])
    new, slots = jnp.ones((1, 2, 10)), jnp.zeros((1, 1, 2), jnp.int32)

    def call(pages, new=new, slots=slots, layer=0):
        stacked = pages._replace(table=pages.table[None], lengths=pages.lengths[None])
        return kernels.paged_decode_attention_update(q, new, new, stacked, slots, layer)

    call(pages)
    for message, change in {
        "k_new=": {"new": new[:, :1]},
        "slots=": {"slots": slots[0]},
        "L > 1": {"layer": 1},
    }.items():
        with pytest.raises(ConfigError, match=message):
            call(pages, **change)
    with pytest.raises(ConfigError, match="pages.k='int8'"):
        call(quantized)
