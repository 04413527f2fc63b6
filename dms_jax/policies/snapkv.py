"""SnapKV while decoding: the attention of the last queries, pooled over neighbours (Li et al. 2024, arXiv 2404.14469).

The paper prunes a prompt once; used again every so many steps it is the usual rival of methods for long answers (as
in R-KV, arXiv 2505.24133, whose window of 8 queries and pooling width of 7 are taken here). Deviations: weights are
averaged over the query heads of a KV head and then pooled, as grouped queries share their cache; and see `observing`.
"""

from dataclasses import dataclass
from typing import ClassVar

from dms_jax.policies.observing import Observing, distribution, pooled


@dataclass(frozen=True)
class SnapKV(Observing):
    """Keeps the tokens of the last `queries` queries, and those that they attend to most."""

    name: ClassVar[str] = "snapkv"

    @property
    def num_protected(self) -> int:
        return self.queries

    def rank(self, tokens):
        return pooled(distribution(tokens), tokens.pos, self.pooling, "max")

    def protected(self, pos, newest):
        return pos > (newest - self.queries)[:, None, None]
