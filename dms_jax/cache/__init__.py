"""Level 3. The cache: slots, masked storage and paged storage."""

import functools

from dms_jax.cache.base import Storage, View
from dms_jax.cache.masked import masked_storage
from dms_jax.cache.paged import paged_storage
from dms_jax.config import CacheConfig

__all__ = ["Storage", "View", "storage"]


@functools.cache
def storage(config: CacheConfig) -> Storage:
    """The storage that a configuration names. Cached, so that equal configs share compiled code."""
    return {"masked": masked_storage, "paged": paged_storage}[config.storage](config)
