"""Policies by name: what an engine counts of them, and the budgets and options that are refused."""

import numpy as np
import pytest

from dms_jax import policies
from dms_jax.cache import kv_cache
from dms_jax.config import CacheConfig, ConfigError, SamplingConfig
from dms_jax.inference import decode
from dms_jax.inference.engine import Engine
from dms_jax.inference.scheduler import EngineConfig, Job
from tests.helpers.policy_cases import CAPACITY, CASES, CHUNK, CONFIG, PAGE, K, L, T, Table, layers, table


@pytest.mark.parametrize("name", ["tova", "quest", "rkv every 4"])
def test_the_engine_counts_what_was_read_and_held(name):
    """KV reads and peak of chains that draw their own tokens, prompts of three chunks and of one, one row for all."""
    case = CASES[name]
    cache = CacheConfig("paged", CAPACITY, PAGE)
    spec = decode.DecodeSpec(Table(CONFIG), case.build(), kv_cache(cache), SamplingConfig(), ())
    engine = Engine(spec, table(), cache, EngineConfig(max_num_seqs=1, prefill_chunk=CHUNK, steps=4))
    prompts = [list(range(19)), list(range(T, T + 5))]
    jobs = [Job(prompt, np.zeros((1, 2), np.uint32), 12, n) for n, prompt in enumerate(prompts)]
    for result in engine.run(jobs):
        prompt = prompts[result.name]
        tokens = np.array(prompt + result.tokens)
        oracle = layers(case, tokens, np.zeros((K, len(tokens))))
        saw = sum(np.array(layer.prompt(0, len(prompt))[1]) for layer in oracle)  # whole, whatever the chunks
        reads, held = 0, [sum(len(positions) for layer in oracle for positions in layer.live)]
        for p in range(len(prompt), len(tokens) - 1):
            reads += sum(sum(layer.step(p)[1]) for layer in oracle)
            held.append(sum(len(positions) for layer in oracle for positions in layer.live))
        assert len(result.tokens) == 12 and len(set(result.tokens)) > 3
        assert result.use.prefill_reads == saw.sum() / (L * K)
        assert result.use.kv_reads == reads / (L * K)
        peak = max(*saw, *held) / (L * K)
        assert result.use.peak_tokens == peak + (-(-peak // PAGE) if name == "quest" else 0)
        assert result.use.achieved_cr == (len(tokens) - 1) * L * K / held[-1]


@pytest.mark.parametrize(
    "name, budget, message",
    [
        ("tova", None, "budget=None: policy 'tova' needs one"),
        ("streaming", 4, "budget=4: policy 'streaming' needs more than the 4"),
        ("quest", PAGE - 1, "budget=3: policy 'quest' reads whole pages of page_size=4"),
        ("h2o", 0, "budget=0: must be positive"),
        ("knorm", 1.5, "budget=1.5: a share"),
        ("full", 8, "budget=8: policy 'full' takes none"),
    ],
)
def test_impossible_budgets(name, budget, message):
    with pytest.raises(ConfigError, match=message):
        policies.named(name, None, budget, CAPACITY, PAGE)


def test_options_that_a_policy_has_not():
    with pytest.raises(ConfigError, match="evict_every=4: policy 'quest' has no such option"):
        policies.named("quest", None, 8, CAPACITY, PAGE, evict_every=4)
    for kind in (policies.TOVA, policies.SnapKV, policies.RKV, policies.VaSEAttnV, policies.VaSEDKV):
        with pytest.raises(ConfigError, match="evict_every=0: expected a whole number from 1"):
            kind(16, evict_every=0)
    with pytest.raises(ConfigError, match="pooling=4: must be odd"):
        policies.SnapKV(16, pooling=4)


def test_budgets_for_each_head():
    """TOVA averages over the heads of a layer slot by slot: they hold the same tokens."""
    with pytest.raises(ConfigError, match=r"budget=\(\(8, 8\), \(9, 8\)\): the heads of a layer keep the same"):
        policies.TOVA(((8, 8), (9, 8)))
    assert policies.TOVA(((8, 8), (9, 9))).max_budget == policies.H2O(((8, 8), (9, 8))).max_budget == 9


def test_a_share_is_rounded_up():
    assert policies.tokens_of(0.25, 101) == 26 and policies.tokens_of(1.0, 7) == 7 and policies.tokens_of(7, 1) == 7
    assert policies.named("tova", None, 0.25, 101).budget == 26
