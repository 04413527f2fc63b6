"""Decoding step by step equals the teacher-forced forward, and the counts equal a brute-force count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.config import CacheConfig, DMSConfig
from dms_jax.inference import decode, generation, sampling
from dms_jax.models import transformer
from tests.helpers.models import full_forward, prefill, random_lm, spec_for, step, tiny, tiny_latent

LENGTHS = (9, 1, 5, 14)
TOTAL = 40


MASKED, PAGED = (CacheConfig(kind, 48, page_size=4) for kind in ("masked", "paged"))
ROWS = (2, 0, 3, 1)  # where the sequences lie: a row is not a sequence's number


def forced_decode(lm, tokens, lengths, policy="dms", cache=PAGED, chunk=14):
    """Logits `[steps, B, V]` of feeding `tokens` one by one after prompts of the given lengths, and the counts."""
    spec, B = spec_for(lm, policy, cache), len(lengths)
    lengths, rows = np.array(lengths), np.array(ROWS[:B])
    state = decode.init(spec, B + 1, jnp.float32, pages=300)
    first, seen = np.zeros((B, lm.config.vocab_size), np.float32), []
    for start in range(0, max(lengths), chunk):
        count = np.clip(lengths - start, 0, chunk)
        part = np.where(np.arange(chunk) < count[:, None], tokens[:, start : start + chunk], 0)
        keys = np.zeros((B, 2), np.uint32)  # greedy: no noise is drawn
        width = 16 if start else 0
        remaining = np.maximum(lengths - start - chunk, 0)
        prompt = decode.PromptChunk(rows, part, count, remaining, np.full(B, 99), keys)
        state, logits, saw = prefill(spec, lm.params, state, prompt, width)
        first = np.where(count[:, None] > 0, logits, first)
        seen.append(saw)
    all_logits, all_live = [first], []
    for n in range(TOTAL - max(lengths)):
        fed = np.zeros(B + 1, np.int32)
        fed[rows] = tokens[np.arange(B), lengths + n]
        state, logits, chunk_out = step(spec, lm.params, state._replace(token=jnp.asarray(fed)))
        all_logits.append(logits[rows])
        all_live.append(chunk_out.live[rows])
    return np.stack(all_logits), np.stack(all_live), np.concatenate(seen, axis=1)


CASES = [
    (w, o, gate, per)
    for w in (0, 1, 7, 16)
    for o in sorted({0, 1, w})
    for gate, per in (("query", "head"), ("adapter", "head"), ("adapter", "layer"))
    if (w, o) == (7, 1) or per == "head" and gate == ("query", "adapter")[o % 2]
]


@pytest.mark.parametrize("window, offset, gate, per", CASES)
def test_decode_equals_teacher_forced_forward(window, offset, gate, per):
    """On every storage, the prompt in one chunk or in three; tests/test_cache.py draws more freely."""
    dms = DMSConfig(window=window, decision_offset=offset, gate=gate, per=per, scale=3.0, logit_bias=0.3)
    lm = random_lm(tiny(), dms, seed=window * 31 + offset)
    tokens = np.random.default_rng(window + offset).integers(0, 53, (len(LENGTHS), TOTAL + 8))
    want, alpha = full_forward(lm, tokens[:, :TOTAL])
    assert 0.2 < alpha.mean() < 0.8, "both decisions must occur"
    cache, chunk = (PAGED, 14) if gate == "query" else (PAGED, 5) if window % 2 else (MASKED, 5)
    check_forced(forced_decode(lm, tokens, LENGTHS, cache=cache, chunk=chunk), want, alpha, window)


def check_forced(decoded, want, alpha, window):
    """Logits as of the forward pass, live and seen keys as by the definition."""
    got, live, seen = decoded
    for b, length in enumerate(LENGTHS):
        steps = TOTAL - max(LENGTHS)
        np.testing.assert_allclose(got[:, b], want[b, length - 1 : length + steps], atol=1e-4)
        brute = brute_live(alpha[:, b], window)  # [L, K, T]
        np.testing.assert_array_equal(live[:, b], np.moveaxis(brute[..., length : length + steps], -1, 0))
        np.testing.assert_array_equal(seen[b, :length], brute[..., :length].sum((0, 1)))


@pytest.mark.parametrize("window, offset", [(0, 0), (1, 1), (7, 0), (16, 1)])
def test_latent_decoding_equals_teacher_forced_forward(window, offset):
    """One entry a token, layer and decision; tests/models/test_mla.py has the forward pass against expanded keys."""
    dms = DMSConfig(window=window, decision_offset=offset, gate="adapter", scale=3.0, logit_bias=0.3)
    lm = random_lm(tiny_latent(), dms, seed=window * 31 + offset)
    tokens = np.random.default_rng(window + offset).integers(0, 53, (len(LENGTHS), TOTAL + 8))
    want, alpha = full_forward(lm, tokens[:, :TOTAL])
    assert alpha.shape[2] == 1 and 0.2 < alpha.mean() < 0.8, "both decisions must occur"
    cache, chunk = (PAGED, 14) if offset else (MASKED if window else PAGED, 5)
    check_forced(forced_decode(lm, tokens, LENGTHS, cache=cache, chunk=chunk), want, alpha, window)


def brute_live(alpha, window):
    """Live keys for each query by the definition, `[L, K, T]`: one loop over queries, one over keys."""
    live = np.zeros(alpha.shape, int)
    for i in range(alpha.shape[-1]):
        for j in range(i + 1):
            live[..., i] += (i - j <= window) | ~alpha[..., j]
    return live


@pytest.mark.parametrize("groups", [1, 3, 7])
def test_full_policy_equals_plain_causal_attention(groups):
    lm = random_lm(tiny(groups), None)
    tokens = np.random.default_rng(groups).integers(0, 53, (len(LENGTHS), TOTAL + 8))
    want, _ = full_forward(lm, tokens[:, :TOTAL])
    got, live, _ = forced_decode(lm, tokens, LENGTHS, "full")
    for b, length in enumerate(LENGTHS):
        steps = TOTAL - max(LENGTHS)
        np.testing.assert_allclose(got[:, b], want[b, length - 1 : length + steps], atol=1e-4)
        np.testing.assert_array_equal(
            live[:, b], np.broadcast_to(np.arange(length, length + steps)[:, None, None] + 1, live[:, b].shape)
        )


STOP = [3, 11, 12, 30, 40]
SAMPLED = {"max_new_tokens": 30, "temperature": 1.0, "chains": 2, "stop": STOP}
PROMPTS = [[5, 6, 7], [1], [9] * 12]


def test_generate_counts_and_stops_as_by_hand():
    lm = random_lm(tiny(), DMSConfig(window=3, scale=3.0, logit_bias=0.3))
    out = generation.generate(lm, PROMPTS, seed=4, **SAMPLED)
    ended = 0
    for p, prompt in enumerate(PROMPTS):
        for c in range(2):
            new = out.tokens[p][c]
            ended += len(new) < 30
            assert len(new) == 30 or new[-1] in STOP
            assert not set(new[:-1]) & set(STOP)
            n, seen = len(prompt), len(prompt) + len(new) - 1  # the last token never enters the cache
            # Padded to one shape: with offset 0 no decision depends on what follows.
            _, alpha = full_forward(lm, np.array([(prompt + new + [0] * 50)[:50]]))
            live = brute_live(alpha[:, 0, :, :seen], 3).mean((0, 1))
            np.testing.assert_allclose(out.prefill_reads[p, c], live[:n].sum(), rtol=1e-6)
            np.testing.assert_allclose(out.kv_reads[p, c], live[n:].sum(), rtol=1e-6)
            np.testing.assert_allclose(out.peak_tokens[p, c], live.max(), rtol=1e-6)
            np.testing.assert_allclose(out.achieved_cr[p, c], seen / live[-1], rtol=1e-6)
    assert 0 < ended, "some chain must have met a stop token"


def test_products_are_joined_for_few_rows_only(monkeypatch):
    made, asked = {}, []
    lm = random_lm(tiny(), None)
    spec = spec_for(lm, "full", PAGED)
    state = decode.init(spec, 65, jnp.float32, pages=1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "jit", lambda f, **options: options["compiler_options"])
    for few in (True, False):
        options = decode.compiled_chunk.__wrapped__(few)
        made[few] = options.pop("xla_gpu_dot_merger_threshold_mb")
        assert options == {"xla_disable_hlo_passes": "dot-strength-reduction"}
    assert made == {True: 256, False: 0}

    def program(few):
        asked.append(few)
        return lambda *given: (state, decode.Chunk(*[None] * 7))

    monkeypatch.setattr(decode, "compiled_chunk", program)
    for batch in (None, 64, 65):
        decode.decode_chunk(spec, lm.params, state, 1, batch)
    assert asked == [False, True, False]


def test_a_chunk_inside_another_jit():
    lm = random_lm(tiny(), None)
    spec = spec_for(lm, "full", PAGED)
    state = decode.init(spec, 2, jnp.float32, pages=50)._replace(
        done=jnp.zeros(2, bool), last=jnp.full(2, 40, jnp.int32), token=jnp.asarray([3, 4])
    )
    chunk = jax.jit(lambda params, state: decode.decode_chunk(spec, params, state, 3)[1].tokens)
    inside = chunk(lm.params, state)
    np.testing.assert_array_equal(inside, decode.decode_chunk(spec, lm.params, state, 3)[1].tokens)
    assert len(np.unique(inside)) > 2


@pytest.mark.parametrize("per", ["head", "layer"])
def test_adapter_gates_of_all_layers_at_once(per):
    lm = random_lm(tiny(), DMSConfig(gate="adapter", scale=2.0, logit_bias=0.3, per=per))
    rng = np.random.default_rng(3)
    for n in range(lm.config.num_layers):
        norm = lm.params[f"layers_{n}"]["attn"]["gate"]["norm"]
        norm["scale"] = jnp.asarray(rng.normal(size=norm["scale"].shape), jnp.float32)
    model, tokens = transformer.Decoder(lm.config, lm.dms), jnp.asarray(rng.integers(0, 53, (3, 5)))

    def attend(layer, q, k, v, logit, state):
        return transformer.causal(layer, q, k, v, logit, state)[0], (*state, logit)

    given = {"params": lm.params}, tokens, transformer.arange_positions(tokens), attend
    _, each, residuals = model.apply(*given, method="with_residuals")
    together = model.gate.logits_from_residuals(lm.params, residuals, lm.config)
    assert together.shape == (2, 3, 2, 5)
    np.testing.assert_allclose(together, each, rtol=1e-5, atol=1e-5)


def test_chain_does_not_depend_on_its_company():
    lm = random_lm(tiny(), DMSConfig(window=3, scale=3.0, logit_bias=0.3))
    together = generation.generate(lm, PROMPTS, seed=9, **SAMPLED)
    keys = sampling.chain_keys(9, np.array([2, 2]), np.array([0, 1]))
    alone = generation.generate(lm, PROMPTS[2:], seed=9, keys=keys, **SAMPLED)
    assert together.tokens[2] == alone.tokens[0]
    first = generation.generate(lm, PROMPTS[:1], seed=9, **SAMPLED)
    assert together.tokens[0] == first.tokens[0]
    assert first.tokens[0][0] != first.tokens[0][1]
    again = generation.generate(lm, PROMPTS[:1], seed=10, **SAMPLED)
    assert again.tokens != first.tokens


def test_greedy_is_the_argmax_of_the_forward():
    lm = random_lm(tiny(), DMSConfig(window=3, scale=3.0, logit_bias=0.3))
    prompt = [5, 6, 7]
    out = generation.generate(lm, [prompt], 12, stop=[])
    new = out.tokens[0][0]
    logits, _ = full_forward(lm, np.array([prompt + new]))
    assert new == logits[0, 2:-1].argmax(-1).tolist()
    assert len(new) == 12 and len(set(new)) > 2
