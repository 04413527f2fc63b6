"""The vanilla model: an ordinary KV cache, nothing is evicted."""

from dataclasses import dataclass

from dms_jax.policies.base import Policy


@dataclass(frozen=True)
class Full(Policy):
    """Keeps and reads every token. It has no state."""
