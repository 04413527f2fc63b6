"""Where compiled programs are kept, and that many set-ups fit into one process."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from dms_jax import programs

SETTINGS = """
import jax
from dms_jax import programs
programs.keep()
print(jax.config.jax_compilation_cache_dir)
"""


def kept_in(**environment) -> str:
    """The folder that a new process keeps its programs in."""
    run = [sys.executable, "-c", SETTINGS]
    return subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def test_the_folder_of_programs(tmp_path):
    path = {"PATH": "/usr/bin:/bin"}
    assert kept_in(XDG_CACHE_HOME=str(tmp_path), **path) == str(tmp_path / "dms_jax")
    assert kept_in(HOME=str(tmp_path), **path) == str(tmp_path / ".cache" / "dms_jax")
    named = str(tmp_path / "named")
    assert kept_in(HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=named, **path) == named
    file = tmp_path / "file"
    file.touch()
    assert kept_in(XDG_CACHE_HOME=str(file), **path) == "None"  # no folder can be made there


def test_programs_are_released_when_they_crowd_the_memory_maps(monkeypatch):
    counted = jax.jit(lambda x: x + 1)
    counted(jnp.ones(3))
    assert counted._cache_size() == 1
    programs.release()
    assert counted._cache_size() == 1
    monkeypatch.setattr(programs, "CROWDED", 0.0)
    programs.release()
    assert counted._cache_size() == 0 and Path("/proc/self/maps").exists()
