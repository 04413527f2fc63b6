"""Random eviction, the control: a method that is not clearly better than this one knows nothing."""

import functools

from dms_jax.policies.base import Policy
from dms_jax.policies.scored import budgeted, uniform


@functools.cache
def random(budget: int) -> Policy:
    """Every token draws a number when it comes; the lowest goes. The same seed keeps the same tokens."""
    return budgeted("random", budget, begin=lambda k, pos, keys: uniform(pos, keys))
