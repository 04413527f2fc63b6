"""FLOPs against XLA's count, what the HLO parser reads, and a plan of a tiny model on devices that are not there."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.config import ConfigError, DMSConfig, LatentConfig, ModelConfig
from dms_jax.config_files import load_yaml
from dms_jax.models import transformer
from dms_jax.training import flops
from dms_jax.training.config import RetrofitConfig
from scripts import plan
from tests.helpers.models import tiny_latent

TINY = ModelConfig("llama", 96, 2, 64, 4, 2, 16, 128)
MODELS = {
    "llama": TINY,
    "tied": dataclasses.replace(TINY, tie_embeddings=True, mlp_bias=True),
    "qwen2": dataclasses.replace(TINY, family="qwen2", qkv_bias=True),
    "qwen3": dataclasses.replace(TINY, family="qwen3", qk_norm=True, head_dim=24),
    "latent": tiny_latent(),
    "latent, biases": tiny_latent(qkv_bias=True, out_bias=True, latent=LatentConfig(12, 7, 4, 9)),
    "all biases": dataclasses.replace(TINY, qkv_bias=True, out_bias=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), MODELS[name]))
    assert flops.num_params(MODELS[name]) == sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    "name, count",
    [
        ("llama3.2_1b", 1_235_814_400),
        ("qwen_r1_1.5b", 1_777_088_000),
        ("qwen_r1_7b", 7_615_616_512),
        ("qwen_r1_32b", 32_763_876_352),
        ("qwen3_8b", 8_190_735_360),
        ("qwen3_1.7b", 1_720_574_976),
        ("smollm2_135m", 134_515_008),
    ],
)
def test_shapes_of_published_models(name, count):
    """The parameters that the published checkpoints have."""
    assert flops.num_params(load_yaml(ModelConfig, f"configs/models/{name}.yaml")) == count


def test_forward_flops_are_xlas():
    B, T = 2, 64
    tokens = jnp.zeros((B, T), jnp.int32)
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), TINY))

    def forward(params):
        positions = transformer.arange_positions(tokens)
        return transformer.Decoder(TINY).apply(
            {"params": params}, tokens, positions, transformer.causal, method="logits"
        )[0]

    compiled = jax.jit(forward, compiler_options={"xla_backend_optimization_level": 0}).lower(params).compile()
    want = B * T * sum(flops.forward_flops(TINY, keys=T))  # XLA does not know that half of the scores are masked
    got = compiled.cost_analysis()["flops"]
    assert 0 < got - want < 0.08 * want, "norms, softmax and RoPE come on top"


def test_step_flops_by_hand():
    """Teacher 1, student 1, backward 1 for activations and 1 for trained weights; attention 1 + 1 + 2."""
    layers, head, attention = flops.forward_flops(TINY, 10)
    config = RetrofitConfig(mode="adapter", dms=DMSConfig(gate="adapter"))
    assert flops.step_flops(TINY, config, 7, 10) == 7 * (3 * (layers + head) + 4 * attention)
    full = RetrofitConfig(remat="block")
    assert flops.step_flops(TINY, full, 7, 10) == 7 * (4 * (layers + head) + 4 * attention)
    assert flops.executed_flops(TINY, full, 7, 10) == 7 * (5 * layers + 4 * head + 5 * attention)


def test_devices_by_name():
    assert flops.device_of("NVIDIA H100 80GB HBM3") is flops.DEVICES["H100"]
    assert flops.device_of("NVIDIA H200").memory > flops.DEVICES["H100"].memory
    assert flops.device_of("cpu") is None


HLO = """HloModule jit_train_step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8]{0} all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}
  %start = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%b), replica_groups={{0,1}}, dimensions={0}
}

%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w = (s32[], f32[8]) while(%t), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %r = f32[2,2]{1,0} reduce-scatter(%a), replica_groups={}, dimensions={0}, to_apply=%add
}

