"""The engine: chains do not depend on their company, on the pool or on chunks; nothing is lost; memory really falls."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.cache import kv_cache, paged
from dms_jax.config import CacheConfig, ConfigError, DMSConfig, ModelConfig
from dms_jax.inference import decode, generation, sampling
from dms_jax.inference.engine import _Run
from dms_jax.inference.generation import GenerationConfig
from dms_jax.inference.scheduler import EngineConfig, Job, PoolError
from dms_jax.policies import KeyDiff
from tests.helpers.models import prefill, random_lm, spec_for, step, tiny, tiny_latent

ROOT = Path(__file__).resolve().parents[2]
STOP = [3, 11, 30]
PROMPTS = [[5, 6, 7], [1], [9] * 12, [4, 8], [2] * 70]
NEW = 24


@pytest.fixture(scope="module")
def lm():
    return dataclasses.replace(random_lm(tiny(), DMSConfig(window=3, scale=3.0, logit_bias=0.3)), cr=2.0)


LATENT = DMSConfig(window=3, gate="adapter", scale=3.0, logit_bias=0.3)


@pytest.fixture(scope="module")
def latent_lm():
    return dataclasses.replace(random_lm(tiny_latent(), LATENT), cr=2.0)


def jobs(prompts=PROMPTS, chains=3):
    keys = np.asarray(sampling.sequence_keys(4, len(prompts), chains)).reshape(len(prompts), chains, 2)
    return [Job(prompt, keys[n], NEW, n) for n, prompt in enumerate(prompts)]


def build(lm, **options):
    engine = {"max_num_seqs": 4, "steps": 8, **options.pop("engine", {})}
    callbacks = {name: options.pop(name) for name in ("on_tokens", "on_progress", "chain_end") if name in options}
    config = GenerationConfig(temperature=1.0, stop=STOP, page_size=4, engine=EngineConfig(**engine), **options)
    return generation.build(lm, 70 + NEW, config, **callbacks)


def by_name(results):
    return {(r.name, r.chain): r for r in results}


@pytest.fixture(scope="module")
def wanted(lm):
    """Every chain of every prompt, from an engine with plenty of room."""
    results = by_name(build(lm, engine={"max_num_seqs": 16, "retention": True}).run(jobs()))
    assert len(results) == 15
    lengths = {len(r.tokens) for r in results.values()}
    assert NEW in lengths and len(lengths) > 2, "some chains must stop early, some late"
    return results


def assert_same(got, wanted):
    for key, result in got.items():
        assert result.tokens == wanted[key].tokens, key
        assert result.use == wanted[key].use
        np.testing.assert_array_equal(result.by_head.live, wanted[key].by_head.live)


def test_chains_do_not_depend_on_their_company(lm, wanted):
    alone = by_name(build(lm, engine={"max_num_seqs": 1}).run(jobs()[2:3]))
    assert len(alone) == 3
    assert_same(alone, wanted)
    few = by_name(build(lm).run(reversed(jobs())))
    assert len(few) == 15
    assert_same(few, wanted)


def test_masked_storage_gives_the_same_chains(lm, wanted):
    assert_same(by_name(build(lm, cache="masked").run(jobs())), wanted)


def test_latent_entries_in_masked_storage_and_in_a_pool_that_grows(latent_lm):
    want = by_name(build(latent_lm, cache="masked").run(jobs()[:4]))
    engine = build(latent_lm, engine={"pages": 1, "prefill_chunk": 8})
    assert_same(by_name(engine.run(jobs()[:4])), want)
    pool = engine.spec.kv_cache.pool(engine.runner.state.cache)
    assert pool.free == pool.size > 1 and pool.page_bytes == 4 * (16 * 4 + 4)  # entries of 16 float32 numbers


def test_long_prompts_are_read_in_chunks(lm, wanted):
    assert_same(by_name(build(lm, engine={"prefill_chunk": 16}).run(jobs()[4:])), wanted)


def test_long_prompts_are_padded_to_as_many_as_are_read_together(lm, wanted, monkeypatch):
    """On an accelerator short prompts come 64 at a time; a few long ones are not read with 60 empty rows."""
    shapes, prefill = [], decode.prefill

    def seen(spec, params, state, chunk, width):
        shapes.append(chunk.tokens.shape)
        return prefill(spec, params, state, chunk, width)

    monkeypatch.setattr(decode, "prefill", seen)
    engine = {"max_num_seqs": 12, "pad_rows": 8, "prefill_tokens": 128, "prefill_chunk": 64}
    assert_same(by_name(build(lm, engine=engine).run(jobs())), wanted)
    assert max(rows * width for rows, width in shapes) <= 128, shapes
    assert {rows for rows, _ in shapes} == {2}, shapes  # not 8


@pytest.fixture
def compiled():
    """Names of what is compiled, or fetched from the folder of programs, as it happens."""
    names = []

    def on_duration(event, _, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    yield names
    jax.monitoring.unregister_event_duration_listener(on_duration)


def test_what_an_accelerator_will_call_is_compiled_at_once(lm, wanted, compiled):
    """Padded to the same number of rows, programs are known from the prompts' lengths, and from shapes alone."""
    programs = ["_chunk", "empty_state", "fork", "fork", "live_tokens", "prefill", "prefill", "release"]  # two buckets

    def names() -> list[str]:
        made = sorted(name.removeprefix("jit(").removesuffix(")") for name in compiled)
        compiled.clear()
        return made

    engine = build(lm, engine={"pad_rows": 64, "max_num_seqs": 5, "lookahead": True})
    dataclasses.replace(engine, params=jax.eval_shape(lambda: lm.params)).prepare(jobs())
    assert names() == programs
    assert_same(by_name(engine.run(jobs())), wanted)
    assert not names()
    assert_same(by_name(build(lm, engine={"pad_rows": 64, "max_num_seqs": 6}).run(jobs())), wanted)
    assert names() == programs, "the engine does it where nobody did it before"


