"""Storage and the DMS policy without a model: every storage == the mask's definition, and no page is ever lost.

A history of random queries, keys, values and eviction logits is fed in turns (chunks of a prompt and single steps,
different for each sequence); every attention output is compared with dense attention over the whole history.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dms_jax import dms
from dms_jax.cache import DecodeQuery, kv_cache, paged
from dms_jax.config import CacheConfig, ConfigError, DMSConfig, LatentConfig, ModelConfig
from dms_jax.dms import hard_log_keep_prob
from dms_jax.kernels import EvictionMask, attention
from dms_jax.models import layers, transformer
from dms_jax.policies import DecodeStep, DelayedEviction, NewToken, PrefillChunk

B, K, G, D, U, L, TOTAL, CHUNK = 3, 2, 3, 6, 4, 2, 36, 8
MODEL = ModelConfig("llama", 8, L, 8, K * G, K, D, 8)
LATENT = dataclasses.replace(MODEL, num_kv_heads=1, latent=LatentConfig(U, 1, D - U, 1))
object.__setattr__(LATENT, "num_kv_heads", K)  # for storage there may be two such heads
CAPACITY = 40  # of masked storage, which keeps a slot for every token
KEYS = np.zeros((B, 2), np.uint32)


def history(seed, shares):
    """Random q, k, v, eviction logits of L layers; `shares[l][k]` of the tokens of a head are marked."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(L, B, TOTAL, n, D)).astype(np.float32) for n in (K * G, K, K))
    logit = np.where(rng.random((L, B, K, TOTAL)) < np.array(shares)[:, None, :, None], 1.0, -1.0)
    return q, k, v, logit.astype(np.float32)


@functools.partial(jax.jit, static_argnames=("window", "offset"))
def oracle(q, k, v, logit, window, offset):
    """Teacher-forced outputs `[L, B, T, H, D]` and who is live after each token `[L, B, K, T, T]`."""
    pos = jnp.broadcast_to(jnp.arange(TOTAL), (B, TOTAL))
    lengths = jnp.full(B, TOTAL)
    alpha = [dms.shift(x > 0, offset, lengths, False) for x in logit]
    masks = [EvictionMask(pos, pos, hard_log_keep_prob(a), window) for a in alpha]
    outs = [attention.dense(q[n], k[n], v[n], masks[n]) for n in range(L)]
    per_head = jnp.broadcast_to(pos[:, None], (B, K, TOTAL))
    seen = [dms.visible(pos, per_head, a, window) for a in alpha]
    return jnp.stack(outs), jnp.stack(seen)


def rules(window, offset, kind, page):
    dms = DelayedEviction(DMSConfig(window=window, decision_offset=offset))
    return dms, kv_cache(CacheConfig(kind, CAPACITY, page))


@functools.partial(jax.jit, static_argnames=("rule", "width"))
def read_chunk(rule, cache, states, q, k, v, logit, start, count, width):
    """What `decode.prefill` does in each layer."""
    dms, store = rules(*rule)
    query_pos = start[:, None] + jnp.arange(CHUNK)
    token_pos = jnp.where(jnp.arange(CHUNK) < count[:, None], query_pos, -1)
    outs, new = [], []
    for n in range(L):
        old = store.view(cache, n, width)
        chunk = PrefillChunk(n, start, count, 0 * count, old.pos, k[n], v[n], logit[n], KEYS)
        alpha = dms.prefill_evict_mask(states[n], chunk)
        keys, values = (jnp.concatenate([a.swapaxes(1, 2), b], 1) for a, b in ((old.k, k[n]), (old.v, v[n])))
        mask = EvictionMask(query_pos, chunk.positions(), hard_log_keep_prob(alpha), dms.window)
        outs.append(attention.dense(q[n], keys, values, mask))
        keep, carry = dms.prefill_keep_mask(states[n], chunk, alpha, None)
        cache, slots = store.write_prefill(cache, n, k[n], v[n], token_pos, keep, None)
        new.append(dms.commit_prefill(states[n], chunk, carry, slots))
    return cache, tuple(new), jnp.stack(outs)


@functools.partial(jax.jit, static_argnames=("rule",))
def one_step(rule, cache, states, q, k, v, logit, position, active):
    """What `decode.decode_step` does, layer by layer."""
    dms, store = rules(*rule)
    admitted = store.can_append(cache, active)
    outs, new = [], []
    for n in range(L):
        step = DecodeStep(n, position, admitted, store.live(cache)[n], KEYS)
        victim, own = dms.choose_victim(states[n], step, logit[n])
        cache, slots = store.append(cache, n, position, victim[None], admitted)
        cache, out, _ = store.attend(cache, n, DecodeQuery(q[n], k[n], v[n], slots), False)
        new.append(dms.update(own, step, NewToken(slots[0], k[n], v[n], logit[n], None)))
        outs.append(out)
    return cache, tuple(new), jnp.stack(outs), admitted


