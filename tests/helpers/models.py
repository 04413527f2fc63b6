"""Tiny models with random weights, and single compiled steps of them, for the tests of decoding and of weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import dms_jax
from dms_jax import policies
from dms_jax.cache import kv_cache
from dms_jax.config import CacheConfig, DMSConfig, LatentConfig, ModelConfig, SamplingConfig
from dms_jax.inference import decode
from dms_jax.models import transformer


def tiny(groups: int = 3, **changes) -> ModelConfig:
    """Two layers of two KV heads with `groups` query heads each; an odd head dim."""
    return ModelConfig(
        family="llama", vocab_size=53, num_layers=2, model_dim=24, num_heads=2 * groups, num_kv_heads=2,
        head_dim=10, mlp_dim=40, **changes,
    )  # fmt: skip


def tiny_latent(**changes) -> ModelConfig:
    """The same with latent attention; dims that are all different."""
    latent = LatentConfig(kv_rank=12, nope_dim=7, rope_dim=4, value_dim=9, query_rank=8)
    return ModelConfig("youtu", 53, 2, 24, 6, 1, 16, 40, **{"latent": latent, **changes})


def random_params(config: ModelConfig, dms: DMSConfig | None = None, seed: int = 1, dtype="float32"):
    """Every weight random, norms and biases too, and large enough for decisions of both kinds and sharp attention.

    Only the shapes come from `init`, which is slow unless it is compiled.
    """
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config, dms))
    rng = np.random.default_rng(seed)

    def weight(path, x):
        return jnp.asarray((path[-1].key == "scale") + 0.3 * rng.normal(size=x.shape), dtype)

    return jax.tree_util.tree_map_with_path(weight, shapes)


def random_lm(config: ModelConfig, dms: DMSConfig | None = None, seed: int = 1, dtype="float32", cr=None) -> dms_jax.LM:
    """A model of random weights, without a tokenizer."""
    return dms_jax.LM(config, random_params(config, dms, seed, dtype), None, dms, cr)


def spec_for(lm, policy: str, cache: CacheConfig) -> decode.DecodeSpec:
    """What a decode step of `lm` is compiled for: greedy, without stop tokens."""
    decoder = transformer.Decoder(lm.config, lm.dms)
    return decode.DecodeSpec(decoder, policies.named(policy, lm.dms), kv_cache(cache), SamplingConfig(), ())


# Compiled without donation, so that a test may use a state twice.
step = jax.jit(decode.decode_step, static_argnames="spec")
prefill = jax.jit(decode.prefill.__wrapped__, static_argnames=("spec", "width"))


@functools.partial(jax.jit, static_argnames=("config", "gate"))
def _forward(params, tokens, window, offset, config, gate):
    attend = transformer.causal
    if gate is not None:  # window and offset are traced, so that one program serves every case of a gate
        rule = object.__new__(DMSConfig)
        for name, value in (("window", window), ("decision_offset", offset), ("sinks", 0)):
            object.__setattr__(rule, name, value)
        attend = transformer.hard_eviction(rule, jnp.full(len(tokens), tokens.shape[1]))
    positions = transformer.arange_positions(tokens)
    return transformer.Decoder(config, gate).apply({"params": params}, tokens, positions, attend, method="logits")


def full_forward(lm, tokens):
    """Teacher-forced logits `[B, T, V]` and alpha `[L, B, K, T]` with the hard mask (no alpha without DMS)."""
    gate, window, offset = lm.dms, 0, 0
    if gate is not None:
        window, offset = gate.window, gate.decision_offset
        gate = dataclasses.replace(gate, window=0, decision_offset=0)  # the decoder itself reads neither
    logits, alpha = _forward(lm.params, jnp.asarray(tokens), window, offset, lm.config, gate)
    return np.asarray(logits), np.stack(alpha) if alpha else None
