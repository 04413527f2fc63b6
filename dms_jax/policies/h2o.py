"""H2O: heavy hitters and recent tokens (Zhang et al. 2023, arXiv 2306.14048).

A token's score is the attention it got from all queries so far. Half of the budget is for the most recent tokens,
as in the paper; of the others the one with the lowest score goes. For grouped-query attention, which the paper does
not treat, the weights of a KV head's query heads are summed, and every KV head decides for itself.
"""

import functools

from dms_jax.policies.base import Policy
from dms_jax.policies.scored import budgeted


@functools.cache
def h2o(budget: int) -> Policy:
    """`budget // 2` recent tokens, the rest heavy hitters."""
    recent = budget // 2
    return budgeted(
        "h2o",
        budget,
        update=lambda score, weights: score + weights,
        safe=lambda pos, last: pos > (last - recent)[:, None, None],
        safe_tokens=recent,
        weights="sum",
    )
