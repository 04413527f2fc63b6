"""One contract for every eviction policy, and each against a brute-force rendering of its paper.

The model of these tests is a table: a token's query, key, value and eviction logits are looked up, and the logits of
the next token are the attention outputs themselves. So policies and storages run as in any generation, by
`decode.prefill`, `decode.decode_step` and the engine, on random numbers that the oracle knows too.

A policy is added to the contract by a row in `CASES`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import policies
from dms_jax.cache import kv_cache, paged
from dms_jax.config import CacheConfig, ConfigError, DMSConfig, LatentConfig, ModelConfig, SamplingConfig
from dms_jax.inference import decode
from dms_jax.inference.engine import Engine
from dms_jax.inference.scheduler import EngineConfig, Job
from dms_jax.policies import dms as delayed
from tests.helpers import brute_policies as brute

B, K, G, D, U, L, N, T, CHUNK = 4, 2, 3, 6, 4, 2, 5, 40, 8  # N sequences of T tokens
PAGE, CAPACITY = 4, 48
CONFIG = ModelConfig(
    family="llama", vocab_size=L * K * G * D, num_layers=L, model_dim=8, num_heads=K * G, num_kv_heads=K, head_dim=D,
    mlp_dim=8,
)  # fmt: skip
WINDOW = 3
# Latent attention, whose values are the first U numbers of the keys; for storage there may be two such heads, and so
# the tests below are the same.
LATENT = dataclasses.replace(CONFIG, num_kv_heads=1, latent=LatentConfig(U, 1, D - U, 1))
object.__setattr__(LATENT, "num_kv_heads", K)


class Case(NamedTuple):
    """A policy as it is asked for, and its oracle."""

    policy: str
    oracle: type
    budget: int | None = None
    offset: int = 0  # of DMS's decisions
    every: int | None = None  # steps from one eviction to the next
    queries: int | None = None  # whose attention is observed

    def build(self, budget=None):
        dms = DMSConfig(window=WINDOW, decision_offset=self.offset)
        # Here the prompt is protected nowhere, so that every policy has to choose among its tokens.
        options = {"protect_prompt": False} if self.policy == "random_attention" else {}
        budget = budget or self.budget
        if self.queries is None:
            return policies.named(self.policy, dms, budget, CAPACITY, PAGE, evict_every=self.every, **options)
        return policies.BUDGETED[self.policy](budget, evict_every=self.every, queries=self.queries)


CASES = {
    "full": Case("full", brute.Layer),
    "dms delayed": Case("dms", brute.DMS),
    "dms immediate": Case("dms", brute.DMS, offset=WINDOW),
    "streaming": Case("streaming", brute.StreamingLLM, 9),
    "tova": Case("tova", brute.TOVA, 9),
    "h2o": Case("h2o", brute.H2O, 9),
    "knorm": Case("knorm", brute.KNorm, 9),
    "random": Case("random", brute.Random, 9),
    "quest": Case("quest", brute.Quest, 9),
    "h2o every 4": Case("h2o", brute.H2O, 9, every=4),
    "keydiff": Case("keydiff", brute.KeyDiff, 9),
    "random_attention": Case("random_attention", brute.RandomAttention, 9),
    "random_attention every 3": Case("random_attention", brute.RandomAttention, 9, every=3),
    "snapkv every 4": Case("snapkv", brute.SnapKV, 9, every=4, queries=2),
    "snapkv every 2": Case("snapkv", brute.SnapKV, 9, every=2, queries=4),
    "rkv every 4": Case("rkv", brute.RKV, 9, every=4, queries=2),
    "vase_attnv every 3": Case("vase_attnv", brute.VaSEAttnV, 9, every=3, queries=3),
    "vase_dkv every 3": Case("vase_dkv", brute.VaSEDKV, 9, every=3),
}
# Evict by a gate, evict by attention, read pages, evict several at once.
ON_MASKED_TOO = ("dms delayed", "tova", "h2o", "quest", "rkv every 4", "keydiff")
DRAWING = {"random", "random_attention", "vase_attnv", "vase_dkv"}
WITH_BUDGET = [name for name, case in CASES.items() if case.budget]
assert {case.policy for case in CASES.values()} == set(policies.NAMES), "a policy is missing from the contract"


# ---- the model that is a table


class Table(NamedTuple):
    """Token n * T + p is token p of sequence n; stands where `decode` expects a Decoder."""

    config: ModelConfig
    gate: None = None  # of its own: the logits come from the table

    def apply(self, variables, x, positions=None, attend=None, carried=None, method=None):
        if method == "unembed":
            return x
        p, outs = variables["params"], []
        for n in range(self.config.num_layers):
            q, k, v, logit = (p[name][n][x] for name in ("q", "k", "v", "logit"))
            out, carried = attend(n, q, k, v, logit.swapaxes(1, 2), carried)
            outs.append(out.reshape(*x.shape, -1))
        return jnp.concatenate(outs, axis=-1), carried


@functools.cache
def table(latent=False):
    rng = np.random.default_rng(7)
    shapes = {"q": (K * G, D), "k": (K, D), "v": (K, D), "logit": (K,)}
    made = {name: rng.normal(size=(L, N * T, *shape)).astype(np.float32) for name, shape in shapes.items()}
    values = {"v": made["k"][..., :U]} if latent else {}
    return {**made, **values, "embed": {"embedding": np.zeros((1, 1), np.float32)}}


def keys(seed):
    return np.stack([jax.random.key_data(jax.random.fold_in(jax.random.key(seed), n)) for n in range(N)])


@functools.cache
def chance(seed):
    """The number `[N, K, T]` that each token of each head draws for random eviction."""
    out = np.zeros((N, K, T))
    for n, key in enumerate(keys(seed)):
        for h in range(K):
            head = jax.random.fold_in(jax.random.wrap_key_data(key), h)
            folded = jax.vmap(lambda p, head=head: jax.random.fold_in(head, p))(jnp.arange(T))
            out[n, h] = jax.vmap(jax.random.uniform)(folded)
    return out


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The random numbers of evictions in one layer of one sequence."""

    key: Any
    layer: int

    def uniform(self, p):
        def one(h, position):
            return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(self.at(p), h), position))

        return np.asarray(jax.vmap(lambda h: jax.vmap(lambda j: one(h, j))(jnp.arange(T)))(jnp.arange(K)))

    def normal(self, p):
        return np.asarray(jax.random.normal(self.at(p), (D, 20)))

    def at(self, p):
        return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(self.key), p), self.layer)