ENTRY %main (p: f32[8]) -> f32[] {
  %w = (s32[], f32[8]) while(%t), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %s = f32[10]{0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""


def test_collectives_of_nested_loops():
    got = plan.collectives(HLO, 8)
    assert got["all-reduce"] == 2 * 3 / 4 * 40
    assert got["reduce-scatter"] == 5 * 7 * 16
    assert got["all-gather"] == 5 * 3 * (32 * 3 / 4 + (8 + 32) / 2)
    assert got["all-to-all"] == 0
    exchange = "ENTRY %main (p: f32[8]) -> f32[8] {\n  %e = f32[8]{0} all-to-all(%p), replica_groups=[2,4]<=[8]\n}\n"
    assert plan.collectives(exchange, 8)["all-to-all"] == 32 * 3 / 4


CONFIG = RetrofitConfig(batch_size=8, context=16, mesh=(8, 1, 1), loss_chunk=16, dms=DMSConfig(window=2))


@pytest.mark.slow
def test_a_plan_of_a_tiny_model(tmp_path, capsys):
    """The script, in a process with 8 devices: exact bytes, and the gradients' all-reduce."""
    (tmp_path / "tiny.yaml").write_text("batch_size: 16\naccumulate: 2\ncontext: 16\nmesh: [2, 4, 1]\nloss_chunk: 16\n")
    fields = {key: value for key, value in dataclasses.asdict(TINY).items() if key not in ("rope", "eos_ids")}
    (tmp_path / "model.yaml").write_text(json.dumps(fields))
    got = plan.main(tmp_path / "tiny.yaml", tmp_path / "model.yaml", depths=(1, 2), out=tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(got))
    count = flops.num_params(TINY)
    assert got["parameters"] == got["trained_parameters"] == count
    memory = got["memory_bytes_per_device"]
    np.testing.assert_allclose(memory["trained"], count * 4 / 4, rtol=0.01)
    np.testing.assert_allclose(memory["moments"], 2 * count * 4 / 4, rtol=0.01)
    assert memory["batch"] == 3 * 16 * 16 * 4 / 8
    assert memory["all"] == sum(value for key, value in memory.items() if key != "all")
    moved = got["collective_bytes_per_device"]
    # Two micro-batches, each with a sum of the gradients over 8 devices, and weights gathered over 4 of them.
    assert 0.8 < moved["all-reduce"] / (2 * 2 * 7 / 8 * 4 * count) < 1.6
    assert 2 < moved["all-gather"] / (2 * 3 / 4 * 4 * count) < 5, "teacher, student and its backward pass"
    assert got["fits"] and "8" in capsys.readouterr().out


def test_scratch_by_hand():
    found = {"trained": 100.0}
    got = plan.scratch(TINY, CONFIG, found)
    assert got["gradients"] == 100 and got["copy"] == 0
    tokens = 16  # a row a device
    per_block = 64 + 2 * (3 * 64 + 16 * (4 + 2 * 2) + 2 * 128)
    assert got["kept"] == 2 * tokens * per_block * 4
    assert got["loss"] == 64 * 96 * 4 * 3 + 4 * 16 * 96 * 4 + 3 * tokens * 64 * 4
    lean = dataclasses.replace(CONFIG, remat="block", compute="bfloat16", accumulate=1)
    got = plan.scratch(TINY, lean, found)
    assert got["kept"] == 2 * tokens * 64 * 2 and got["copy"] == 50


def test_a_roofline():
    found = {"base": 1e9, "trained": 2e9, "scratch": 3e9} | dict.fromkeys(plan.COLLECTIVES, 1e9)
    device = flops.DEVICES["H100"]
    got = plan.estimate(TINY, CONFIG, found, device, 0.5)
    assert got["collectives"] == 5e9 / device.nvlink and got["memory"] == 5e9 / device.bandwidth
    assert got["step"] == got["collectives"] and got["floor"] == got["compute"] / 2
    many = dataclasses.replace(CONFIG, mesh=(16, 1, 1), batch_size=16)
    assert plan.estimate(TINY, many, found, device, 0.5)["collectives"] == 5e9 / device.network


def test_every_config_is_read():
    """Each file of configs/ that is a retrofit, with the shape of its model beside it."""
    others = {"mini_pretrain.yaml", "ablate_window.yaml", "aime_sweep.yaml", "mini_baselines.yaml"}
    names = {path.name for path in Path("configs").glob("*.yaml")} - others
    assert {"qwen3_8b.yaml", "smollm2_adapter.yaml", "llama3.2_1b.yaml", "qwen_r1_32b.yaml"} <= names
    for name in names:
        settings = load_yaml(RetrofitConfig, Path("configs") / name)
        assert settings.members()[settings.total_steps] == settings.max_cr
        assert Path("configs", name).read_text().startswith("# "), "a lab note"


def test_a_mesh_that_the_batch_does_not_fit():
    from dms_jax import sharding
    from dms_jax.training.step import layout

    config = dataclasses.replace(CONFIG, mesh=(2, 2, 1), batch_size=3)
    mesh = jax.sharding.AbstractMesh((2, 2, 1), sharding.AXES)
    assert sharding.batch_ways(mesh) == 4
    with pytest.raises(ConfigError, match="batch_size=3: its micro-batches of 3 rows go over 4 devices"):
        layout(TINY, config, mesh)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"efficiency": 0.0}, "efficiency=0.0"),
        ({"depths": (2, 2)}, "depths="),
        ({"accumulate": 0}, "accumulate=0"),
        ({}, "model='configs/models/smollm2_adapter.yaml': no such file"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ConfigError, match=message):
        plan.main(Path("configs/smollm2_adapter.yaml"), **options)
