"""Level 2. Eviction policies, one short file each."""

from dms_jax.config import DMSConfig, one_of, require
from dms_jax.policies.base import Policy
from dms_jax.policies.dms import delayed_eviction
from dms_jax.policies.full import full

NAMES = ("full", "dms")


def policy(name: str, dms: DMSConfig | None) -> Policy:
    """The policy of that name.

    Raises:
      ConfigError: an unknown name, or "dms" without a DMSConfig.
    """
    one_of("policy", name, NAMES)
    if name == "full":
        return full()
    require(dms is not None, "policy", name, "this model was never retrofitted (no DMSConfig)")
    return delayed_eviction(dms)
