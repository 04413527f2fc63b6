"""A retrofit with another loss, from pure functions alone: Jensen-Shannon divergence in place of KL.

Trains the adapter gate of the mini model for a few steps; base weights stay as they are, so the teacher is the model
itself with eviction off.

usage: python examples/new_loss.py
"""

import jax
import jax.numpy as jnp
import optax

import dms_jax
from dms_jax import dms
from dms_jax.config import DMSConfig
from dms_jax.models.gates import gate_of
from dms_jax.models.transformer import Decoder, arange_positions, causal, self_attention

CONFIG = DMSConfig(window=4, gate="adapter", decision_offset=1)
TARGET = 0.5  # alpha*: half of the tokens are to be evicted
PROBLEM = (
    "Let b = 996, z = 621, v = 248. Set d = b - z, j = 5 * d, m = z + j, a = j + m, t = v - z, q = d + a, e = q + t. "
    "Find e modulo 1000.\n"
)


def jensen_shannon(teacher, student):
    """The divergence of each token, in nats; logits `[B, T, V]`."""
    p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    middle = jnp.logaddexp(p, q) - jnp.log(2.0)
    return 0.5 * jnp.sum(jnp.exp(p) * (p - middle) + jnp.exp(q) * (q - middle), axis=-1)


def soft_eviction(key):
    """An `Attend`: the soft delayed-eviction mask; the state collects the mean decision of each layer."""

    def attend(layer, q, k, v, logit, state):
        noisy = dms.gumbel_sigmoid(logit, jax.random.fold_in(key, layer), CONFIG.tau)
        lengths = jnp.full(q.shape[0], q.shape[1])
        bias = dms.shift(dms.log_keep_prob(noisy), CONFIG.decision_offset, lengths, 0.0)
        out = self_attention(q, k, v, arange_positions(q[..., 0, 0]), bias, CONFIG.window)
        return out, (*state, dms.straight_through(noisy).mean())

    return attend


def main(steps: int = 20) -> list[float]:
    lm = dms_jax.load("mini", dtype="float32")
    tokens = jnp.asarray(lm.tokenizer([PROBLEM])["input_ids"])
    model = Decoder(lm.config, CONFIG)
    params = gate_of(CONFIG).with_gate(lm.params, lm.config)
    positions = arange_positions(tokens)
    gates = {n: params[f"layers_{n}"]["attn"]["gate"] for n in range(lm.config.num_layers)}
    teacher, _ = model.apply({"params": params}, tokens, positions, causal, method="logits")

    def loss(gates, key):
        whole = dict(params)
        for n, gate in gates.items():
            layer = whole[f"layers_{n}"]
            whole[f"layers_{n}"] = layer | {"attn": layer["attn"] | {"gate": gate}}
        student, alphas = model.apply({"params": whole}, tokens, positions, soft_eviction(key), method="logits")
        alpha = jnp.stack(alphas).mean()
        return jensen_shannon(teacher, student).mean() + dms.compression_loss(TARGET, alpha), alpha

    optimizer = optax.adam(1e-2)
    state, losses = optimizer.init(gates), []

    @jax.jit
    def step(gates, state, key):
        (value, alpha), grads = jax.value_and_grad(loss, has_aux=True)(gates, key)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(gates, updates), state, value, alpha

    for n in range(steps):
        gates, state, value, alpha = step(gates, state, jax.random.key(n))
        losses.append(float(value))
        print(f"step {n}: loss {value:.4f}, {alpha:.0%} evicted")
    return losses


if __name__ == "__main__":
    main()
