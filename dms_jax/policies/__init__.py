"""Eviction policies, one short file each. Adding one is a file and a row of `BUDGETED`."""

import math

from dms_jax.config import DMSConfig, one_of, require
from dms_jax.policies.base import Policy
from dms_jax.policies.dms import delayed_eviction
from dms_jax.policies.full import full
from dms_jax.policies.h2o import h2o
from dms_jax.policies.knorm import knorm
from dms_jax.policies.quest import quest
from dms_jax.policies.random import random
from dms_jax.policies.streaming import streaming
from dms_jax.policies.tova import tova

BUDGETED = {"streaming": streaming, "tova": tova, "h2o": h2o, "knorm": knorm, "random": random}
NAMES = ("full", "dms", *BUDGETED, "quest")


def tokens_of(budget: int | float, length: int) -> int:
    """A budget in tokens a head; a float is a share of `length`, rounded up.

    Raises:
      ConfigError: not positive, or a share above 1.
    """
    if isinstance(budget, float):
        require(0 < budget <= 1, "budget", budget, "a share of the maximum length lies in (0, 1]")
        return math.ceil(budget * length)
    require(budget > 0, "budget", budget, "must be positive")
    return budget


def policy(
    name: str,
    dms: DMSConfig | None,
    budget: int | float | None = None,
    length: int = 0,
    page_size: int = 64,
    head_dim: int = 0,
) -> Policy:
    """The policy of that name, for sequences of up to `length` tokens.

    Raises:
      ConfigError: an unknown name, "dms" without a DMSConfig, or a budget where there is none, or none where needed.
    """
    one_of("policy", name, NAMES)
    if name in ("full", "dms"):
        require(budget is None, "budget", budget, f"policy {name!r} takes none")
    if name == "full":
        return full()
    if name == "dms":
        require(dms is not None, "policy", name, "this model was never retrofitted (no DMSConfig)")
        return delayed_eviction(dms)
    require(budget is not None, "budget", budget, f"policy {name!r} needs one: tokens a head, or a share of the length")
    tokens = tokens_of(budget, length)
    return quest(tokens, page_size, head_dim) if name == "quest" else BUDGETED[name](tokens)
