"""KV caches: masked, paged, and paged over several devices."""

from dms_jax.cache.base import DecodeQuery, KVCache, Pool, View
from dms_jax.cache.masked import MaskedCache
from dms_jax.cache.paged import PagedCache
from dms_jax.cache.sharded import ShardedPagedCache
from dms_jax.config import CacheConfig, require

__all__ = ["DecodeQuery", "KVCache", "MaskedCache", "PagedCache", "Pool", "ShardedPagedCache", "View", "kv_cache"]


def kv_cache(config: CacheConfig, parts: int = 1) -> KVCache:
    """The cache that a configuration names.

    parts: devices along the tensor axis of the mesh in force, each of which holds some of the KV heads.
    """
    if parts == 1:
        return {"masked": MaskedCache, "paged": PagedCache}[config.storage](config)
    require(config.storage == "paged", "cache", config.storage, "only a paged cache is split over devices")
    return ShardedPagedCache(config, parts)
