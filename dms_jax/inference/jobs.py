"""What goes into an engine and what comes out of it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt32

from dms_jax.config import require
from dms_jax.inference import use_counts as metrics


class PoolError(RuntimeError):
    """A single sequence does not fit into the largest pool allowed; the message says what it needed."""


class Job(NamedTuple):
    """A prompt and the chains that continue it."""

    prompt: list[int]
    keys: UInt32[np.ndarray, "W 2"]  # a raw random key for each chain
    max_new: int
    name: Any = None  # whatever the caller knows it by


class Result(NamedTuple):
    """A finished chain: which it was, its new tokens (the stop token included) and what it cost."""

    name: Any
    chain: int
    tokens: list[int]
    use: metrics.CacheUse
    by_head: metrics.HeadUse


class Progress(NamedTuple):
    """After each chunk: tokens made in it, and what the cache holds now."""

    new_tokens: int
    live_tokens: float  # of all rows, averaged over layers and KV heads
    pages_used: int
    pages: int


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs; none of it changes a chain's tokens.

    max_num_seqs: sequences decoded at the same time. steps: decode steps between two looks from the host.
    prefill_chunk: prompt tokens read at once. pages: pages of the pool (of each device's) at first, None for an estimate from the compression expected.
    max_pages: how far it may grow, None for no limit.
    retention: also record which positions live at a chain's end.
    """

    max_num_seqs: int = 16
    steps: int = 64
    prefill_chunk: int = 512
    pages: int | None = None
    max_pages: int | None = None
    retention: bool = False

    def __post_init__(self):
        for key in ("max_num_seqs", "steps", "prefill_chunk"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be positive")
        for key in ("pages", "max_pages"):
            value = getattr(self, key)
            require(value is None or value > 0, key, value, "must be positive")
