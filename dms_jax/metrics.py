"""Level 3. The numbers a run is judged by, counted from what the cache really held.

All are averaged over layers and KV heads, as in the paper (section 4): a model that keeps all reads t tokens at
step t.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int


class CacheUse(NamedTuple):
    """What one chain cost.

    kv_reads: KV tokens attended to, summed over decode steps, the token's own included.
    prefill_reads: the same over the prompt.
    peak_tokens: the most live KV tokens at any step, prompt included.
    achieved_cr: tokens seen over tokens live, at the end.
    """

    kv_reads: float
    prefill_reads: float
    peak_tokens: float
    achieved_cr: float


def cache_use(
    prompt_live: Int[np.ndarray, "T B"],
    lengths: Int[np.ndarray, "B"],
    live: Int[np.ndarray, "N B L K"],
    active: Bool[np.ndarray, "N B"],
) -> list[CacheUse]:
    """One CacheUse a sequence.

    Args:
      prompt_live: keys visible to each prompt token, summed over layers and KV heads.
      lengths: prompt lengths.
      live: live tokens after each decode step, for each layer and KV head.
      active: whether the sequence took that step.
    """
    heads = live.shape[2] * live.shape[3]
    steps = live.sum(axis=(2, 3), dtype=np.int64)
    uses = []
    for b, length in enumerate(lengths):
        prompt = prompt_live[:length, b]
        decoded = steps[active[:, b], b]
        counts = np.concatenate([prompt, decoded])
        uses.append(
            CacheUse(
                kv_reads=float(decoded.sum()) / heads,
                prefill_reads=float(prompt.sum()) / heads,
                peak_tokens=float(counts.max()) / heads,
                achieved_cr=len(counts) * heads / float(counts[-1]),
            )
        )
    return uses
