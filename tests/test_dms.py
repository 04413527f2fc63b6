"""The method's equations, one by one, against numpy; and what the gates do to a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import dms
from dms_jax.config import ConfigError, DMSConfig, ModelConfig
from dms_jax.models import layers, transformer
from dms_jax.models.gates import gate_of
from dms_jax.types import MASK_VALUE
from tests.helpers.models import random_params

B, T, K, G, D = 2, 6, 2, 3, 10
QUERY = DMSConfig(window=2, scale=3.0, logit_bias=0.5)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def queries(seed=0):
    return np.random.default_rng(seed).normal(size=(B, T, K * G, D)).astype(np.float32)


# The equations


@pytest.mark.parametrize("neuron", (-1, 3))
def test_query_gate(neuron):
    config = dataclasses.replace(QUERY, neuron=neuron)
    q = queries()
    want = np.zeros((B, K, T))
    for b, h, t in np.ndindex(*want.shape):
        want[b, h, t] = 3.0 * q[b, t, h * G, neuron] - 0.5
    logit = dms.query_gate(jnp.asarray(q), K, config)
    np.testing.assert_allclose(logit, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(dms.hard_decisions(logit), want > 0)
    assert not dms.hard_decisions(jnp.zeros((1, 1, 1))).any(), "a logit of 0 keeps"


def test_a_layer_follows_its_head_0():
    x = np.random.default_rng(0).normal(size=(B, T, K)).astype(np.float32)
    logit = dms.affine(jnp.asarray(x), dataclasses.replace(QUERY, per="layer"))
    np.testing.assert_allclose(logit, np.repeat(3.0 * x[:, None, :, 0] - 0.5, K, 1), rtol=1e-5)
    by_head = dms.affine(jnp.asarray(x), QUERY)
    np.testing.assert_allclose(by_head, 3.0 * x.swapaxes(1, 2) - 0.5, rtol=1e-5)


def test_logits_are_float32():
    """scale * x in bfloat16 would round a decision near the threshold."""
    assert dms.query_gate(jnp.asarray(queries(), jnp.bfloat16), K, QUERY).dtype == jnp.float32


def test_scale_neuron_touches_one_neuron_of_each_group():
    q = queries()
    want = q.copy()
    for h in (0, 3):
        want[:, :, h, -1] *= 0.25
    np.testing.assert_allclose(dms.scale_neuron(jnp.asarray(q), 0.25, -1, K), want, rtol=1e-6)
    np.testing.assert_array_equal(dms.scale_neuron(jnp.asarray(q), 1.0, -1, K), q)


N = 100_000


def test_gumbel_sigmoid_decides_with_the_logistic_probability():
    """P(logit + g1 - g2 > 0) = sigmoid(logit), for any tau; 5 sigma. The noise itself is logistic."""
    logits = np.array([-5.0, -1.0, 0.0, 0.5, 2.0])
    grid = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (N, 5))
    noisy = np.asarray(dms.gumbel_sigmoid(grid, jax.random.key(0), 0.1))
    p = sigmoid(logits)
    np.testing.assert_array_less(np.abs((noisy > 0).mean(0) - p), 5 * np.sqrt(p * (1 - p) / N))
    for x in (-2.0, 0.0, 1.5):
        p = sigmoid(x)
        share = (noisy * 0.1 - logits < x).mean()
        assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / (5 * N))
    np.testing.assert_allclose(noisy, 20 * dms.gumbel_sigmoid(grid, jax.random.key(0), 2.0), rtol=1e-4, atol=1e-4)
    # Two Gumbel variables as the paper has it: the same distribution.
    g1, g2 = np.random.default_rng(0).gumbel(size=(2, N, 5))
    quantiles = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(
        np.quantile(noisy * 0.1, quantiles, axis=0), np.quantile(logits + g1 - g2, quantiles, axis=0), atol=0.06
    )


def test_straight_through_has_the_hard_value_and_the_soft_gradient():
    x = jnp.array([-30.0, -1.5, -0.1, 0.0, 0.1, 2.0, 30.0])
    value, gradient = jax.vmap(jax.value_and_grad(dms.straight_through))(x)
    np.testing.assert_array_equal(value, [0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(gradient, sigmoid(x) * sigmoid(-np.asarray(x)), rtol=1e-4, atol=1e-12)


def test_keep_log_is_log_of_one_minus_p_and_stable():
    x = jnp.array([MASK_VALUE, -1e6, -20.0, -1.0, 0.0, 3.0, 50.0, 1e6, 1e30])
    value, gradient = jax.vmap(jax.value_and_grad(dms.log_keep_prob))(x)
    np.testing.assert_allclose(value, -np.logaddexp(0, np.asarray(x, np.float64)), rtol=1e-5)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(gradient, -sigmoid(x), rtol=1e-5, atol=1e-30)
    assert np.isfinite(value).all() and np.isfinite(gradient).all()
    np.testing.assert_array_equal(dms.hard_log_keep_prob(jnp.array([True, False])), np.float32([MASK_VALUE, 0]))


def test_schedule():
    """CR(t) = 1 + t / 100, alpha* = 1 - 1 / CR: the targets of a run that ends at CR 4."""
    crs = [float(dms.target_cr(t, 100, 4.0)) for t in (0, 50, 100, 200, 300, 301, 900)]
    assert crs == [1.0, 1.5, 2.0, 3.0, 4.0, 4.0, 4.0]
    np.testing.assert_allclose([dms.target_alpha(cr) for cr in (1.0, 2.0, 4.0, 8.0)], [0, 0.5, 0.75, 0.875])


def test_compression_loss_is_one_sided():
    grad = jax.value_and_grad(dms.compression_loss, argnums=1)
    for mean, loss, slope in ((0.2, 0.55, -1), (0.74, 0.01, -1), (0.76, 0, 0), (1.0, 0, 0)):
        value, gradient = grad(0.75, mean)
        np.testing.assert_allclose([value, gradient], [loss, slope], atol=1e-6)


def test_kl_both_directions():
    teacher, student = np.random.default_rng(0).normal(size=(2, 3, 4, 9)) * 3

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(teacher), log_softmax(student)
    forward, reverse = (np.exp(p) * (p - q)).sum(-1), (np.exp(q) * (q - p)).sum(-1)
    args = jnp.asarray(teacher, jnp.float32), jnp.asarray(student, jnp.float32)
    np.testing.assert_allclose(dms.kl(*args), forward, rtol=1e-4)
    np.testing.assert_allclose(dms.kl(*args, "reverse"), reverse, rtol=1e-4)
    assert np.abs(forward - reverse).max() > 0.1
    np.testing.assert_allclose(dms.kl(args[0], args[0] + 5), 0, atol=1e-5)
    assert dms.kl(*(x.astype(jnp.bfloat16) for x in args)).dtype == jnp.float32


@pytest.mark.parametrize(
    "field, value",
    [("window", -1), ("gate", "none"), ("per", "token"), ("decision_offset", 4), ("tau", 0.0), ("sinks", -1)],
)
def test_config_names_the_field(field, value):
    assert DMSConfig(window=2, decision_offset=3).decision_offset == 3
    with pytest.raises(ConfigError, match=f"{field}={value!r}"):
        DMSConfig(**{"window": 2, field: value})


# In a model

MODEL = ModelConfig("llama", 31, 2, 12, K * G, K, D, 16)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 12)))


def compiled(model, config, attend):
    """A jitted function (params, neuron_scale) -> logits and the state of `attend`."""

    def run(params, neuron_scale=0.0):
        positions = transformer.arange_positions(TOKENS)
        decoder = transformer.Decoder(model, config)
        return decoder.apply({"params": params}, TOKENS, positions, attend, (), neuron_scale, method="logits")

    return jax.jit(run)


def recording(layer, q, k, v, logit, state):
    """Causal attention; the state collects what each layer was given."""
    return transformer.causal(layer, q, k, v, logit, ())[0], (*state, (q, k, logit))


def with_neuron_times(params, factor):
    """The borrowed neurons' weights, multiplied."""
    params = jax.tree.map(lambda x: x, params)
    for n in range(MODEL.num_layers):
        q = params[f"layers_{n}"]["attn"]["q"]
        q["kernel"] = q["kernel"].at[:, ::G, QUERY.neuron].multiply(factor)
    return params


