"""The numbers a run is judged by, counted from what the cache really held.

All are averaged over layers and KV heads, as in the paper (section 4): a model that keeps all reads t tokens at
step t.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class CacheUse(NamedTuple):
    """What one chain cost.

    kv_reads: KV tokens attended to, summed over decode steps, the token's own included; and those that a policy reads
      besides, to choose what it evicts (`rereads`) or reads (Quest's page summaries).
    prefill_reads: the same over the prompt.
    peak_tokens: the most live KV tokens at any step, prompt included, and the policy's own memory (`overhead`).
    achieved_cr: tokens seen over tokens live, at the end.
    """

    kv_reads: float
    prefill_reads: float
    peak_tokens: float
    achieved_cr: float


class HeadUse(NamedTuple):
    """The same chain layer by layer and head by head.

    kv_reads: as in CacheUse. live: live tokens at the end. seen: tokens seen by then.
    live_positions: for each bin of positions (`POSITION_BINS` equal parts of those seen), the share still live,
      averaged over KV heads; None unless asked for.
    Of a chain that a stop string ended, kv_reads and live are those of its whole last chunk of steps.
    """

    kv_reads: Int[np.ndarray, "L K"]
    live: Int[np.ndarray, "L K"]
    seen: int
    live_positions: Float[np.ndarray, "L bins"] | None


POSITION_BINS = 20


def cache_use(
    prompt_reads: Int[np.ndarray, "T"], held: Int[np.ndarray, "M"], reads: Int[np.ndarray, "N"], heads: int
) -> CacheUse:
    """The CacheUse of one chain of N decode steps; all counts are sums over the `heads` KV heads of all layers.

    Args:
      prompt_reads: keys that each prompt token attended to.
      held: live tokens before the first decode step and after each, M = N + 1.
      reads: KV tokens read in each decode step.
    """
    return CacheUse(
        kv_reads=float(reads.sum(dtype=np.int64)) / heads,
        prefill_reads=float(prompt_reads.sum(dtype=np.int64)) / heads,
        peak_tokens=float(max(prompt_reads.max(), held.max())) / heads,
        achieved_cr=(len(prompt_reads) + len(held) - 1) * heads / float(held[-1]),
    )


def live_by_position(pos: Int[np.ndarray, "L K S"], seen: int) -> Float[np.ndarray, "L bins"]:
    """The share of the tokens of each bin of positions that is still live, averaged over KV heads.

    pos: the position in each slot, -1 for none. A bin without any position (a short chain) is NaN.
    """
    edges = np.linspace(0, seen, POSITION_BINS + 1)
    born = np.histogram(np.arange(seen), edges)[0]
    with np.errstate(invalid="ignore"):
        return np.stack([np.histogram(layer[layer >= 0], edges)[0] / (born * pos.shape[1]) for layer in pos])
