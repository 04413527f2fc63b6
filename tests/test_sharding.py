"""Meshes: how tensors are split, and that no mesh changes what is learnt. Devices are virtual."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dms_jax import sharding
from dms_jax.config import ConfigError, DMSConfig, ModelConfig
from dms_jax.training.config import RetrofitConfig
from dms_jax.training.parameters import param_letters

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"data": 2, "fsdp": 4, "tensor": 2}
HALF = 10


@pytest.mark.parametrize(
    "letters, shape, table, want",
    [
        ("E H D", (16, 8, 4), sharding.PARAMETERS, (("fsdp",), ("tensor",), None)),
        ("V E", (40, 16), sharding.PARAMETERS, (("tensor",), ("fsdp",))),
        ("E K D", (16, 3, 4), sharding.PARAMETERS, (("fsdp",), None, None)),  # 3 heads go whole
        ("E", (6,), sharding.PARAMETERS, (None,)),
        ("B T E", (16, 5, 16), sharding.ACTIVATIONS, (("data", "fsdp"), None, None)),
        ("B T H D", (4, 5, 8, 4), sharding.ACTIVATIONS, (None, None, ("tensor",), None)),
    ],
)
def test_partition(letters, shape, table, want):
    assert sharding.partition(letters, shape, SIZES, table) == PartitionSpec(*want)


def test_axes_of_one_device_name_nothing():
    sizes = {"data": 1, "fsdp": 2, "tensor": 1}
    assert sharding.partition("V E", (4, 4), sizes, sharding.PARAMETERS) == PartitionSpec(None, ("fsdp",))


def test_letters_must_fit():
    with pytest.raises(ConfigError, match="letters='E H'"):
        sharding.partition("E H", (1, 2, 3), SIZES, sharding.PARAMETERS)


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1), (0, 1, 1)])
def test_a_mesh_that_does_not_fit(shape):
    with pytest.raises(ConfigError, match="mesh="):
        sharding.make_mesh(shape)


def test_every_parameter_has_letters():
    model = ModelConfig("qwen2", 31, 1, 12, 4, 2, 6, 16, qkv_bias=True)
    config = RetrofitConfig(mode="lora", dms=DMSConfig(gate="adapter"))
    letters = param_letters(model, config)
    assert letters["layers_0", "attn", "o", "kernel"] == "H D E" and letters["layers_0", "attn", "q", "bias"] == "H D"
    assert letters["layers_0", "attn", "q", "lora", "a"] == "E R"
    assert letters["layers_0", "attn", "o", "lora", "b"] == "R E"
    assert letters["layers_0", "attn", "gate", "proj", "kernel"] == "E K"


def test_constrain_without_a_mesh_is_nothing():
    x = jax.numpy.ones((2, 3))
    assert sharding.constrain(x, "B T") is x


def start(out: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "multidevice.py"), str(out), *arguments]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    out = tmp_path_factory.mktemp("meshes") / "curves.json"
    finish(start(out))
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ("8x1x1", "2x2x2", "1x1x8"))
def test_every_mesh_gives_the_curve_of_one_device(curves, mesh):
    one = np.array(curves["1x1x1"])
    assert one.shape == (20,) and one.max() - one.min() > 0.02, "a curve that moves"
    np.testing.assert_allclose(curves[mesh], one, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_latent_attention_on_a_mesh(curves):
    """Its one KV head does not divide: the query heads' weights are split all the same."""
    one, split = np.array(curves["latent"])
    assert one.max() - one.min() > 0.02, "a curve that moves"
    np.testing.assert_allclose(split, one, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(curves):
    np.testing.assert_allclose(curves["resumed"], curves["1x1x1"][HALF:], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_state_is_split(curves):
    """Over 8 devices along fsdp nearly an eighth, over 2 x 2 of fsdp and tensor nearly a quarter."""
    fsdp, both = curves["share"]
    assert fsdp < 0.16 and both < 0.32


@pytest.mark.slow
def test_two_processes_give_the_same_curve_and_seal_their_own_files(curves, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    out = tmp_path / "curves.json"
    finish(*(start(out, str(n), "2", port) for n in range(2)))
    found = json.loads(out.read_text())
    np.testing.assert_allclose(found["curve"], curves["1x1x1"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(found["resumed"], curves["1x1x1"][HALF:], atol=1e-5, rtol=0)
    assert found["fault"] is None
    first, second = found["written"]["sums.json"], found["written"]["sums.1.json"]
    assert {"state/_METADATA", "cursor/metadata"} < {*first} and not {*first} & {*second}
    assert any("process_0/d/" in name for name in first) and any("process_1/d/" in name for name in second)
