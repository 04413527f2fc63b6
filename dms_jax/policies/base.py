"""Level 2. What an eviction policy is: a record of pure functions over a state kept for each layer.

A policy decides which prompt tokens to mark and which slot a new token drives out. It never touches what is
stored, so it does not know how; it is handed the new keys `[B, T, K, D]`, from which a method without a gate takes
its shapes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from dms_jax.types import Decisions, PerHead


class Policy(NamedTuple):
    """One method. `state` is a pytree; `logit` is None for a model without a gate.

    window: a marked prompt token stays visible to the next `window` tokens.
    mark: which prompt tokens are evicted once they are past the window.
    settle: the state after a prompt, given the slot of each of its tokens.
    choose: the victim's slot for a token at `position`, -1 for none. Called before the token is stored.
    record: notes the slot that the token got.
    """

    name: str
    window: int
    mark: Callable[..., Decisions]  # (k [B, T, K, D], logit [B, K, T], lengths [B]) -> alpha [B, K, T]
    settle: Callable[..., Any]  # (alpha [B, K, T], slots [B, K, T], lengths [B]) -> state
    choose: Callable[..., tuple[PerHead, Any]]  # (state, position [B], k, logit [B, K]) -> victim, state
    record: Callable[..., Any]  # (state, position [B], slot [B, K], logit [B, K]) -> state
