"""Eviction policies, one short file each. Adding one is a file and a name in `SCORED` or `BUDGETED`."""

import math
import numbers

from dms_jax.config import DMSConfig, one_of, require
from dms_jax.policies.base import DecodeStep, NewToken, Policy, PrefillChunk, Stored
from dms_jax.policies.dms import DelayedEviction
from dms_jax.policies.full import Full
from dms_jax.policies.h2o import H2O
from dms_jax.policies.keydiff import KeyDiff
from dms_jax.policies.knorm import KNorm
from dms_jax.policies.quest import Quest
from dms_jax.policies.random import Random
from dms_jax.policies.random_attention import RandomAttention
from dms_jax.policies.rkv import RKV
from dms_jax.policies.scored import ScoredPolicy
from dms_jax.policies.snapkv import SnapKV
from dms_jax.policies.streaming import StreamingLLM
from dms_jax.policies.tova import TOVA
from dms_jax.policies.vase import VaSEAttnV, VaSEDKV

__all__ = [
    "BUDGETED",
    "H2O",
    "NAMES",
    "RKV",
    "SCORED",
    "TOVA",
    "DecodeStep",
    "DelayedEviction",
    "Full",
    "KNorm",
    "KeyDiff",
    "NewToken",
    "Policy",
    "PrefillChunk",
    "Quest",
    "Random",
    "RandomAttention",
    "ScoredPolicy",
    "SnapKV",
    "Stored",
    "StreamingLLM",
    "VaSEAttnV",
    "VaSEDKV",
    "named",
    "tokens_of",
]

SCORED = (StreamingLLM, TOVA, H2O, KNorm, Random, KeyDiff, RandomAttention, SnapKV, RKV, VaSEAttnV, VaSEDKV)
BUDGETED = {policy.name: policy for policy in (*SCORED, Quest)}
NAMES = ("full", "dms", *BUDGETED)


def tokens_of(budget: int | float, length: int) -> int:
    """A budget in tokens a head; a fraction is a share of `length`, rounded up.

    Raises:
      ConfigError: no number, not positive, or a share above 1.
    """
    require(isinstance(budget, numbers.Real) and not isinstance(budget, bool), "budget", budget, "expected a number")
    if isinstance(budget, numbers.Integral):
        require(budget > 0, "budget", budget, "must be positive")
        return int(budget)
    require(0 < budget <= 1, "budget", budget, "a share of the maximum length lies in (0, 1]")
    return math.ceil(float(budget) * length)


def named(
    name: str,
    dms: DMSConfig | None,
    budget: int | float | None = None,
    length: int = 0,
    page_size: int = 64,
    protect_prompt: bool | None = None,
    evict_every: int | None = None,
) -> Policy:
    """The policy of that name, for sequences of up to `length` tokens.

    protect_prompt, evict_every: see ScoredPolicy; None leaves them as the method has them.

    Raises:
      ConfigError: an unknown name, "dms" without a DMSConfig, an option that the policy has not, or a budget where
        there is none, or none where needed.
    """
    one_of("policy", name, NAMES)
    given = {"protect_prompt": protect_prompt, "evict_every": evict_every}
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        require(name in BUDGETED and BUDGETED[name] in SCORED, key, value, f"policy {name!r} has no such option")
    if name in ("full", "dms"):
        require(budget is None, "budget", budget, f"policy {name!r} takes none")
    if name == "full":
        return Full()
    if name == "dms":
        require(dms is not None, "policy", name, "this model was never retrofitted (no DMSConfig)")
        return DelayedEviction(dms)
    require(budget is not None, "budget", budget, f"policy {name!r} needs one: tokens a head, or a share of the length")
    tokens = tokens_of(budget, length)
    return Quest(tokens, page_size) if name == "quest" else BUDGETED[name](tokens, **given)