def test_programs_for_the_rest_of_long_prompts_are_compiled_at_once(lm, wanted, compiled):
    engine = build(lm, engine={"pad_rows": 64, "max_num_seqs": 7, "prefill_chunk": 32})
    engine.prepare(jobs())
    assert compiled.count("jit(prefill)") > 2, "what is read of a long prompt after its first chunk"
    compiled.clear()
    assert_same(by_name(engine.run(jobs())), wanted)
    assert "jit(prefill)" not in compiled and "jit(fork)" not in compiled


def test_an_error_while_programs_are_compiled_is_raised_as_itself(lm, monkeypatch):
    class Broken(Exception):
        pass

    def broken(*_):
        raise Broken

    monkeypatch.setattr(decode, "fork", type("Program", (), {"lower": broken}))
    with pytest.raises(Broken):
        build(lm, engine={"pad_rows": 64}).prepare(jobs())


def test_results_stream_and_tokens_are_reported_once(lm, wanted):
    seen, shown, order = {}, [], []
    engine = build(
        lm,
        on_tokens=lambda name, chain, new: seen.setdefault((name, chain), []).extend(new),
        on_progress=shown.append,
    )
    for result in engine.run(jobs()):
        order.append((result.name, result.chain))
        assert seen[order[-1]] == result.tokens == wanted[order[-1]].tokens
        assert len(seen) < 15 or len(order) > 1, "results come before all chains have started"
    assert sum(p.new_tokens for p in shown) == sum(len(r.tokens) - 1 for r in wanted.values())
    assert all(0 < p.pages_used <= p.pages and p.live_tokens > 0 for p in shown[:3])