def test_attention_never_sees_the_borrowed_neuron():
    """A factor keeps the decisions' sign at offset 0 and changes nothing else; unless the neuron is in use."""
    config = dataclasses.replace(QUERY, logit_bias=0.0)
    params = random_params(MODEL, config)
    changed = with_neuron_times(params, 5.0)
    evicting = compiled(MODEL, config, transformer.hard_eviction(config, jnp.full(2, TOKENS.shape[1])))
    want, alphas = evicting(params)
    np.testing.assert_array_equal(evicting(changed)[0], want)
    assert 0.2 < np.mean(alphas) < 0.8
    plain = compiled(MODEL, config, transformer.causal)
    np.testing.assert_array_equal(plain(changed)[0], plain(params)[0])
    assert np.abs(want - plain(params)[0]).max() > 1e-2, "eviction must matter"
    assert np.abs(plain(params, 1.0)[0] - plain(changed, 1.0)[0]).max() > 1e-2


def test_neuron_is_hidden_before_and_after_rope():
    """Attention is given: the neuron at 0, its RoPE partner turned as if it were 0, all else as ever."""
    params = random_params(MODEL, QUERY)
    _, ((original, k, none), *_) = compiled(MODEL, None, recording)(params)
    _, ((q, same_k, logit), *_) = compiled(MODEL, QUERY, recording)(params)
    np.testing.assert_array_equal(k, same_k)
    assert none is None
    x = params["embed"]["embedding"][TOKENS]
    x = layers.RMSNorm(MODEL.norm_eps).apply({"params": params["layers_0"]["attn_norm"]}, x)
    raw = jnp.einsum("BTE,EHD->BTHD", x, params["layers_0"]["attn"]["q"]["kernel"])
    np.testing.assert_allclose(logit, 3.0 * raw[:, :, ::G, -1].swapaxes(1, 2) - 0.5, atol=1e-4)
    hidden = raw.at[:, :, ::G, -1].set(0)
    want = layers.apply_rope(hidden, transformer.arange_positions(TOKENS), MODEL.rope)
    partner = np.asarray(want)[:, :, ::G, D // 2 - 1]
    np.testing.assert_allclose(q, want.at[:, :, ::G, -1].set(0), atol=1e-5)
    assert np.abs(partner - np.asarray(original)[:, :, ::G, D // 2 - 1]).max() > 0.01, "RoPE mixes the two"
    others = [h for h in range(K * G) if h % G]
    np.testing.assert_array_equal(np.asarray(q)[:, :, others], np.asarray(original)[:, :, others])


def test_the_adapter_gate_reads_the_residual_stream():
    """scale * (W rmsnorm(x)) - offset with x before the attention norm."""
    config = dataclasses.replace(QUERY, gate="adapter")
    params = random_params(MODEL, config)
    _, ((_, _, logit), *_) = compiled(MODEL, config, recording)(params)
    x = np.asarray(params["embed"]["embedding"])[TOKENS].astype(np.float64)
    gate = params["layers_0"]["attn"]["gate"]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + MODEL.norm_eps) * np.asarray(gate["norm"]["scale"])
    want = 3.0 * (normed @ np.asarray(gate["proj"]["kernel"])) - 0.5
    np.testing.assert_allclose(logit, want.swapaxes(1, 2), atol=1e-4)


FAMILIES = {
    "llama": MODEL,
    "qwen2": dataclasses.replace(MODEL, family="qwen2", qkv_bias=True),
    "qwen3": dataclasses.replace(MODEL, family="qwen3", qk_norm=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_evicted_at_the_start(family):
    """By default a fresh adapter, and a query gate whose neuron was reset, say -5 everywhere."""
    model = FAMILIES[family]
    adapter = DMSConfig(gate="adapter")
    params = random_params(model, None)

    @jax.jit  # drops what is not asked for
    def fresh_gates():
        fresh = transformer.init(jax.random.key(0), model, adapter)
        return [fresh[f"layers_{n}"]["attn"]["gate"] for n in range(model.num_layers)]

    for n, gate in enumerate(fresh_gates()):
        params[f"layers_{n}"]["attn"]["gate"] = gate
    _, seen = compiled(model, adapter, recording)(params)
    np.testing.assert_array_equal(np.stack([logit for _, _, logit in seen]), -5.0)

    query = DMSConfig(gate="query")
    run = compiled(model, query, recording)
    before = {path: np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    reset = gate_of(query).reset_neuron(params, model)
    for tree, share in ((reset, 0), (params, 0.2)):
        logits = np.stack([logit for _, _, logit in run(tree)[1]])
        assert (logits > 0).mean() > share if share else (logits == -5).all()
    # The caller's tree is as it was, and nothing but the neurons differs.
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        np.testing.assert_array_equal(x, before[path])
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(reset), jax.tree.leaves(params), strict=True):
        name = jax.tree_util.keystr(path)
        changed = np.asarray(x != y)
        if "['q']" in name:
            assert changed[..., ::G, -1].all() and changed.sum() == changed[..., ::G, -1].size, name
        else:
            assert not changed.any(), name
