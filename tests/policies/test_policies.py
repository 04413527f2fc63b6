"""One contract for every eviction policy, and each against a brute-force rendering of its paper.

The policies and the model on which they run are in tests/helpers/policy_cases.py; what an engine counts of them is in
test_policies_in_engine.py.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.cache import kv_cache, paged
from dms_jax.config import CacheConfig
from dms_jax.inference import decode
from dms_jax.policies import dms as delayed
from dms_jax.policies.scored import Candidates
from tests.helpers.models import prefill, step
from tests.helpers.policy_cases import (
    CAPACITY,
    CASES,
    CHUNK,
    LATENT,
    PAGE,
    WITH_BUDGET,
    B,
    D,
    K,
    L,
    N,
    T,
    Table,
    chance,
    keys,
    layers,
    of_layers,
    table,
)

# Evict by a gate, evict by attention, read pages, evict several at once.
ON_MASKED_TOO = ("dms delayed", "tova", "h2o", "quest", "rkv every 4", "keydiff")
# By a gate, by attention, by pages, and all that weigh keys or values.
ON_LATENT_TOO = ("dms delayed", "h2o", "quest", "knorm", "keydiff", "snapkv every 4", "rkv every 4",
                 "vase_attnv every 3", "vase_dkv every 3")  # fmt: skip
STORED = {
    "paged": CASES,
    "paged latent": ON_LATENT_TOO,
    "masked": ON_MASKED_TOO,
    "masked latent": ("dms delayed", "h2o", "quest", "keydiff"),
}
DRAWING = {"random", "random_attention", "vase_attnv", "vase_dkv"}


# A scenario: prompts of unequal length in chunks, idle rows, a second turn, a row that is used again

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


def start(policy, kind: str, num_layers: int):
    """What is compiled, and empty rows with all the pages that they can need."""
    store = kv_cache(CacheConfig(kind.split()[0], CAPACITY, PAGE))
    spec = decode.DecodeSpec(Table(LATENT if "latent" in kind else of_layers(num_layers)), policy, store)
    pages = int(store.pages_needed(np.full((B, num_layers, K), CAPACITY)).max())
    return spec, decode.init(spec, B, jnp.float32, pages)


def run_turns(policy, kind: str, seed: int, num_layers: int = L) -> list[list[Seen]]:
    """What was seen after each turn. Empty slots are poisoned before every turn; short arrays grow on the way."""
    spec, state = start(policy, kind, num_layers)
    store, params, random_keys = spec.kv_cache, table("latent" in kind), keys(seed)
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
            state, out, made = step(spec, params, state._replace(token=jnp.array(fed), done=jnp.array(done)))
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


def pairs(ours, theirs):
    for turn, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        by_sequence = {seen.sequence: seen for seen in b}
        assert {seen.sequence for seen in a} == set(by_sequence)
        for seen in a:
            yield f"turn {turn} {TURNS[turn]}, sequence {seen.sequence}", seen, by_sequence[seen.sequence]


@pytest.mark.parametrize("name, kind", [(name, kind) for kind, names in STORED.items() for name in names])
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


@pytest.mark.parametrize("name", {case.policy: name for name, case in CASES.items() if case.budget}.values())
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


def read_and_step(policy, lengths, size: int, steps: int, num_layers: int = L) -> list[list[Seen]]:
    """What was seen of B sequences after their prompts, read `size` tokens at a time, and after each of some steps."""
    spec, state = start(policy, "paged", num_layers)
    params, lengths, out, reads = table(), np.array(lengths), 0.0, 0
    tokens = np.arange(B)[:, None] * T + np.minimum(np.arange(2 * T), T - 1)
    for begin in range(0, max(lengths), size):
        count, remaining = np.clip(lengths - begin, 0, size), np.maximum(lengths - begin - size, 0)
        part = tokens[:, begin : begin + size]
        chunk = decode.PromptChunk(np.arange(B), part, count, remaining, np.full(B, 99), keys(0)[:B])
        state, new, saw = prefill(spec, params, state, chunk, CAPACITY)
        out = np.where(count[:, None] > 0, new, out)
        reads = reads + np.where(np.arange(size) < count[:, None], saw, 0).sum(axis=1)
    record = []
    for n in range(steps + 1):
        if n:
            fed = jnp.asarray(tokens[np.arange(B), lengths + n - 1], jnp.int32)
            state, out, made = step(spec, params, state._replace(token=fed, done=jnp.zeros(B, bool)))
            reads = np.asarray(made.reads)
        _, found = live_slots(state.cache)
        live = [[[found[b, layer, h] for h in range(K)] for layer in range(num_layers)] for b in range(B)]
        record.append([Seen(b, np.asarray(out)[b], reads[b], live[b]) for b in range(B)])
    return record


@pytest.mark.parametrize("name", [*WITH_BUDGET, "dms delayed"])
def test_the_size_of_chunks_changes_nothing(name):
    """Prompts of up to three chunks and a rest, beside the same read at once: the same is held, read and put out."""
    parts, whole = (read_and_step(CASES[name].build(), (27, 20, 9, 3), size, steps=6) for size in (CHUNK, 32))
    for ours, theirs in zip(sum(parts, []), sum(whole, []), strict=True):
        assert ours.live == theirs.live
        np.testing.assert_array_equal(ours.reads, theirs.reads)
        np.testing.assert_allclose(ours.out, theirs.out, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.budget and case.policy != "quest"])
def test_a_protected_prompt_is_never_evicted(name):
    """Prompts under and over the budget: every prompt token lives to the end, beside it what the budget leaves."""
    budget, lengths = 16, (9, 20, 14, 17)
    policy = dataclasses.replace(CASES[name].build(budget), protect_prompt=True)
    held, most = np.zeros((B, K), int), np.zeros((B, K), int)
    for seen in sum(read_and_step(policy, lengths, CHUNK, steps=20, num_layers=1), []):
        (heads,), b = seen.live, seen.sequence
        assert all(set(range(lengths[b])) <= set(positions) for positions in heads)
        held[b] = [len(positions) for positions in heads]
        most[b] = np.maximum(most[b], held[b])
    least = np.maximum(budget, np.array(lengths) + policy.num_protected + 1)[:, None]
    assert (most == least + policy.evict_every - 1).all() and (held >= least).all()


@pytest.mark.parametrize("name", ("keydiff", "rkv every 4"))
def test_keys_that_are_zero_or_cancel_have_a_rank(name):
    """As in a head that was pruned away; of NaNs none is the largest, and the head would lose all it has."""
    k = jnp.zeros((1, 2, 4, D)).at[0, 1, :, 0].set(jnp.array([1.0, -1.0, 2.0, -2.0]))
    pos = jnp.broadcast_to(jnp.arange(4), (1, 2, 4))
    tokens = Candidates(k, k, pos, jnp.ones(pos.shape), jnp.full((1, 2), 3), jnp.asarray(keys(0)[:1]))
    assert np.isfinite(CASES[name].build().rank(tokens)).all()


def test_rings_of_many_rows_are_written_alike(rng, monkeypatch):
    ring, value = jnp.asarray(rng.integers(0, 99, (5, K, 4))), jnp.full((5, K), -1)
    given = ring, jnp.asarray([0, 3, 1, 2, 3]), value, jnp.asarray([True, False, True, True, True])
    few = delayed._set(*given)
    monkeypatch.setattr(delayed, "MANY", 4)
    np.testing.assert_array_equal(delayed._set(*given), few)
    assert (few == -1).sum() == 4 * K