def test_tokens_of_jobs_that_nobody_else_holds_are_all_reported(lm):
    """A job from a generator is gone with its last chain, and the next one may lie where it lay."""
    seen = {}
    engine = build(lm, on_tokens=lambda name, chain, new: seen.setdefault(name, []).extend(new))
    for result in engine.run(Job([n, 7], np.array([[n, 1]], np.uint32), 9, n) for n in range(20)):
        assert seen[result.name] == result.tokens


def test_a_job_longer_than_the_cache_is_refused(lm):
    long = jobs()[0]._replace(max_new=1000)
    engine = build(lm)
    with pytest.raises(ConfigError, match=rf"capacity={engine.cache.capacity}: a job may make 1003 tokens"):
        next(engine.run([*jobs()[:1], long]))


def need(lm, engine, tokens):
    """What a PoolError has to say of one sequence: its pages, and their bytes."""
    c, store = lm.config, engine.spec.kv_cache
    pages = int(store.pages_needed(np.full((1, c.num_layers, c.num_kv_heads), tokens)).max())
    size = paged.bytes_per_page(c, engine.cache, jnp.float32)
    return f"{tokens} tokens needs up to {pages} pages ({pages * size:,} bytes)"


# One shape of pool a size: few sizes, from far too small to just enough.
def test_small_pools_give_the_same_chains_or_say_what_they_need(lm, wanted):
    """From a pool of one page upward: an error that counts pages and bytes, or the very same results."""
    outcomes = []
    for pages in (1, 40, 120):
        engine = build(lm, engine={"pages": 1, "max_pages": pages})
        try:
            results = by_name(engine.run(jobs()[:4]))
        except PoolError as error:
            outcomes.append(False)
            tokens = int(re.match(rf"max_pages={pages}: one sequence of (\d+) tokens", str(error))[1])
            assert tokens in {len(job.prompt) + job.max_new for job in jobs()[:4]} and need(lm, engine, tokens) in str(
                error
            )
            continue
        outcomes.append(True)
        assert len(results) == 12
        assert_same(results, wanted)
        pool = engine.spec.kv_cache.pool(engine.runner.state.cache)
        assert pool.free == pool.size <= pages, "all pages are back"
    assert outcomes[0] is False and outcomes[-1] is True and outcomes == sorted(outcomes)
    one = lm.config.num_layers * lm.config.num_kv_heads * -(-(12 + NEW) // 4)
    assert one < 120 < 4 * one, "the largest pool cannot hold all rows at once"


def test_the_pool_grows_without_a_limit(lm, wanted):
    engine = build(lm, engine={"pages": 1})
    assert_same(by_name(engine.run(jobs())), wanted)
    assert engine.spec.kv_cache.pool(engine.runner.state.cache).size > 1


def test_prompts_are_read_beside_a_chunk_on_its_way(lm):
    """With lookahead a prompt takes none of the pages that a chunk takes meanwhile, of which nothing is known yet."""
    rng, keys = np.random.default_rng(1), np.asarray(sampling.sequence_keys(1, 10, 1))[:, None]
    sizes = zip(rng.integers(3, 40, 10).tolist(), rng.integers(5, 54, 10).tolist(), strict=True)
    mixed = [Job(rng.integers(0, 53, n).tolist(), keys[i], most, i) for i, (n, most) in enumerate([*sizes])]

    def run(lookahead):
        options = {"lookahead": lookahead, "max_num_seqs": 3, "pages": 110, "max_pages": 110}
        engine = build(lm, policy="full", engine=options)
        return by_name(engine.run(mixed)), engine.runner.state.cache

    (want, _), (got, cache) = run(False), run(True)
    assert_same(got, want)
    assert sorted(cache.free.tolist()) == list(range(int(cache.top))), "every page is back, once"


def test_a_chain_preempted_before_its_first_token_is_known_ends_once(lm):
    """Its first token ends it, and it starts over all the same."""
    engine = build(lm, engine={"max_num_seqs": 2})
    run = _Run(engine, engine._scheduler([job._replace(max_new=1) for job in jobs(chains=1)[:2]]))
    run._admit()
    run.scheduler.fits = lambda live: False
    run._make_room([0], stuck=True)
    run.scheduler.fits = run.runner.fits
    assert len(run.scheduler.running) == 1, "the younger is preempted"
    assert sorted(result.name for result in run.results(None)) == [0, 1]


def test_where_the_caller_ends_a_chain_does_not_depend_on_the_chunk(lm):
    """Also where the model ends it later in the same chunk, or the length does."""

    def first_low(tokens, new):
        """Of the newest ones, behind the first below 20: a stop, as a text's would be."""
        low = [n for n, token in enumerate(tokens, 1) if token < 20]
        return low[0] if low and low[0] > len(tokens) - new else None

    each, many = (by_name(build(lm, engine={"steps": steps}, chain_end=first_low).run(jobs())) for steps in (1, 8))
    assert any(result.tokens[-1] < 20 and result.tokens[-1] not in STOP for result in each.values())
    for key, result in many.items():
        assert (result.tokens, result.use) == (each[key].tokens, each[key].use), key


@pytest.mark.parametrize("model", ["lm", "latent_lm"])
def test_quantized_storage_is_close(model, request):
    """Logits of teacher-forced steps: int8 and fp8 keys and values stay near float32 ones."""
    lm = request.getfixturevalue(model)
    tokens = np.random.default_rng(0).integers(0, 53, (3, 40))

    def run(quant):
        spec = spec_for(lm, "dms", CacheConfig("paged", 48, 4, quant))
        state = decode.init(spec, 3, jnp.float32, 200)
        count, new = np.full(3, 10), np.full(3, 99)
        chunk = decode.PromptChunk(np.arange(3), tokens[:, :10], count, 0 * count, new, np.zeros((3, 2), np.uint32))
        state, logits, _ = prefill(spec, lm.params, state, chunk, width=0)
        out = [logits]
        for n in range(10, 20):
            state, logits, _ = step(spec, lm.params, state._replace(token=jnp.asarray(tokens[:, n], jnp.int32)))
            out.append(logits)
        return np.stack(out), state.cache

    exact, cache = run("none")
    for quant, most in (("int8", 0.02), ("fp8", 0.1)):
        got, small = run(quant)
        error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
        assert 1e-5 < error < most, (quant, error)
        assert small.k.dtype.itemsize == 1 < cache.k.dtype.itemsize


def test_retention_by_head_and_position(wanted):
    for result in wanted.values():
        by_head = result.by_head
        assert by_head.seen / by_head.live.mean() == pytest.approx(result.use.achieved_cr)
        assert by_head.kv_reads.mean() == pytest.approx(result.use.kv_reads)
        edges = np.histogram(np.arange(by_head.seen), np.linspace(0, by_head.seen, 21))[0]
        shares = np.nan_to_num(by_head.live_positions)
        np.testing.assert_allclose((shares * edges).sum(axis=1), by_head.live.mean(axis=1))
        if by_head.seen >= 20:
            assert shares[:, -1].min() == 1, "the newest token is in the window"


# An eviction of several copies the slots of one layer, which is more than a quarter of a pool of 3,001 pages.
@pytest.mark.parametrize(
    "policy, pages, model",
    [("dms", 3001, tiny()), (KeyDiff(64, evict_every=8), 30011, tiny()), ("dms", 6007, tiny_latent())],
    ids=("one", "several", "latent"),
)
def test_no_pool_sized_buffer_is_copied(policy, pages, model):
    """Prefill and chunk, compiled, update the pool in place: no copy of it, and temporary memory far below its size."""
    gate = "adapter" if model.latent else "query"
    lm = random_lm(model, DMSConfig(window=7, gate=gate, scale=3.0, logit_bias=0.3))
    spec = spec_for(lm, "dms", CacheConfig("paged", 1024, page_size=16))
    spec = spec if policy == "dms" else dataclasses.replace(spec, policy=policy)
    state = jax.eval_shape(lambda: decode.init(spec, 4, jnp.float32, pages))
    rows = np.zeros(2, np.int32)
    prompt = decode.PromptChunk(rows, np.zeros((2, 32), np.int32), rows, rows, rows, np.zeros((2, 2), np.uint32))
    pool = sum(4 * x.size for x in jax.tree.leaves((state.cache.k, state.cache.v)))
    for program, given in ((decode.compiled_chunk(True), (8, None)), (decode.prefill, (prompt, 64))):
        compiled = program.lower(spec, lm.params, state, *given).compile()
        made = [line for line in compiled.as_text().splitlines() if re.search(rf"= \(?\w+\[{pages},16", line)]
        assert any("scatter" in line for line in made), "the pool is written"
        copies = [line for line in made if re.search(r"^\s*(ROOT )?%[\w.-]*copy", line) or " copy(" in line]
        assert not copies, copies
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= pool, "the state is donated"
        assert memory.temp_size_in_bytes < pool / 4


@functools.partial(jax.jit, static_argnames=("store", "layer"), donate_argnames="cache")
def _fill(store, cache, layer, k, v, stay):
    position = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])
    return store.write_prefill(cache, layer, k, v, position, stay, None)[0]


