"""Every policy of the contract, with its oracle, on a model that is a table.

A token's query, key, value and eviction logits are looked up, and the logits of the next token are the attention
outputs themselves. So policies and storages run as in any generation, by `decode.prefill`, `decode.decode_step` and
the engine, on random numbers that the oracle knows too.

A policy is added to the contract by a row in `CASES`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax import policies
from dms_jax.config import DMSConfig, LatentConfig, ModelConfig
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
WITH_BUDGET = [name for name, case in CASES.items() if case.budget]
assert {case.policy for case in CASES.values()} == set(policies.NAMES), "a policy is missing from the contract"


# The model that is a table


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


def of_layers(count: int) -> ModelConfig:
    """The model of the table's first layers."""
    return dataclasses.replace(CONFIG, num_layers=count, vocab_size=count * K * G * D)


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
