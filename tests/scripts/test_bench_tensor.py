"""Decode steps over several devices, in a process of virtual ones: the cells of one device, in half the memory each."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dms_jax.config import ConfigError
from scripts.benchmarks import bench_decode, bench_tensor

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"model": "tiny", "steps": 3, "rounds": 1, "page_size": 4, "dtype": "float32", "memory": 4_000_000}


@pytest.mark.slow
def test_rows(tmp_path):
    out = tmp_path / "tensor.json"
    options = [word for key, value in SHAPE.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "scripts.benchmarks.bench_tensor", "--out", str(out), *options]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    cells = ["3x64x1", "3x64x4", "9999x64x1"]
    done = subprocess.run([*command, "--cells", *cells], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    vanilla, four, missing = json.loads(out.read_text())["rows"]
    assert all("error" not in row and row["seconds_per_step"] > 0 and row["devices"] == 2 for row in (vanilla, four))
    assert not missing["fits"] and missing["bytes_needed"] > SHAPE["memory"]
    one = bench_decode.planned(bench_decode.Settings(**SHAPE), ("3", 64, 1.0), 0, SHAPE["memory"])
    assert vanilla["pool_bytes"] == one.pool_bytes / 2 > four["pool_bytes"]


def test_devices_that_do_not_divide_the_heads():
    settings = bench_tensor.Settings(**SHAPE)
    for devices in (1, 3):
        with pytest.raises(ConfigError, match="divisor of the 2 KV heads"):
            bench_tensor.main(dataclasses.replace(settings, devices=devices))
