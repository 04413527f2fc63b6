"""The cache: slots, and masked and paged storage."""

import functools

from dms_jax.cache.base import Pool, Storage, View, fitted
from dms_jax.cache.masked import masked_storage
from dms_jax.cache.paged import paged_storage
from dms_jax.cache.sharded import sharded_storage
from dms_jax.config import CacheConfig, require

__all__ = ["Pool", "Storage", "View", "fitted", "storage"]


@functools.cache
def storage(config: CacheConfig, parts: int = 1) -> Storage:
    """The storage that a configuration names. Cached, so that equal configs share compiled code.

    parts: devices along the tensor axis of the mesh in force, each of which holds some of the KV heads.
    """
    if parts == 1:
        return {"masked": masked_storage, "paged": paged_storage}[config.storage](config)
    require(config.storage == "paged", "cache", config.storage, "only paged storage is split over devices")
    return sharded_storage(paged_storage(config), parts, config.quant != "none")
