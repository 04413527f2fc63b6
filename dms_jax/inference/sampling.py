"""Drawing the next token: greedy, temperature, top-k, top-p.

Neither filter sorts the vocabulary. Both keep the logits from some threshold up: the smallest t for which the tokens
above t weigh less than a limit (their number for top-k, their probability for top-p). It is found bit by bit.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, UInt32

from dms_jax.config import TINY, SamplingConfig, require
from dms_jax.types import MASK_VALUE, Keys, NextLogits

IMPL = "threefry2x32"  # of the raw keys, whatever jax's default generator is
BITS = 2  # of the threshold found in one pass over the logits


def root_key(seed: int) -> Array:
    """A random key that depends on all bits of `seed`.

    Raises:
      ConfigError: a seed that is negative or has more than 64 bits.
    """
    require(0 <= seed < 2**64, "seed", seed, "must lie in 0..2**64-1")
    key, high = jax.random.key(seed & 0xFFFFFFFF, impl=IMPL), seed >> 32
    return jax.random.fold_in(key, high) if high else key


def chain_keys(
    seed: int, prompts: Int[ArrayLike, "B"] | Sequence[int], chains: Int[ArrayLike, "B"] | Sequence[int]
) -> Keys:
    """A raw random key for each pair of prompt and chain numbers, `[B, 2]`.

    Each depends on (seed, prompt, chain) alone, so a chain's tokens do not depend on the batch around it.
    """
    return _folded_in(root_key(seed), jnp.asarray(prompts), jnp.asarray(chains))


@jax.jit
def _folded_in(root: Array, prompts: Int[Array, "B"], chains: Int[Array, "B"]) -> Keys:
    def one(prompt, chain):
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(root, prompt), chain))

    return jax.vmap(one)(prompts, chains)


def sequence_keys(seed: int, prompts: int, chains: int) -> Keys:
    """`chain_keys` of `chains` chains for each of the prompts 0, 1, ..., `[prompts * chains, 2]`, prompt-major."""
    return chain_keys(seed, *np.divmod(np.arange(prompts * chains), chains))


def sample(logits: NextLogits, keys: Keys, positions: Int[Array, "B"], config: SamplingConfig) -> Int[Array, "B"]:
    """Draws a token for each sequence, `[B]` int32; the noise depends on its key and position only."""
    logits = logits.astype(jnp.float32)
    if config.temperature < TINY:  # float32 has no such number: dividing by it would be dividing by 0
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Relative to the largest, so that a small temperature makes the others -inf and never overflows.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / config.temperature
    logits = filter_top_p(filter_top_k(logits, config.top_k), config.top_p)
    step_keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys, impl=IMPL), positions)
    return jax.vmap(jax.random.categorical)(step_keys, logits).astype(jnp.int32)


def filter_top_k(logits: NextLogits, k: int) -> NextLogits:
    """Keeps the k largest logits (and ties with the last of them); k = 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    return _keep(logits, jnp.ones_like(logits), float(k))


def filter_top_p(logits: NextLogits, p: float) -> NextLogits:
    """Keeps the smallest set of most likely tokens whose probabilities sum to at least p (and ties)."""
    if p >= 1:
        return logits
    return _keep(logits, jax.nn.softmax(logits, axis=-1), p)


def _keep(logits: NextLogits, weights: Float[Array, "B V"], limit: float) -> NextLogits:
    """`logits` where the tokens with larger ones weigh less than `limit` together, MASK_VALUE elsewhere."""
    order = _ordered(logits)
    low = jnp.zeros(logits.shape[:-1], jnp.uint32)  # bits of the threshold found so far, from the top
    for shift in range(32 - BITS, -1, -BITS):
        # Above a larger candidate lies less. The bits are the number of candidates above which lies too much.
        above = [
            jnp.where(order > (low + jnp.uint32(((n + 1) << shift) - 1))[..., None], weights, 0.0).sum(axis=-1)
            for n in range((1 << BITS) - 1)
        ]
        low += sum((x >= limit).astype(jnp.uint32) for x in above) << shift
    return jnp.where(order >= low[..., None], logits, MASK_VALUE)


def _ordered(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """float32 as integers in the same order."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # -0 becomes 0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
