"""Filters against numpy, frequencies against the softmax, and draws that depend on nothing but their own key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dms_jax.config import ConfigError, SamplingConfig
from dms_jax.inference import sampling

V = 11


def logits(seed, rows=40):
    """Rows with many ties: rounded to halves."""
    return np.round(np.random.default_rng(seed).normal(size=(rows, V)) * 4) / 2


def softmax(x):
    e = np.exp(np.float64(x) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kept(filtered):
    return np.asarray(filtered) > -1e29


def brute_top_k(row, k):
    """The k largest, and whatever ties with the last of them."""
    return [x >= sorted(row, reverse=True)[k - 1] for x in row]


def brute_top_p(row, p):
    """Takes levels of equal probability, likeliest first, until their mass reaches p."""
    probs, mass, taken = softmax(row), 0.0, np.zeros(V, bool)
    for level in sorted(set(row), reverse=True):
        if mass >= p:
            break
        taken |= row == level
        mass = probs[taken].sum()
    return taken


@pytest.mark.parametrize("k", (1, 2, 5, V - 1))
def test_top_k(k):
    rows = logits(k)
    filtered = sampling.filter_top_k(jnp.asarray(rows, jnp.float32), k)
    want = np.array([brute_top_k(row, k) for row in rows])
    np.testing.assert_array_equal(kept(filtered), want)
    np.testing.assert_array_equal(np.asarray(filtered)[want], rows[want].astype(np.float32))
    assert (want.sum(-1) > k).any(), "some row must have a tie at its edge"


@pytest.mark.parametrize("p", (1e-9, 0.3, 0.9, 0.999))
def test_top_p(p):
    rows = logits(17)
    filtered = sampling.filter_top_p(jnp.asarray(rows, jnp.float32), p)
    want = np.array([brute_top_p(row, p) for row in rows])
    np.testing.assert_array_equal(kept(filtered), want)
    np.testing.assert_array_equal(np.asarray(filtered)[want], rows[want].astype(np.float32))
    if p == 1e-9:
        np.testing.assert_array_equal(want, rows == rows.max(-1, keepdims=True))


def test_filters_that_are_off_change_nothing():
    rows = jnp.asarray(logits(3), jnp.float32)
    for k in (0, V, V + 5):
        np.testing.assert_array_equal(sampling.filter_top_k(rows, k), rows)
    np.testing.assert_array_equal(sampling.filter_top_p(rows, 1.0), rows)


def test_greedy_takes_the_first_of_the_largest():
    rows = logits(5)
    keys = sampling.sequence_keys(0, len(rows), 1)
    got = sampling.sample(jnp.asarray(rows), keys, jnp.zeros(len(rows), int), SamplingConfig())
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, [list(row).index(max(row)) for row in rows])


def draw(row, n, config, seed=0):
    """n draws from one distribution, as n chains of one prompt."""
    keys = sampling.sequence_keys(seed, 1, n)
    run = jax.jit(functools.partial(sampling.sample, config=config))
    return np.asarray(run(jnp.broadcast_to(jnp.asarray(row, jnp.float32), (n, V)), keys, jnp.full(n, 7)))


@pytest.mark.parametrize(
    "config",
    [SamplingConfig(0.7), SamplingConfig(1.5, top_k=6), SamplingConfig(1.0, top_p=0.8), SamplingConfig(2.0, 7, 0.8)],
)
def test_frequencies_are_those_of_the_softmax(config):
    """Chi-square at 0.1% on 20,000 draws; temperature first, then top-k, then top-p of what is left."""
    row = np.random.default_rng(1).normal(size=V) * 1.5
    scaled = row / config.temperature
    allowed = np.ones(V, bool)
    if config.top_k:
        allowed &= brute_top_k(scaled, config.top_k)
    if config.top_p < 1:
        allowed &= brute_top_p(np.where(allowed, scaled, -1e9), config.top_p)
    probs = softmax(np.where(allowed, scaled, -1e9))
    counts = np.bincount(draw(row, 20_000, config), minlength=V)
    assert not counts[~allowed].any()
    assert stats.chisquare(counts[allowed], 20_000 * probs[allowed]).pvalue > 1e-3
    other = softmax(np.where(allowed, row / (config.temperature + 0.3), -1e9))
    assert stats.chisquare(counts[allowed], 20_000 * other[allowed]).pvalue < 1e-3, "the test must be able to fail"


def test_keys_depend_on_seed_prompt_and_chain_only():
    many = sampling.sequence_keys(3, 4, 5)
    assert len({tuple(key) for key in np.asarray(many).tolist()}) == 20
    for prompt, chain in np.array([[[0], [0]], [[2], [3]], [[3], [4]]]):
        np.testing.assert_array_equal(sampling.chain_keys(3, prompt, chain), many[prompt * 5 + chain])
    np.testing.assert_array_equal(sampling.sequence_keys(3, 2, 5), many[:10])
    assert not np.array_equal(sampling.chain_keys(4, np.array([2]), np.array([3]))[0], many[13])


def test_a_draw_does_not_depend_on_the_batch():
    config = SamplingConfig(1.0)
    rows, positions = jnp.asarray(logits(8, 20)), jnp.arange(20)
    keys = sampling.sequence_keys(0, 5, 4)
    together = sampling.sample(rows, keys, positions, config)
    for part in (slice(4, 5), slice(10, 20)):
        alone = sampling.sample(rows[part], keys[part], positions[part], config)
        np.testing.assert_array_equal(alone, together[part])
    reversed_ = sampling.sample(rows[::-1], keys[::-1], positions[::-1], config)
    np.testing.assert_array_equal(reversed_[::-1], together)
    flat = jnp.zeros((20, V))
    same = sampling.sample(flat, jnp.broadcast_to(keys[0], (20, 2)), jnp.full(20, 3), config)
    assert len(set(same.tolist())) == 1, "one key at one position: one token"
    assert len(set(sampling.sample(flat, jnp.broadcast_to(keys[0], (20, 2)), positions, config).tolist())) > 3
    assert len(set(sampling.sample(flat, keys, jnp.full(20, 3), config).tolist())) > 3


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-40, 1e-38, 1.2e-38, 1e-30, 1e-9])
def test_a_tiny_temperature_is_greedy(temperature):
    """However small: logits that overflow, or a divisor that float32 rounds to 0, would give token 0."""
    rows = jnp.asarray(np.random.default_rng(4).permuted(np.tile(np.arange(V) * 1e6, (40, 1)), axis=1), jnp.float32)
    keys, positions = sampling.sequence_keys(0, 40, 1), jnp.arange(40)
    got = sampling.sample(rows, keys, positions, SamplingConfig(temperature, top_k=3, top_p=0.9))
    np.testing.assert_array_equal(got, rows.argmax(-1))


def test_all_bits_of_a_seed_count(rng):
    """No two of many seeds give one key; what has more than 64 bits is refused."""
    drawn = [int(high) << 32 | int(low) for high, low in rng.integers(0, 2**32, (100, 2), dtype=np.uint64)]
    seeds = {*(1 << n for n in range(64)), *drawn, 2**64 - 1, 0}
    keys = {tuple(np.asarray(sampling.sequence_keys(seed, 1, 1))[0].tolist()) for seed in seeds}
    assert len(keys) == len(seeds)
    for seed in (-1, 2**64):
        with pytest.raises(ConfigError, match=f"seed={seed}"):
            sampling.root_key(seed)


@pytest.mark.parametrize("field, value", [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1)])
def test_config_names_the_field(field, value):
    with pytest.raises(ConfigError, match=rf"{field}={value}"):
        SamplingConfig(**{field: value})
