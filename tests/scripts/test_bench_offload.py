"""The offload benchmark computes what decoding computes, wherever keys and values lie."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.cache import kv_cache
from dms_jax.config import CacheConfig, ConfigError
from dms_jax.inference import decode
from dms_jax.models.transformer import Decoder
from dms_jax.policies import Full, Quest
from scripts.benchmarks import bench_decode, bench_offload

CONFIG = bench_decode.MODELS["tiny"]
SETTINGS = bench_offload.Settings("tiny", ("2x64",), cr=2, page_size=16, steps=2, rounds=1, dtype="float32")
B, CONTEXT, PAGE = 2, 64, SETTINGS.page_size


@pytest.fixture(scope="module")
def params():
    made = bench_decode.random_params(CONFIG, None, "float32", 0)
    return jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, made)  # large enough that a wrong key would be seen


@pytest.fixture(scope="module")
def cache():
    return bench_offload.filled(SETTINGS, B, CONTEXT)


def logits_of(params, cache, quest, tokens: int = 3) -> np.ndarray:
    recent = bench_offload.no_tokens(CONFIG, B, tokens, "float32")
    token, position, out = jnp.array([3, 5]), jnp.full(B, CONTEXT), []
    for _ in range(tokens):
        logits, token, recent, position = bench_offload.step(CONFIG, quest, params, cache, recent, token, position)
        out.append(np.asarray(logits))
    return np.stack(out)


@pytest.fixture(scope="module")
def expected(params, cache):
    """Logits of the paged cache's own decode steps over the same keys and values."""
    spec = decode.DecodeSpec(Decoder(CONFIG), Full(), kv_cache(CacheConfig("paged", CONTEXT + PAGE, PAGE)))
    spec = dataclasses.replace(spec, sampling=dataclasses.replace(spec.sampling, temperature=0.0))
    state = decode.init(spec, B, "float32", 64)
    L, K, P = CONFIG.num_layers, CONFIG.num_kv_heads, CONTEXT // PAGE
    used = L * B * K * P
    k, v = (jnp.concatenate([pools[n] for pools in cache.layers]) for n in (0, 1))
    table = jnp.pad(jnp.arange(used, dtype=jnp.int32).reshape(L, B, K, P), ((0, 0),) * 3 + ((0, 1),))
    held = state.cache._replace(
        k=state.cache.k.at[:used].set(k),
        v=state.cache.v.at[:used].set(v),
        table=table,
        length=jnp.full((L, B, K), CONTEXT, jnp.int32),
        free=jnp.flip(state.cache.free),
        top=jnp.asarray(64 - used, jnp.int32),
    )
    position, last = jnp.full(B, CONTEXT, jnp.int32), jnp.full(B, 2**30, jnp.int32)
    state = state._replace(cache=held, token=jnp.array([3, 5]), position=position, last=last, done=jnp.zeros(B, bool))
    out = []
    for _ in range(3):
        state, logits, _ = decode.decode_step(spec, params, state)
        out.append(np.asarray(logits))
    return np.stack(out)


def test_streamed_steps_are_decode_steps(params, cache, expected):
    np.testing.assert_allclose(logits_of(params, cache, None), expected, atol=1e-4, rtol=1e-4)


def test_quest_reads_the_pages_it_chooses(params, cache, expected):
    everything = logits_of(params, cache, Quest(CONTEXT, PAGE))
    np.testing.assert_allclose(everything, expected, atol=1e-4, rtol=1e-4)
    half = logits_of(params, cache, Quest(CONTEXT // 2, PAGE))
    assert np.abs(half - expected).max() > 1e-3
    attend = bench_offload.HostAttend(cache, Quest(CONTEXT // 2, PAGE), None)
    q = jax.random.normal(jax.random.key(1), (B, CONFIG.num_heads, CONFIG.head_dim))
    chosen = np.asarray(attend._pages(0, q))
    assert (chosen.sum(axis=-1) == CONTEXT // 2 // PAGE).all()


def test_rows(tmp_path):
    """A row for each mode; what does not fit or fails is a row too."""
    out = tmp_path / "offload.json"
    bench_offload.main(dataclasses.replace(SETTINGS, cells=("2x64", "4x64"), host_memory=80_000, out=out))
    record = json.loads(out.read_text())
    rows = {(row["cell"], row["mode"]): row for row in record["rows"]}
    assert len(rows) == 8 and record["runs"][0]["link_bytes_per_second"] > 0
    full = 2 * 2 * 64 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    streamed, quest = rows["2x64", "streamed"], rows["2x64", "quest"]
    assert streamed["crossing_bytes"] == streamed["full_kv_bytes"] == full == 2 * quest["crossing_bytes"]
    assert all(row["seconds_per_step"] > 0 for row in rows.values() if row["fits"])
    assert not rows["4x64", "streamed"]["fits"] and rows["4x64", "device"]["fits"]


def test_a_cell_that_is_none():
    with pytest.raises(ConfigError, match="multiple of page_size=64"):
        bench_offload.parse("8x100", 64)