def layers(case: Case, tokens, numbers, key=None, latent=False):
    """The oracle of each layer for a sequence of table entries."""
    p, window = table(latent), WINDOW if case.policy == "dms" else 0
    rule = {"budget": case.budget, "page": PAGE, "window": window, "offset": case.offset}
    rule |= {"every": case.every or 1, "observed": case.queries or 0}
    entries = [[p[name][n][tokens] for name in ("q", "k", "v", "logit")] for n in range(L)]
    found = [case.oracle(*entry, numbers, drawn=Drawn(key, n), **rule) for n, entry in enumerate(entries)]
    for oracle in found if latent else ():
        oracle.rereads = min(1, 2 * oracle.rereads)  # who reads the keys has read the values
    return found


# ---- a scenario: prompts of unequal length in chunks, idle rows, a second turn, a row that is used again

ROW = (2, 0, 3, 1, 0)  # of each sequence; 4 comes after 1 has left
FIRST, SECOND = (0, 1, 2, 3), (0, 4, 2, 3)
READ, STEP, LEAVE = "read", "step", "leave"
TURNS = [
    (READ, {0: 5, 1: 8, 3: 1}),
    (READ, {0: 8, 1: 7, 2: 8}),
    *[(STEP, FIRST)] * 3,
    *[(STEP, (0, 2))] * 4,
    (READ, {2: 8, 3: 8}),
    *[(STEP, FIRST)] * 6,
    (LEAVE, (1,)),
    *[(STEP, (0, 3))] * 2,
    (READ, {0: 2, 4: 7}),
    *[(STEP, SECOND)] * 9,
]


class Seen(NamedTuple):
    """After a turn, of a sequence that took part in it."""

    sequence: int
    out: np.ndarray  # [L * H * D], of its newest token
    reads: Any  # of a step [L, K]; of a chunk [count], summed over layers and heads
    live: list[list[list[int]]]  # positions, [L][K], sorted


one_step = jax.jit(decode.decode_step, static_argnames="spec")
prefill = jax.jit(decode.prefill.__wrapped__, static_argnames=("spec", "width"))


