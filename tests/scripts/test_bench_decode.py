"""The decode benchmark: what a cell needs is known beforehand, and its state is what the cell says."""

import json

import jax
import numpy as np
import pytest

from dms_jax.config import ConfigError
from dms_jax.inference import decode
from scripts.benchmarks import bench_decode
from tests.helpers.models import tiny_latent


def small(tmp_path, **changes) -> bench_decode.Settings:
    defaults = {"model": "tiny", "steps": 9, "rounds": 1, "page_size": 4, "dtype": "float32", "memory": 4_000_000}
    return bench_decode.Settings(**defaults | {"out": tmp_path / "decode.json"} | changes)


def rows(settings) -> list[dict]:
    bench_decode.main(settings)
    return json.loads(settings.out.read_text())["rows"]


@pytest.mark.parametrize("cr", [1, 2, 8])
def test_lengths(cr):
    config = bench_decode.MODELS["qwen3_8b"]
    live = bench_decode.lengths(config, 8, 8192, cr, spread=4.0, seed=0)
    assert live.shape == (36, 8, 8) and live.max() <= 8192
    np.testing.assert_allclose(live.mean(), 8192 / cr, rtol=1e-3)
    np.testing.assert_allclose(live.max() / live.min(), 4 if cr > 1 else 1, rtol=0.02)


@pytest.mark.parametrize("cr", [1.0, 4.0])
def test_the_pool_is_just_large_enough(tmp_path, cr):
    """Every head holds its tokens in pages of its own, takes the steps timed, and one page less would not do."""
    settings = small(tmp_path)
    config = bench_decode.MODELS["tiny"]
    params = bench_decode.random_params(config, bench_decode.GATE, "float32", 0)
    plan = bench_decode.planned(settings, ("3", 64, cr), bench_decode.bytes_of(params), settings.memory)
    spec = bench_decode.setup_of(settings, plan)
    state = bench_decode.filled(spec, plan, plan.pages, settings)
    np.testing.assert_array_equal(decode.live_tokens(spec, state), plan.live.swapaxes(0, 1))
    table, held = np.asarray(state.cache.table), -(-plan.live // 4)
    taken = [*table[np.arange(table.shape[-1]) < held[..., None]], *state.cache.free[: state.cache.top]]
    assert sorted(taken) == list(range(plan.pages))
    steps = settings.steps * (settings.rounds + 1)
    state, chunk = decode.decode_chunk(spec, params, state, steps)
    assert np.asarray(chunk.active).all() and int(state.cache.top) == 0
    np.testing.assert_array_equal(decode.live_tokens(spec, state), plan.live.swapaxes(0, 1) + steps)
    state = bench_decode.filled(spec, plan, plan.pages - 1, settings)
    assert not np.asarray(decode.decode_chunk(spec, params, state, steps)[1].active).all()


def test_rows(tmp_path):
    """Two ratios are one compiled program; a cell that cannot fit is a row that cost nothing."""
    settings = small(tmp_path, cells=("maxx64x1", "2x64x1", "2x64x4", "2x64x8", "9999x64x4"))
    jax.clear_caches()
    largest, vanilla, four, eight, missing = rows(settings)
    assert decode.compiled_chunk(True)._cache_size() == 1  # of the two ratios; the programs before are dropped
    assert vanilla["live_kv_bytes"] > four["live_kv_bytes"] > eight["live_kv_bytes"]
    assert vanilla["pool_bytes"] > four["pool_bytes"] > eight["pool_bytes"]
    assert not missing["fits"] and missing["bytes_needed"] > settings.memory and "seconds_per_step" not in missing
    assert largest["fits"] and largest["bytes_needed"] <= 0.9 * settings.memory
    one_more = bench_decode.planned(settings, (str(largest["batch"] + 1), 64, 1.0), 0, 0)
    weights = largest["bytes_needed"] - largest["pool_bytes"]
    assert one_more.pool_bytes + weights > 0.9 * settings.memory


def test_latent_attention(tmp_path, monkeypatch):
    """An entry of 16 numbers a token and layer, stored once."""
    monkeypatch.setitem(bench_decode.MODELS, "tiny", tiny_latent())
    vanilla, four = rows(small(tmp_path, cells=("2x64x1", "2x64x4")))
    for row, tokens in ((vanilla, 64), (four, 16)):
        held = row["live_kv_bytes"] / (16 * 4) / (2 * 2)
        assert tokens < held < tokens + 9 * 2
    assert vanilla["pool_bytes"] > four["pool_bytes"]


def test_nothing_fits(tmp_path):
    (row,) = rows(small(tmp_path, cells=("maxx4096x1",), memory=200_000))
    assert row["largest_batch"] and row["batch"] == 1 and not row["fits"]


def test_an_error_is_a_row(tmp_path, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(bench_decode, "filled", full)
    (row,) = rows(small(tmp_path, cells=("1x64x1",)))
    assert row["fits"] and "RESOURCE_EXHAUSTED" in row["error"]


def test_a_cell_that_is_none():
    with pytest.raises(ConfigError, match="BATCHxCONTEXTxCR"):
        bench_decode.parse("allx8192x4")
