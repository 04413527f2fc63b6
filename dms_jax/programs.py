"""Compiled programs: the folder that keeps them for the next process, and their release within one."""

import gc
import os
import sys
from pathlib import Path

import jax

MAX_BYTES = 4 * 2**30  # of the folder; the programs used least recently go first
MIN_SECONDS = 0.1  # programs that compile faster are not kept
CROWDED = 0.5  # of the memory maps that Linux allows a process


def keep() -> None:
    """Keeps compiled programs in `~/.cache/dms_jax`, where JAX has not been told of another place.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false switches it off. A folder with
    a maximum size is locked while it is read and written, so several processes may share it.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dms_jax"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a user without a home, or one that cannot be written
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


def release() -> None:
    """Forgets compiled programs once they crowd this process's memory maps, as many models or policies do on a CPU.

    Those still needed come back from the folder.
    """
    if sys.platform != "linux" or jax.default_backend() != "cpu":
        return
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if Path("/proc/self/maps").read_bytes().count(b"\n") > CROWDED * limit:
        jax.clear_caches()
        gc.collect()