def live_slots(cache):
    """Which places hold something, in the shape of the cache's positions, and the positions by row, layer, head."""
    if isinstance(cache, paged.PagedArrays):
        held, found = np.zeros(cache.pos.shape, bool), {}
        for n, b, h in np.ndindex(cache.length.shape):
            slots = np.arange(int(cache.length[n, b, h]))
            at = np.asarray(cache.table)[n, b, h, slots // PAGE], slots % PAGE
            assert not held[at].any(), "a slot belongs to two heads"
            held[at] = True
            found[b, n, h] = sorted(np.asarray(cache.pos)[at].tolist())
        return held, found
    held = [np.asarray(pos) >= 0 for pos in cache.pos]
    found = {
        (b, n, h): sorted(pos[b, h][pos[b, h] >= 0].tolist())
        for n, pos in enumerate(map(np.asarray, cache.pos))
        for b, h in np.ndindex(B, K)
    }
    return held, found


def poisoned(cache, held):
    """The cache with large numbers, and plausible positions, in every place that is empty."""
    if isinstance(cache, paged.PagedArrays):
        k, v = (jnp.where(held[..., None], x, 1e6) if x.size else x for x in (cache.k, cache.v))
        return cache._replace(k=k, v=v, pos=jnp.where(held, cache.pos, 5))
    k = tuple(jnp.where(h[:, :, None], x, 1e6) for h, x in zip(held, cache.k, strict=True))
    v = tuple(jnp.where(h[..., None], x, 1e6) if x.size else x for h, x in zip(held, cache.v, strict=True))
    return cache._replace(k=k, v=v)


def of_layers(count: int) -> ModelConfig:
    """The model of the table's first layers."""
    return dataclasses.replace(CONFIG, num_layers=count, vocab_size=count * K * G * D)


def run_turns(policy, kind: str, seed: int, num_layers: int = L) -> list[list[Seen]]:
    """What was seen after each turn. Empty slots are poisoned before every turn; short arrays grow on the way."""
    storage, latent = kind.split()[0], "latent" in kind
    store = kv_cache(CacheConfig(storage, CAPACITY, PAGE))
    spec = decode.DecodeSpec(Table(LATENT if latent else of_layers(num_layers)), policy, store)
    params, random_keys = table(latent), keys(seed)
    pages = int(store.pages_needed(np.full((B, num_layers, K), CAPACITY)).max())
    state = decode.init(spec, B, jnp.float32, pages)
    past, record = np.zeros(N, int), []
    for kind_of_turn, who in TURNS:
        live = np.asarray(decode.live_tokens(spec, state))
        cache = store.fitted(state.cache, live + (CHUNK if kind_of_turn == READ else 1))
        state = state._replace(cache=poisoned(cache, live_slots(cache)[0]))
        seen = {}
        if kind_of_turn == READ:
            group = SECOND if 4 in who else FIRST
            count = np.array([who.get(n, 0) for n in group])
            tokens = np.stack([n * T + np.minimum(past[n] + np.arange(CHUNK), T - 1) for n in group])
            rows = np.array([ROW[n] if n in who or n % 2 else B for n in group])  # idle, or no row at all
            limit = np.full(len(group), 99)
            chunk = decode.PromptChunk(rows, tokens, count, 0 * count, limit, random_keys[list(group)])
            state, out, reads = prefill(spec, params, state, chunk, CAPACITY)
            for i, n in enumerate(group):
                if n in who:
                    seen[n] = np.asarray(out)[i], np.asarray(reads)[i, : count[i]]
                    past[n] += count[i]
        elif kind_of_turn == STEP:
            fed, done = np.zeros(B, np.int32), np.ones(B, bool)
            for n in who:
                fed[ROW[n]], done[ROW[n]] = n * T + past[n], False
            state, out, made = one_step(spec, params, state._replace(token=jnp.array(fed), done=jnp.array(done)))
            np.testing.assert_array_equal(made.active, ~done)
            reads = made.reads
            for n in who:
                seen[n] = np.asarray(out)[ROW[n]], np.asarray(reads)[ROW[n]]
                past[n] += 1
        else:
            state = decode.release(spec, state, np.isin(np.arange(B), [ROW[n] for n in who]))
        _, found = live_slots(state.cache)
        live = {n: [[found[ROW[n], layer, h] for h in range(K)] for layer in range(num_layers)] for n in seen}
        record.append([Seen(n, *both, live[n]) for n, both in seen.items()])
        for n in who if kind_of_turn == LEAVE else ():
            assert not any(found[ROW[n], layer, h] for layer in range(num_layers) for h in range(K))
    return record


@functools.cache
def trace(name: str, kind: str, budget: int | None = None, num_layers: int = L) -> list[list[Seen]]:
    return run_turns(CASES[name].build(budget), kind, 0, num_layers)


@functools.cache
def expected(name: str, latent: bool) -> list[list[Seen]]:
    """What the oracle sees in the same turns."""
    case, record = CASES[name], []
    oracles = [layers(case, n * T + np.arange(T), chance(0)[n], keys(0)[n], latent) for n in range(N)]
    past = np.zeros(N, int)
    for kind_of_turn, who in TURNS:
        turn = []
        for n in () if kind_of_turn == LEAVE else who:
            if kind_of_turn == READ:
                outs, reads = zip(*(layer.prompt(past[n], who[n]) for layer in oracles[n]), strict=True)
                reads = np.sum(reads, axis=0)
            else:
                outs, reads = zip(*(layer.step(past[n]) for layer in oracles[n]), strict=True)
            past[n] += who[n] if kind_of_turn == READ else 1
            live = [[sorted(layer.live[h]) for h in range(K)] for layer in oracles[n]]
            turn.append(Seen(n, np.concatenate(outs), np.array(reads), live))
        record.append(turn)
    return record


def engine_of(policy, num_layers: int = L, **changes) -> Engine:
    """An engine of one row over the table, or over its first layer where one shows as much."""
    cache = CacheConfig("paged", CAPACITY, PAGE)
    spec = decode.DecodeSpec(Table(of_layers(num_layers)), policy, kv_cache(cache), SamplingConfig(), ())
    return Engine(spec, table(), cache, EngineConfig(**{"max_num_seqs": 1, "prefill_chunk": CHUNK, **changes}))


def pairs(ours, theirs):
    for turn, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        by_sequence = {seen.sequence: seen for seen in b}
        assert {seen.sequence for seen in a} == set(by_sequence)
        for seen in a:
            yield f"turn {turn} {TURNS[turn]}, sequence {seen.sequence}", seen, by_sequence[seen.sequence]


@pytest.mark.parametrize(
    "name, kind",
    [
        *((name, kind) for kind in ("paged", "paged latent") for name in CASES),
        *((name, kind) for kind in ("masked", "masked latent") for name in ON_MASKED_TOO),
    ],
)
def test_every_head_keeps_and_reads_what_the_paper_says(name, kind):
    """At every turn: the same positions live, the same outputs (so nothing empty is read), the same reads counted."""
    for where, ours, theirs in pairs(trace(name, kind), expected(name, "latent" in kind)):
        assert ours.live == theirs.live, where
        np.testing.assert_array_equal(ours.reads, theirs.reads, err_msg=where)
        np.testing.assert_allclose(ours.out, theirs.out, atol=1e-4, err_msg=where)


@pytest.mark.parametrize("name", CASES)
def test_the_budget_is_kept_at_every_step_and_used(name):
    case, policy = CASES[name], CASES[name].build()
    past, held = np.zeros(N, int), set()
    for (kind_of_turn, who), turn in zip(TURNS, trace(name, "paged"), strict=True):
        for seen in turn:
            past[seen.sequence] += who[seen.sequence] if kind_of_turn == READ else 1
            counts = {len(positions) for layer in seen.live for positions in layer}
            if policy.max_budget is not None:
                least, most = case.budget, case.budget + (case.every or 1) - 1
                assert policy.max_budget == most
                least, most = (min(n, past[seen.sequence]) for n in (least, most))
                assert all(least <= count <= most for count in counts)
                held |= counts
            elif case.policy == "dms":
                assert max(counts) <= past[seen.sequence]
            else:
                assert counts == {past[seen.sequence]}, "everything is stored"
            if case.policy == "quest" and kind_of_turn == STEP:
                stored = past[seen.sequence]
                pages = -(-stored // PAGE)
                chosen = min(case.budget // PAGE, pages)
                in_newest = stored - (pages - 1) * PAGE
                assert np.all(seen.reads == (chosen - 1) * PAGE + in_newest + pages)
    if policy.max_budget is not None:
        assert held >= set(range(case.budget, policy.max_budget + 1)), "the budget and its overshoot are used"
    if case.policy == "dms":
        everyone = [positions for turn in trace(name, "paged") for seen in turn for x in seen.live for positions in x]
        assert min(map(len, everyone)) < max(map(len, everyone)) and any(len(p) != p[-1] + 1 for p in everyone)


@pytest.mark.parametrize("name", WITH_BUDGET)
def test_with_a_budget_of_everything_a_policy_is_the_full_cache(name):
    """Exactly: the same numbers, not only close ones."""
    for where, ours, full in pairs(trace(name, "paged", CAPACITY, 1), trace("full", "paged", None, 1)):
        assert ours.live == full.live, where
        np.testing.assert_array_equal(ours.out, full.out, err_msg=where)


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_repeated_exactly_and_only_drawing_policies_heed_the_seed(name):
    again, other = (run_turns(CASES[name].build(), "paged", seed) for seed in (0, 1))
    for where, ours, first in pairs(again, trace(name, "paged")):
        assert ours.live == first.live, where
        np.testing.assert_array_equal(ours.out, first.out, err_msg=where)
    same = all(ours.live == first.live for _, ours, first in pairs(other, again))
    assert same == (CASES[name].policy not in DRAWING)


@pytest.mark.parametrize("name", ["tova", "quest", "rkv every 4"])
def test_the_engine_counts_what_was_read_and_held(name):
    """KV reads and peak of chains that draw their own tokens, prompts of three chunks and of one, one row for all."""
    case = CASES[name]
    engine = engine_of(case.build(), steps=4)
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


@pytest.mark.parametrize("name", [*WITH_BUDGET, "dms delayed"])
def test_the_size_of_chunks_changes_nothing(name):
    """A prompt of three chunks and a rest, beside one read at once: the same tokens live and the same are drawn."""
    prompt, found = list(range(T, T + 27)), []
    for size in (CHUNK, 48):
        engine = engine_of(CASES[name].build(), 1, steps=5, prefill_chunk=size, pages=K * CAPACITY // PAGE)
        (result,) = engine.run([Job(prompt, keys(3)[:1], 10)])
        found.append((result.tokens, result.use, result.by_head.live.tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.budget and case.policy != "quest"])
def test_a_protected_prompt_is_never_evicted(name):
    """Prompts under and over the budget: every prompt token lives to the end, beside it what the budget leaves."""
    budget = 16
    policy = dataclasses.replace(CASES[name].build(budget), protect_prompt=True)
    for length in (9, 20):
        engine = engine_of(policy, num_layers=1, steps=5, pages=K * CAPACITY // PAGE)
        (result,) = engine.run([Job(list(range(length)), keys(3)[:1], 20)])
        held = max(budget, length + policy.num_protected + 1)
        assert result.use.peak_tokens == held + policy.evict_every - 1
        assert (result.by_head.live >= held).all() and (result.by_head.live < held + policy.evict_every).all()
        state = engine.runner.state.policy
        assert state.prompt.sum(axis=-1).max() == length


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
    with pytest.raises(ConfigError, match="queries=0: must be at least 1"):
        policies.RKV(16, queries=0)
    with pytest.raises(ConfigError, match="evict_every=0: expected a whole number from 1"):
        policies.named("tova", None, 16, evict_every=0)


def test_a_share_is_rounded_up():
    assert policies.tokens_of(0.25, 101) == 26 and policies.tokens_of(1.0, 7) == 7 and policies.tokens_of(7, 1) == 7
    assert policies.named("tova", None, 0.25, 101).budget == 26


def test_rings_of_many_rows_are_written_alike(rng, monkeypatch):
    ring, value = jnp.asarray(rng.integers(0, 99, (5, K, 4))), jnp.full((5, K), -1)
    given = ring, jnp.asarray([0, 3, 1, 2, 3]), value, jnp.asarray([True, False, True, True, True])
    few = delayed._set(*given)
    monkeypatch.setattr(delayed, "MANY", 4)
    np.testing.assert_array_equal(delayed._set(*given), few)
    assert (few == -1).sum() == 4 * K