def check_pages(cache, expected_lengths):
    """A plain account of the pool: every page is free or owned by exactly one head, and lengths are as expected."""
    page = paged.page_size(cache)
    table, length = np.asarray(cache.table), np.asarray(cache.length)
    np.testing.assert_array_equal(length, expected_lengths)
    free = np.asarray(cache.free)[: int(cache.top)].tolist()
    owned = [int(p) for index in np.ndindex(length.shape) for p in table[index][: -(-int(length[index]) // page)]]
    assert sorted(free + owned) == list(range(len(cache.free))), "a page is lost or owned twice"


def check(kind, cache, expected_lengths):
    if kind == "paged":
        check_pages(cache, expected_lengths)


def test_what_a_page_is_in_each_storage():
    """Pages of two rows of 2 x 2 heads, in pages of 3 slots; a capacity of 40 is 14 pages."""
    tokens = np.array([[[0, 1], [3, 4]], [[7, 50], [0, 0]]])
    made = {kind: kv_cache(CacheConfig(kind, CAPACITY, 3)) for kind in ("masked", "paged")}
    want = {"masked": 0, "paged": 0 + 1 + 1 + 2 + 3 + 17}
    assert {kind: store.pages_needed(tokens).tolist() for kind, store in made.items()} == {
        k: [n] for k, n in want.items()
    }
    store = made["paged"]
    free, pages, page_bytes = store.pool(store.grow(store.allocate(MODEL, B, jnp.float32, 2), 5))
    assert (free.tolist(), pages, page_bytes) == ([5], 5, 3 * (2 * D * 4 + 4))
    cache = store.allocate(MODEL, B, jnp.float32, 2)
    assert store.pool(store.grow(cache, 2)) == store.pool(cache)
    with pytest.raises(ConfigError, match="pages=0: a paged cache needs a pool"):
        store.allocate(MODEL, B, jnp.float32)


@pytest.mark.parametrize("quant, number, scales", [("none", 2, 0), ("int8", 1, 8)])
def test_a_latent_entry_is_stored_once(quant, number, scales):
    """Youtu-LLM's shape in bfloat16: 576 numbers a token and layer, in one pool, and its position."""
    model = ModelConfig("youtu", 8, L, 8, 16, 1, 576, 8, latent=LatentConfig(512, 128, 64, 128))
    config = CacheConfig("paged", CAPACITY, 8, quant)
    cache = kv_cache(config).allocate(model, B, jnp.bfloat16, 6)
    assert sum(x.nbytes for x in (cache.k, cache.v)) == 6 * 8 * 576 * number  # two scales: see kernels/quant.py
    page_bytes = kv_cache(config).pool(cache).page_bytes
    assert page_bytes == 8 * (576 * number + scales + 4) == paged.bytes_per_page(model, config, jnp.bfloat16)
    masked = kv_cache(CacheConfig("masked", CAPACITY)).allocate(model, B, jnp.bfloat16)
    assert sum(x.nbytes for x in (*masked.k, *masked.v)) == L * B * CAPACITY * 576 * 2


def test_quantized_latent_entries(rng):
    """A chunk and a step: attention, and the view whose values are a part of its keys."""
    T, config = 7, CacheConfig("paged", 8, 4, "int8")
    q, k = (jnp.asarray(rng.normal(size=(B, T, n, D)), jnp.float32) for n in (K * G, K))
    k *= jnp.where(jnp.arange(D) < U, 1.0, 50.0)  # the part that RoPE turns has a scale of its own
    q *= jnp.where(jnp.arange(D) < U, 1.0, 0.02)
    v, store, found = k[..., :U], kv_cache(config), {}
    position, keep = jnp.broadcast_to(jnp.arange(T - 1), (B, T - 1)), jnp.ones((B, K, T - 1), bool)
    for kind in ("none", "int8"):
        store = kv_cache(dataclasses.replace(config, quant=kind))
        cache = store.allocate(LATENT, B, jnp.float32, 2 * L * B * K)
        cache, _ = store.write_prefill(cache, 1, k[:, :-1], v[:, :-1], position, keep)
        cache, slot = store.append(cache, 1, jnp.full(B, T - 1), jnp.full((1, B, K), -1), jnp.ones(B, bool))
        cache, out, _ = store.attend(cache, 1, DecodeQuery(q[:, -1], k[:, -1], v[:, -1], slot), False)
        view = store.view(cache, 1, T)
        np.testing.assert_array_equal(view.v, view.k[..., :U])
        found[kind] = out, view.k
    np.testing.assert_allclose(found["none"][1], k.swapaxes(1, 2), atol=1e-6)
    assert 0 < np.abs(found["int8"][0] - found["none"][0]).max() < 0.03
    errors = np.abs(found["int8"][1] - found["none"][1])
    assert 0 < errors[..., :U].max() < 0.03 and 0.03 < errors[..., U:].max() < 1.0


@pytest.mark.parametrize("kind", ("masked", "paged"))
def test_pages_that_may_be_read_are_pages_of_the_configuration(kind):
    """A page size that does not divide the capacity: of 9 tokens in pages of 4, those of pages 0 and 2 are read."""
    store, T = kv_cache(CacheConfig(kind, 9, 4)), 9
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, D)), jnp.float32) for n in (K * G, K, K))
    cache, at = store.allocate(MODEL, B, jnp.float32, L * B * K * 3), jnp.broadcast_to(jnp.arange(T), (B, T))
    for n in range(T):
        cache, slot = store.append(cache, 0, at[:, n], jnp.full((1, B, K), -1), jnp.ones(B, bool))
        cache, *_ = store.attend(cache, 0, DecodeQuery(q[:, n], k[:, n], v[:, n], slot), False)
    readable = jnp.broadcast_to(jnp.array([True, False, True]), (B, K, 3))
    query = DecodeQuery(q[:, 0], k[:, 0], v[:, 0], jnp.full((1, B, K), store.slots), readable)
    _, out, weights = store.attend(cache, 0, query, True)
    pages = np.repeat([True, False, True], 4)[:T]
    kept = jnp.zeros((B, K, int(pages.sum())))
    mask = EvictionMask(jnp.full((B, 1), T), at[:, pages], kept, 0)
    want = attention.dense(q[:, :1], k[:, pages], v[:, pages], mask)
    np.testing.assert_allclose(out, want[:, 0], atol=1e-5)
    assert weights.shape == (B, K, store.slots)
    np.testing.assert_array_equal(weights[0, 0] > 0, np.pad(pages, (0, store.slots - T)))