@pytest.mark.parametrize("evicted", (0.75, 0.875))
def test_bytes_in_use_follow_the_live_tokens(evicted):
    """8 sequences x 2,048 tokens: pages in use within 10% of what lives, plus a page a head."""
    B, T, L, K, D = 8, 2048, 3, 3, 64
    model = ModelConfig("llama", 97, L, 48, 9, K, D, 40)
    config = CacheConfig("paged", T, page_size=16)
    store = kv_cache(config)
    pages = int(1.2 * (1 - evicted) * B * L * K * T / 16)
    cache = store.allocate(model, B, jnp.bfloat16, pages)
    rng = np.random.default_rng(0)
    k = jnp.asarray(rng.normal(size=(B, T, K, D)), jnp.bfloat16)
    live = 0
    for layer in range(L):
        stay = jnp.asarray(rng.random((B, K, T)) >= evicted)
        live += int(stay.sum())
        cache = _fill(store, cache, layer, k, k, stay)
    used = pages - int(cache.top)
    per_page, per_token = paged.bytes_per_page(model, config, jnp.bfloat16), 2 * D * 2
    heads = L * K * B
    assert used * per_page <= 1.10 * live * per_token + heads * per_page
    assert used * 16 >= live == int(np.asarray(cache.length).sum())
    assert live < 1.02 * (1 - evicted) * heads * T


@pytest.mark.slow
def test_several_devices_give_the_same_chains(tmp_path):
    """Sequences over the data axis, KV heads over the tensor axis, one pool a device, growing from 20 pages.

    No program runs part of itself a device (shard_map) with an empty input, of which XLA's compiler for GPUs dies.
    """
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "sharded_engine.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DUMP_IR_TO": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["devices"] == 8 and len(record["runs"]) == 2
    for policy, runs in record["runs"].items():
        one = runs.pop("None")
        assert len(runs) == 1 and len({len(chain) for chains in one["tokens"] for chain in chains}) > 1
        for devices, run in runs.items():
            assert run["tokens"] == one["tokens"], (policy, devices)
            np.testing.assert_allclose(run["reads"], one["reads"], rtol=1e-6)
    lowered = {path.name: path.read_text() for path in tmp_path.glob("*.mlir")}
    inputs = {name: re.findall(r"manual_computation\(.*", text) for name, text in lowered.items()}
    assert sum(map(len, inputs.values())) > 20
    empty = [name for name, lines in inputs.items() if any(re.search(r"tensor<(\d+x)*0x", line) for line in lines)]
    assert not empty, empty
