"""The absorbed form of latent attention against the expanded one, written out from the parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.config import ConfigError, DMSConfig, LatentConfig, RopeConfig
from dms_jax.kernels import EvictionMask, attention
from dms_jax.models import layers, mla, transformer
from dms_jax.training import flops
from dms_jax.training.config import RetrofitConfig
from dms_jax.training.parameters import student_params
from tests.helpers.models import random_lm, random_params, tiny, tiny_latent

YARN = RopeConfig("yarn", 500.0, 4.0, original_max_positions=16, mscale=1.3, mscale_all_dim=0.7)
CONFIGS = {
    "plain": tiny_latent(),
    "yarn, biases": tiny_latent(rope=YARN, qkv_bias=True, out_bias=True),
    "whole query, halves": tiny_latent(latent=LatentConfig(12, 7, 4, 9, interleaved=False)),
}


def norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def linear(x, p):
    return np.tensordot(x, p["kernel"], 1) + p.get("bias", 0)


def expanded(c, p, x, positions, alpha, window):
    """Keys `[B, T, H, nope + rope]` and values `[B, T, H, value]` of every head, and plain attention over them."""
    latent = c.latent
    q = linear(norm(linear(x, p["q_a"]), p["q_a_norm"]["scale"]), p["q_b"]) if latent.query_rank else linear(x, p["q"])
    entry = linear(x, p["kv_a"])[:, :, 0]
    vector = norm(entry[..., : latent.kv_rank], p["kv_a_norm"]["scale"])
    made = np.tensordot(vector, p["kv_b"]["kernel"], 1)  # per head the nope rows, then the value rows
    turn = {"positions": positions, "rope": c.rope, "interleaved": latent.interleaved}
    turned = layers.apply_rope(jnp.asarray(entry[:, :, None, latent.kv_rank :]), **turn)
    k = np.concatenate([made[..., : latent.nope_dim], np.repeat(turned, c.num_heads, axis=2)], axis=-1)
    q_turned = layers.apply_rope(jnp.asarray(q[..., latent.nope_dim :]), **turn)
    mscale = 1.0 if c.rope.kind == "default" else 0.1 * c.rope.mscale_all_dim * np.log(c.rope.factor) + 1
    q = np.concatenate([q[..., : latent.nope_dim], q_turned], axis=-1) * mscale**2
    keep = np.where(np.repeat(alpha, c.num_heads, axis=1), -1e30, 0.0)
    mask = EvictionMask(positions, positions, jnp.asarray(keep, jnp.float32), window)
    q, k, v = (jnp.asarray(y, jnp.float32) for y in (q, k, made[..., latent.nope_dim :]))
    out = attention.dense(q, k, v, mask)
    return np.tensordot(np.asarray(out), p["o"]["kernel"], 2) + p["o"].get("bias", 0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("window", [0, 5])
def test_the_absorbed_form_is_the_expanded_one_under_the_mask(name, window, rng):
    c, rule = CONFIGS[name], DMSConfig(window=window, gate="adapter", scale=3.0, logit_bias=0.3)
    params = random_params(c, rule)["layers_0"]["attn"]
    B, T = 2, 19
    x = jnp.asarray(rng.normal(size=(B, T, c.model_dim)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    attend = transformer.hard_eviction(rule, jnp.full(B, T))
    module = mla.LatentAttention(c, rule, 0)
    got, (alpha,) = module.apply({"params": params}, x, x, positions, attend, (), 0.0)
    assert 0.2 < alpha.mean() < 0.8
    want = expanded(c, jax.tree.map(np.asarray, params), np.asarray(x), positions, np.asarray(alpha), window)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_gradients_reach_every_parameter():
    c = CONFIGS["yarn, biases"]
    params = random_params(c)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 53, (2, 7)))

    def loss(params):
        given = tokens, transformer.arange_positions(tokens), transformer.causal
        return (transformer.Decoder(c).apply({"params": params}, *given, method="logits")[0] ** 2).sum()

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params)):
        assert np.abs(grad).max() > 1e-5, path


def test_what_latent_attention_cannot_have_is_refused():
    with pytest.raises(ConfigError, match="gate='query': latent attention has no neuron"):
        random_lm(tiny_latent(), DMSConfig())
    for change, message in (
        ({"num_kv_heads": 2}, "num_kv_heads=2: latent attention has one entry"),
        ({"head_dim": 17}, r"head_dim=17: an entry has kv_rank \+ rope_dim = 16 numbers"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(tiny_latent(), **change)
    with pytest.raises(ConfigError, match="latent.rope_dim=3"):
        LatentConfig(12, 7, 3, 9)
    lora = RetrofitConfig(model="", mode="lora", dms=DMSConfig(gate="adapter"))
    with pytest.raises(ConfigError, match="mode='lora'"):
        student_params(random_params(tiny_latent()), tiny_latent(), lora)


def test_an_entry_is_smaller_than_keys_and_values():
    assert tiny_latent().entry_numbers == 16 and tiny(3).entry_numbers == 20
    layers_, _, attention_ = flops.forward_flops(tiny_latent(), keys=10)
    assert attention_ == 2 * 2 * 6 * (16 + 12) * 10 and layers_ > 0