@pytest.mark.parametrize("kind, quant, latent", [("masked", "none", 0), ("masked", "none", 1), ("paged", "none", 0),
                                                 ("paged", "none", 1), ("paged", "int8", 0)])  # fmt: skip
def test_numbers_of_a_sequence_that_was_freed_reach_no_other(kind, quant, latent, rng):
    """A sequence whose keys and values are not finite, and then another in its slots: a chunk, the view and a step."""
    store, T, model = kv_cache(CacheConfig(kind, 8, 4, quant)), 3, LATENT if latent else MODEL
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, D)), jnp.float32) for n in (K * G, K, K))
    v = k[..., :U] if latent else v
    position, one = jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.ones(B, bool)

    def read(cache, times):
        keep = jnp.ones((B, K, T - 1), bool)
        cache, _ = store.write_prefill(cache, 0, times * k[:, 1:], times * v[:, 1:], position[:, 1:], keep)
        view = store.view(cache, 0, 4)
        cache, slot = store.append(cache, 0, jnp.full(B, T), jnp.full((1, B, K), -1), one)
        query = DecodeQuery(q[:, 0], times * k[:, 0], times * v[:, 0], slot)
        cache, out, weights = store.attend(cache, 0, query, True)
        return cache, (out, weights, *view)

    cache, want = read(store.allocate(model, B, jnp.float32, B * K), 1.0)
    cache, broken = read(store.free(cache, one), jnp.nan)
    assert np.isnan(broken[0]).all()
    cache, got = read(store.free(cache, one), 1.0)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


def test_keys_far_from_zero_keep_their_precision_where_the_offset_is_known(rng):
    """Keys of Qwen2, in which a few dims are 145 beside others around 1: a chunk and a step, attention and view."""
    T, common = 7, np.zeros((L, K, D), np.float32)
    common[:, :, -2:] = rng.choice([-145.0, 120.0], (L, K, 2))
    common = jnp.asarray(common)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, D)), jnp.float32) for n in (K * G, K, K))
    k += common[1]
    position, keep = jnp.broadcast_to(jnp.arange(T - 1), (B, T - 1)), jnp.ones((B, K, T - 1), bool)

    def attended(quant, offset):
        store = kv_cache(CacheConfig("paged", 8, 4, quant))
        cache = store.center(store.allocate(MODEL, B, jnp.float32, 2 * L * B * K), offset)
        cache, _ = store.write_prefill(cache, 1, k[:, :-1], v[:, :-1], position, keep)
        cache, slot = store.append(cache, 1, jnp.full(B, T - 1), jnp.full((1, B, K), -1), jnp.ones(B, bool))
        cache, out, _ = store.attend(cache, 1, DecodeQuery(q[:, -1], k[:, -1], v[:, -1], slot), False)
        return out, store.view(cache, 1, T).k

    exact, keys = attended("none", common)
    np.testing.assert_allclose(keys, k.swapaxes(1, 2), atol=1e-6)
    errors = [np.abs(attended("int8", offset)[0] - exact).max() for offset in (0 * common, common)]
    assert errors[1] < 0.03 and errors[1] < errors[0] / 5
    np.testing.assert_allclose(attended("int8", common)[1], keys, atol=0.05)


