"""Level 3. Batches of token sequences, addressed by step, so that a resumed run sees what it would have seen."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Batch(NamedTuple):
    """Right-padded sequences. Tokens `[B, T]`; of `lengths` `[B]` real tokens the first `prompt_lengths` are given."""

    tokens: Int[np.ndarray, "B T"]
    prompt_lengths: Int[np.ndarray, "B"]
    lengths: Int[np.ndarray, "B"]


def batch_at(pool: Batch, step: int, batch_size: int, seed: int) -> Batch:
    """Batch number `step` of an endless shuffled pass over `pool`: a pure function of its arguments.

    Every epoch has its own permutation; a remainder smaller than a batch is left out of that epoch.
    """
    per_epoch = len(pool.tokens) // batch_size
    if per_epoch == 0:
        raise ValueError(f"batch_size={batch_size}: the pool holds only {len(pool.tokens)} sequences")
    epoch, index = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(len(pool.tokens))
    rows = order[index * batch_size : (index + 1) * batch_size]
    return Batch(*(np.asarray(field[rows], np.int32) for field in pool))
