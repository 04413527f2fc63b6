"""Drawing the next token: greedy, temperature, top-k, top-p."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int

from dms_jax.config import SamplingConfig
from dms_jax.types import MASK_VALUE, Keys, NextLogits


def chain_keys(seed: int, prompts: Int[ArrayLike, "B"], chains: Int[ArrayLike, "B"]) -> Keys:
    """A raw random key for each pair of prompt and chain numbers, `[B, 2]`.

    Each depends on (seed, prompt, chain) alone, so a chain's tokens do not depend on the batch around it.
    """
    root = jax.random.PRNGKey(seed)

    def one(prompt, chain):
        return jax.random.fold_in(jax.random.fold_in(root, prompt), chain)

    return jax.vmap(one)(jnp.asarray(prompts), jnp.asarray(chains))


def sequence_keys(seed: int, prompts: int, chains: int) -> Keys:
    """`chain_keys` of `chains` chains for each of the prompts 0, 1, ..., `[prompts * chains, 2]`, prompt-major."""
    return chain_keys(seed, *jnp.divmod(jnp.arange(prompts * chains), chains))


def sample(logits: NextLogits, keys: Keys, positions: Int[Array, "B"], config: SamplingConfig) -> Int[Array, "B"]:
    """Draws a token for each sequence, `[B]` int32; the noise depends on its key and position only."""
    logits = logits.astype(jnp.float32)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_top_p(filter_top_k(logits / config.temperature, config.top_k), config.top_p)
    step_keys = jax.vmap(jax.random.fold_in)(keys, positions)
    return jax.vmap(jax.random.categorical)(step_keys, logits).astype(jnp.int32)


def filter_top_k(logits: NextLogits, k: int) -> NextLogits:
    """Keeps the k largest logits (and ties with the last of them); k = 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits >= smallest, logits, MASK_VALUE)


def filter_top_p(logits: NextLogits, p: float) -> NextLogits:
    """Keeps the smallest set of most likely tokens whose probabilities sum to at least p."""
    if p >= 1:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    # A token is needed while the mass before it is under p; the first always is.
    needed = jnp.cumsum(probs, axis=-1) - probs < p
    smallest = jnp.min(jnp.where(needed, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, MASK_VALUE)