def test_the_offset_of_keys_is_their_mean_rotated_bias(rng):
    config = dataclasses.replace(MODEL, qkv_bias=True)
    params = transformer.init(jax.random.key(0), config)
    want = np.zeros((L, K, D))
    for n in range(L):
        bias = rng.normal(size=(K, D)).astype(np.float32)
        params[f"layers_{n}"]["attn"]["k"]["bias"] = jnp.asarray(bias)
        at = jnp.arange(TOTAL)[None]
        want[n] = layers.apply_rope(jnp.broadcast_to(bias, (1, TOTAL, K, D)), at, config.rope)[0].mean(axis=0)
    np.testing.assert_allclose(transformer.mean_key_bias(params, config, TOTAL), want, atol=1e-5)
    assert transformer.mean_key_bias(params, MODEL, TOTAL) is None


# Window, offset; every second one with latent attention
STATIC = [(0, 0), (0, 1), (3, 0), (3, 2), (3, 4), (16, 1), (50, 0)]


@settings(max_examples=24, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rule=st.sampled_from([(w, o, page, n % 2) for n, (w, o) in enumerate(STATIC) for page in (1, 3, 8)[n % 3 :: 3]]),
    seed=st.integers(0, 2**31),
    shares=st.lists(st.lists(st.sampled_from([0.0, 0.5, 0.9, 1.0]), min_size=K, max_size=K), min_size=L, max_size=L),
    turns=st.lists(st.one_of(st.none(), st.lists(st.integers(0, CHUNK), min_size=B, max_size=B)), max_size=7),
)
def test_every_storage_equals_the_definition_turn_by_turn(rule, seed, shares, turns):
    """A turn is a chunk of so many tokens for each sequence, or None: a decode step for all."""
    window, offset, page, latent = rule
    q, k, v, logit = history(seed, shares)
    v = k[..., :U] if latent else v
    want, seen = (np.asarray(x) for x in oracle(q, k, v, logit, window, offset))
    for kind in ("masked", "paged"):
        dms, store = rules(window, offset, kind, page)
        model = LATENT if latent else MODEL
        cache = store.allocate(model, B, jnp.float32, int(store.pages_needed(np.full((B, L, K), CAPACITY)).max()))
        states = tuple(dms.init_state(B, K, store.slots, D) for _ in range(L))
        position = np.zeros(B, np.int32)
        for turn in [[1, CHUNK, 3], *turns, None]:
            count = np.minimum(np.ones(B, int) if turn is None else turn, TOTAL - position).astype(np.int32)
            at = position[:, None] + np.arange(CHUNK if turn else 1)
            rows = np.arange(B)[:, None], np.minimum(at, TOTAL - 1)
            now = [x[:, rows[0], rows[1]] for x in (q, k, v)]
            now_logit = np.moveaxis(np.moveaxis(logit, 2, 3)[:, rows[0], rows[1]], 3, 2)
            rule_key = (window, offset, kind, page)
            if turn is None:
                args = [x[:, :, 0] for x in now]
                cache, states, outs, admitted = one_step(
                    rule_key, cache, states, *args, now_logit[..., 0], position, count > 0
                )
                np.testing.assert_array_equal(admitted, count > 0)
                outs = np.asarray(outs)[:, :, None]
            else:
                width = 0 if not position.any() else store.slots
                cache, states, outs = read_chunk(rule_key, cache, states, *now, now_logit, position, count, width)
            for b in range(B):
                mine = slice(position[b], position[b] + count[b])
                np.testing.assert_allclose(np.asarray(outs)[:, b, : count[b]], want[:, b, mine], atol=1e-4)
            position = position + count
            # After token p, who is live is who token p could see.
            live = np.where(position[:, None] > 0, seen[:, np.arange(B), :, position - 1].sum(-1).swapaxes(0, 1), 0)
            np.testing.assert_array_equal(store.live(cache), live)
            check(kind, cache, live)
        cache = store.free(cache, jnp.array([True, False, True]))
        live[:, [0, 2]] = 0
        np.testing.assert_array_equal(store.live(cache), live)
        check(kind, cache, live)
        if kind != "masked":
            pool = store.pool(store.free(cache, jnp.ones(B, bool)))
            assert pool.free == pool.size, "pages leak"
