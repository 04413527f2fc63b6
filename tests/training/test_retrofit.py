"""The distillation loss, the soft mask and one step of a retrofit: gradients, modes, micro-batches, packed rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import dms
from dms_jax.config import ConfigError, DMSConfig
from dms_jax.models import transformer
from dms_jax.models.gates import GATES, AdapterGate, GateTensor, gate_of
from dms_jax.training.config import LoraConfig, RetrofitConfig
from dms_jax.training.data import Batch, Packed, batch_at, one_document
from dms_jax.training.loss import distillation_loss
from dms_jax.training.parameters import learning_rate, merged_params, overlay, scale_lora, student_params, trained_part
from dms_jax.training.step import Distillation, MicroBatch, SoftEviction
from tests.helpers.models import random_params
from tests.helpers.training import CONFIG, MODEL, POOL, TEACHER, V, start

QUERY = CONFIG.dms

# The loss

T, E = 37, 5
LENGTHS = jnp.array([37, 5, 20])


@pytest.fixture(scope="module")
def hiddens():
    """Hidden states and unembeddings of teacher and student."""
    rng = np.random.default_rng(0)
    shapes = ((3, T, E), (3, T, E), (E, V), (E, V))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def distance(th, sh, tk, sk, chunk, direction="forward", lengths=LENGTHS):
    """The loss as a function of hidden states and unembeddings of teacher and student."""
    real = jnp.arange(th.shape[1]) < lengths[:, None]
    return distillation_loss(th, sh, tk, sk, real, direction, chunk) / lengths.sum()


@functools.partial(jax.jit, static_argnames=("chunk", "direction"))
def distance_and_gradients(*arrays, chunk, direction="forward"):
    return jax.value_and_grad(distance, (0, 1, 2, 3))(*arrays, chunk, direction)


@pytest.mark.parametrize("direction", ("forward", "reverse"))
def test_chunks_change_nothing_and_padding_counts_for_nothing(hiddens, direction):
    th, sh, tk, sk = hiddens
    per_token = np.asarray(dms.kl(th @ tk, sh @ sk, direction), np.float64)
    want = np.concatenate([per_token[b, :n] for b, n in enumerate(LENGTHS)]).mean()
    whole, whole_grads = distance_and_gradients(*hiddens, chunk=T, direction=direction)
    np.testing.assert_allclose(whole, want, rtol=1e-5)
    got, grads = distance_and_gradients(*hiddens, chunk=8, direction=direction)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for g, w in zip(grads[1::2], whole_grads[1::2], strict=True):
        np.testing.assert_allclose(g, w, atol=1e-6)
        assert np.abs(w).max() > 1e-4
    assert not grads[2].any(), "the teacher's weights get no gradient"
    padding = np.arange(T) >= np.asarray(LENGTHS)[:, None]
    assert not np.asarray(grads[1])[padding].any()
    garbage = jnp.where(padding[..., None], 1e4, sh)
    same, _ = distance_and_gradients(th, garbage, tk, sk, chunk=8, direction=direction)
    assert same == got


def test_no_logits_of_the_whole_sequence_are_kept():
    """Scratch of the chunked loss, forward and backward: less than one [B, T, V] float32 array; unchunked: more."""
    T, V = 512, 2048

    def scratch(chunk):
        shapes = ((1, T, E), (1, T, E), (E, V), (E, V))
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        grad = jax.grad(functools.partial(distance, chunk=chunk, lengths=jnp.array([T])), (1, 3))
        return jax.jit(grad).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    one = 4 * T * V
    assert scratch(64) < 0.7 * one < one < scratch(T)


def apply(params, config, attend, neuron_scale=0.0):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (3, 14)))
    positions = transformer.arange_positions(tokens)
    decoder = transformer.Decoder(MODEL, config)
    return decoder.apply({"params": params}, tokens, positions, attend, (), neuron_scale, method="logits")


@pytest.mark.parametrize("gate, offset, sinks", [("query", 0, 0), ("adapter", 1, 2), ("query", 3, 0)])
def test_saturated_soft_mask_is_the_hard_mask(gate, offset, sinks):
    """Logits far beyond the noise: training sees what inference does, and counts what it evicts."""
    config = DMSConfig(window=2, gate=gate, decision_offset=offset, scale=1e6, logit_bias=1e5, sinks=sinks)
    params = random_params(MODEL, config)
    lengths = jnp.array([14, 1, 6])
    batch = one_document(Batch(np.zeros((3, 14), int), np.ones(3, int), np.asarray(lengths)))
    batch = jax.tree.map(jnp.asarray, batch)
    keys = jax.random.split(jax.random.PRNGKey(0), 3)

    @jax.jit
    def both():
        soft = apply(params, config, SoftEviction(config, MicroBatch(batch, keys)))
        return soft, apply(params, config, transformer.hard_eviction(config, lengths))

    (soft, counts), (hard, alphas) = both()
    real = np.asarray(batch.segments > 0)  # what padding sees is no one's concern
    np.testing.assert_allclose(soft[real], hard[real], atol=1e-5)
    assert 0.1 < np.mean(counts) / lengths.sum() < 0.8
    assert not np.any(np.asarray(alphas)[..., :sinks])
    for count, alpha in zip(counts, alphas, strict=True):
        real = np.arange(14) < lengths[:, None, None]
        np.testing.assert_allclose(count, (alpha & real).sum((0, 2)), rtol=1e-5)


def test_a_layer_draws_one_decision():
    """With per="layer" all heads evict the same tokens in training too, also where chance decides."""
    config = DMSConfig(window=2, gate="adapter", scale=1.0, logit_bias=0.0, per="layer")
    batch = jax.tree.map(jnp.asarray, one_document(Batch(np.zeros((3, 14), int), np.ones(3, int), np.full(3, 14))))
    attend = SoftEviction(config, MicroBatch(batch, jax.random.split(jax.random.PRNGKey(0), 3)))
    _, counts = apply(random_params(MODEL, config), config, attend)
    for count in counts:
        assert count[0] == count[1] and 0 < count[0] < 3 * 14


def test_retirement_starts_at_the_teacher_and_ends_without_the_neuron():
    params = random_params(MODEL)

    @functools.partial(jax.jit, static_argnames="config")
    def logits(params, scale, config):
        return apply(params, config, transformer.causal, scale)[0]

    student, teacher = functools.partial(logits, config=QUERY), logits(params, 0.0, None)
    np.testing.assert_array_equal(student(params, 1.0), teacher)
    assert np.abs(dms.kl(teacher, student(params, 1.0))).max() == 0
    without = student(params, 0.0)
    assert np.asarray(dms.kl(teacher, without)).mean() > 1e-3
    reset = gate_of(QUERY).reset_neuron(params, MODEL)
    np.testing.assert_array_equal(student(reset, 0.0), without)
    half = student(params, 0.5)
    assert np.abs(half - teacher).max() > 1e-3 and np.abs(half - without).max() > 1e-3


def test_schedule_of_a_run():
    assert CONFIG.total_steps == 60
    assert dataclasses.replace(CONFIG, dms=DMSConfig(gate="adapter")).retirement == 0
    assert RetrofitConfig().total_steps == 2000 + 700


@pytest.mark.parametrize("warmup", (0, 1, 5))
@pytest.mark.parametrize("hold", (0, 1, 10))
def test_the_learning_rate(warmup, hold):
    """Rises over the warm-up, if there is one, and falls over the hold, if there is one."""
    config = dataclasses.replace(CONFIG, warmup_steps=warmup, hold_steps=hold)
    rate, last = config.learning_rate, config.total_steps - hold
    want = [rate * min(1, n / warmup if warmup else 1) for n in range(last)]
    want += [rate * (1 - n / hold) for n in range(hold)]
    got = jax.vmap(learning_rate(config))(jnp.arange(config.total_steps))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_with_gate_adds_a_gate_that_evicts_nothing():
    adapter = DMSConfig(window=2, gate="adapter")
    params = random_params(MODEL)
    assert gate_of(QUERY).with_gate(params, MODEL) is params
    got = gate_of(adapter).with_gate(params, MODEL)
    want = jax.eval_shape(lambda: transformer.init(jax.random.key(0), MODEL, adapter))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), want)
    assert "gate" not in params["layers_0"]["attn"], "the teacher's tree is as it was"
    own = jax.tree.map(lambda x: x + 1, got)
    again = gate_of(adapter).with_gate(own, MODEL)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(own), strict=True))


# The modes

ADAPTER = DMSConfig(window=2, gate="adapter")


@pytest.mark.parametrize("gate", ("query", "adapter"))
def test_lora_merged_is_what_was_trained(gate):
    """Multiplied out, the low-rank model gives the logits of the one that adds updates as it goes."""
    settings = DMSConfig(window=2, gate=gate)
    lora = LoraConfig(rank=3, alpha=7.0, targets=("q", "o"))
    state, base, config = start(mode="lora", dms=settings, lora=lora)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32), state.params)
    assert len(jax.tree.leaves(trained)) == 2 * (2 * 2 + (2 if gate == "adapter" else 0))
    if gate == "query":
        trained = gate_of(settings).reset_neuron(trained, MODEL)
    under = gate_of(settings).reset_neuron(base, MODEL) if gate == "query" else base
    student = overlay(under, scale_lora(trained, config, jnp.float32))

    @jax.jit
    def logits(params):
        return apply(params, settings, transformer.causal)[0]

    merged = logits(merged_params(base, trained, MODEL, config))
    np.testing.assert_allclose(logits(student), merged, atol=1e-5)
    assert np.abs(merged - logits(overlay(under, gate_of(settings).with_gate({**under}, MODEL)))).max() > 0.1


def test_what_is_trained():
    """Paths of each mode; and that a step changes them all, and nothing but them."""

    def paths(**changes):
        state, _, _ = start(**changes)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(state.params)
        }

    gates = {f"layers_{n}/attn/gate/{name}" for n in range(2) for name in ("norm/scale", "proj/kernel")}
    assert paths(mode="adapter", dms=ADAPTER) == gates
    low = {f"layers_{n}/attn/q/lora/{name}" for n in range(2) for name in "ab"}
    lora = LoraConfig(targets=("q",))
    assert paths(mode="lora", lora=lora) == low and paths(mode="lora", lora=lora, dms=ADAPTER) == low | gates
    assert paths(dms=ADAPTER) == paths() | gates and len(paths()) == 2 * 9 + 3


def test_a_gate_is_trained_wherever_its_tensors_are(monkeypatch):
    tensors = (GateTensor("own/kernel", "own.weight", "E | K"),)
    monkeypatch.setitem(GATES, "adapter", type("Own", (AdapterGate,), {"tensors": tensors}))
    config = dataclasses.replace(CONFIG, mode="adapter", dms=ADAPTER)
    with pytest.raises(ConfigError, match="gate='adapter': its with_gate does not add its tensors"):
        student_params(TEACHER, MODEL, config)
    layer = {"attn": {"own": {"kernel": 1}, "q": {"kernel": 2}}, "mlp": {"own": {"kernel": 3}}}
    assert trained_part({"layers_0": layer}, config) == {"layers_0": {"attn": {"own": {"kernel": 1}}}}


NEAR = dataclasses.replace(ADAPTER, logit_bias=1.0)  # near the threshold, where gradients are large
BATCH = one_document(batch_at(POOL, 0, 8, 0))


@functools.cache
def gradients(**changes):
    """A compiled function: step -> gradients and terms of a batch. CR = 1 + step / 1000."""
    state, base, config = start(dms=NEAR, mode="adapter", max_cr=8.0, steps_per_cr=1000, **changes)
    own = jax.jit(Distillation(MODEL, config, retiring=False).gradients)
    return lambda step: own(state.params, base, BATCH, jnp.array(step))


def assert_close(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6)


def test_micro_batches_change_nothing():
    """Gradients of a batch taken whole, and in micro-batches with blocks recomputed."""
    whole, terms = gradients()(2000)
    assert terms["compression"] > 0.1
    for changes in ({"accumulate": 4, "remat": "block"}, {"accumulate": 2, "remat": "dots", "loss_chunk": 5}):
        parts, same = gradients(**changes)(2000)
        assert same.keys() == terms.keys()
        assert_close((whole, terms), (parts, same))
    assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(whole)[1::2])


def test_the_compression_loss_is_that_of_the_whole_batch():
    """Gradients where the target lies just above and just below mean(alpha), and micro-batches on both sides of it."""
    state, base, config = start(dms=NEAR, mode="adapter", max_cr=8.0)
    loss = jax.jit(Distillation(MODEL, config, retiring=False).loss)

    def alphas(step: int) -> list[float]:
        """mean(alpha) of every micro-batch alone."""
        key = jax.random.fold_in(jax.random.PRNGKey(config.seed), step)
        whole = MicroBatch(BATCH, jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(8)))
        rows = [jax.tree.map(lambda x, n=n: x[n::4], whole) for n in range(4)]
        terms = [loss(state.params, base, own, step, jnp.sum(own.batch.segments > 0))[1] for own in rows]
        return [float(own["alpha_by_head"].mean()) for own in terms]

    compared = set()
    for step in range(400, 500):
        whole, terms = gradients()(step)
        target = 1 - 1 / terms["target_cr"]
        above, near = bool(terms["alpha"] > target), abs(terms["alpha"] - target) < 0.01
        if near and above not in compared and min(alphas(step)) < target < max(alphas(step)):
            assert (terms["compression"] == 0) == above
            assert_close((whole, terms), gradients(accumulate=4, remat="block")(step))
            compared.add(above)
    assert compared == {True, False}


def test_packed_documents_do_not_see_each_other():
    """A row of two documents and padding gives each what it gets alone: hidden states, evictions, loss."""
    config = DMSConfig(window=1, gate="adapter", decision_offset=1)
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, V, 9), rng.integers(0, V, 5)
    params = random_params(MODEL, config)

    def row(*documents):
        parts = [*documents, np.zeros(16 - sum(map(len, documents)), int)]
        segments = np.repeat([*range(1, len(parts)), 0], [len(x) for x in parts])
        return Packed(
            *(x[None] for x in (np.concatenate(parts), np.concatenate([*map(np.arange, map(len, parts))]), segments))
        )

    @jax.jit
    def forward(batch):
        attend = SoftEviction(config, MicroBatch(batch, jax.random.split(jax.random.PRNGKey(0), 1)))
        decoder = transformer.Decoder(MODEL, config)
        return decoder.apply({"params": params}, batch.tokens, batch.positions, attend)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dms, "gumbel_sigmoid", lambda logit, key, tau: logit * 50)
        seen = [forward(row(*documents)) for documents in ((first, second), (first,), (second,))]
    (whole, counts), (one, ones), (two, twos) = seen
    np.testing.assert_allclose(whole[:, :9], one[:, :9], atol=1e-5)
    np.testing.assert_allclose(whole[:, 9:14], two[:, :5], atol=1e-5)
    for count, a, b in zip(counts, ones, twos, strict=True):
        np.testing.assert_allclose(count, a + b, atol=1e-5)
    assert 0 < np.sum(counts) < 0.9 * 14 * 2 * 2
