"""KNorm: keys of a large L2 norm are evicted first (Devoto et al. 2024, arXiv 2406.11430).

The norm is taken after RoPE, which does not change it. No attention weights are needed. The authors leave the first
two layers uncompressed; here every layer has the same budget unless it is given for each. In the first layer, keys of a
token that comes again have the same norm but for rounding, so which of them is evicted depends on the programs that
computed them: on how long the chunks of the prompt were, say.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from dms_jax.policies.scored import ScoredPolicy


@dataclass(frozen=True)
class KNorm(ScoredPolicy):
    """Keeps the `budget` tokens with the smallest key norms."""

    name: ClassVar[str] = "knorm"

    def initial_score(self, k, v, pos, keys):
        return -jnp.linalg.norm(k.astype(jnp.float32), axis=-1).swapaxes(1, 2)
