"""A new eviction policy in one file: the tokens with the largest values stay. Compared with TOVA on the mini model.

usage: python examples/new_policy.py
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

import dms_jax
from dms_jax.policies import TOVA, ScoredPolicy

PROBLEM = (
    "Let b = 996, z = 621, v = 248. Set d = b - z, j = 5 * d, m = z + j, a = j + m, t = v - z, q = d + a, e = q + t. "
    "Find e modulo 1000.\n"
)
SINKS = 4


@dataclass(frozen=True)
class ValueNorm(ScoredPolicy):
    """Keeps the first tokens of a sequence, and the `budget` tokens whose values have the largest norm."""

    name: ClassVar[str] = "value_norm"
    max_protected: ClassVar[int] = SINKS

    def initial_score(self, k, v, pos, keys):
        return jnp.linalg.norm(v.astype(jnp.float32), axis=-1).swapaxes(1, 2)  # [B, T, K] -> [B, K, T]

    def protected(self, pos, newest):
        return (pos >= 0) & (pos < SINKS)


def main(budget: int = 256, new: int = 400) -> dict:
    lm = dms_jax.load("mini", dtype="float32")
    policies = {"full": "full", "tova": TOVA(budget), "value_norm": ValueNorm(budget)}
    made = {}
    for name, policy in policies.items():
        out = made[name] = dms_jax.generate(lm, [PROBLEM], max_new_tokens=new, policy=policy)
        print(f"{name}: {out.peak_tokens[0, 0]:.0f} tokens at peak, {out.kv_reads[0, 0]:,.0f} read")
        print(f"... {out.text[0][0][-60:]!r}")
    return made


if __name__ == "__main__":
    main()
