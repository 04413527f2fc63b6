"""Runs of a retrofit: what it learns, that no interruption changes it, and what ends it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import sharding
from dms_jax.config import ConfigError, DMSConfig, LatentConfig, require
from dms_jax.training import checkpoint, flops
from dms_jax.training import train as training
from dms_jax.training.checkpoint import Checkpoints
from dms_jax.training.data import batch_at, one_document
from dms_jax.training.loop import Loop
from dms_jax.training.parameters import overlay
from dms_jax.training.step import TrainState, compiled_step
from dms_jax.weights.lm import LM
from dms_jax.weights.load import load
from dms_jax.weights.save import save, save_gate
from tests.helpers.models import random_params
from tests.helpers.training import (
    CONFIG,
    MODEL,
    POOL,
    TEACHER,
    Interrupted,
    V,
    assert_same,
    log_of,
    log_without_speed,
    run,
    start,
    stream,
)

TOTAL = CONFIG.total_steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the final state of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, jax.tree.map(np.asarray, run(folder))


def assert_reaches_its_target(log):
    assert [line["step"] for line in log] == list(range(log[0]["step"], log[-1]["step"] + 1, 2))
    assert np.isfinite([line["loss"] for line in log]).all()
    assert abs(np.mean([line["alpha"] for line in log[-8:]]) - 0.5) < 0.12
    assert log[-1]["target_cr"] == 2.0
    for line in log:
        np.testing.assert_allclose(line["loss"], line["kl"] + line["compression"], rtol=1e-5)
        np.testing.assert_allclose(line["alpha"], np.mean(line["alpha_by_head"]), rtol=1e-5)
        want = max(1 - 1 / line["target_cr"] - line["alpha"], 0)
        np.testing.assert_allclose(line["compression"], want, atol=1e-6)


def test_a_run_with_the_query_gate(whole):
    """The neuron goes from 1 towards 0 with nothing evicted; then alpha follows the target from nothing to a half."""
    log = log_of(whole[0])
    retiring, evicting = log[:10], log[10:]
    assert log[0]["kl"] < 5e-3, "the student starts as the teacher"
    np.testing.assert_allclose([line["neuron_scale"] for line in retiring], 1 - np.arange(1, 20, 2) / 20, rtol=1e-6)
    assert not any("alpha" in line for line in retiring)
    assert evicting[0]["step"] == 22 and evicting[0]["alpha"] < 0.3
    np.testing.assert_allclose([line["target_cr"] for line in evicting[:10]], 1 + np.arange(1, 20, 2) / 20, rtol=1e-6)
    assert_reaches_its_target(evicting)
    assert whole[1].step == TOTAL


def test_a_run_with_the_adapter_gate(tmp_path):
    """Its members are gates alone, at each CR that is asked for."""
    gate = DMSConfig(window=2, gate="adapter", decision_offset=1)
    members = {}
    config = dataclasses.replace(CONFIG, dms=gate, kl="reverse", crs=(1.5,))
    state = run(tmp_path, config, on_member=lambda cr, params: members.setdefault(cr, params))
    log = log_of(tmp_path)
    assert log[0]["step"] == 2 and log[0]["kl"] < 5e-3 and len(log) == 20
    assert_reaches_its_target(log)
    assert list(members) == [1.5, 2.0] and checkpoint.steps_in(tmp_path / "checkpoints") == [40, 20, 10]
    assert_same(members[2.0], state.params)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, members.values()), strict=True))


def test_a_run_without_retirement(tmp_path):
    """The neuron is given up at once: what a random one holds evicts nothing."""
    run(tmp_path, dataclasses.replace(CONFIG, retire_steps=0), until=2)
    (line,) = log_of(tmp_path)
    assert line["alpha"] < 0.05


def test_a_run_on_latent_attention(tmp_path):
    """One decision a token and layer, of a gate from E to 1; the original's weights stay as they are."""
    latent = LatentConfig(kv_rank=6, nope_dim=4, rope_dim=4, value_dim=5)
    model = dataclasses.replace(MODEL, family="youtu", num_kv_heads=1, head_dim=10, latent=latent)
    gate = DMSConfig(window=2, gate="adapter", decision_offset=1)
    config = dataclasses.replace(CONFIG, mode="adapter", dms=gate)
    teacher = random_params(model)
    state = training.train(teacher, model, config, stream, tmp_path)
    log = log_of(tmp_path)
    assert log[0]["kl"] < 5e-3
    assert_reaches_its_target(log)
    lm = training.retrofitted(LM(model, teacher), overlay(teacher, state.params), config.dms, 2.0, "float32")
    assert lm.params["layers_0"]["attn"]["gate"]["proj"]["kernel"].shape == (12, 1)
    save_gate(lm, tmp_path / "gate.safetensors")
    save(LM(model, teacher), tmp_path / "base")
    again = load(tmp_path / "base", dtype="float32", gate=tmp_path / "gate.safetensors")
    assert again.config == model and again.dms == config.dms
    assert_same(again.params, lm.params)


def test_noise_is_new_at_every_step_and_the_same_when_it_is_run_again():
    mesh = sharding.make_mesh(CONFIG.mesh)

    def kl_at(step):
        state, base, _ = start()
        batch = one_document(batch_at(POOL, 0, 8, 0))
        with jax.set_mesh(mesh):
            train_step = compiled_step(MODEL, CONFIG, False, mesh)
            return float(train_step(state._replace(step=jnp.array(step)), base, batch)[1]["kl"])

    assert kl_at(50) == kl_at(50) != kl_at(51)


def test_interruptions_change_nothing(whole, tmp_path, capsys):
    """Before the first checkpoint, right after one (before the neuron's reset), and between two, with a torn log."""
    for step in (9, 20, 33):
        with pytest.raises(Interrupted):
            run(tmp_path, broken_at=step)
    assert log_of(tmp_path)[-1]["step"] == 32
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('no JSON\n{"loss": 1}\n{"step": 34, "lo')
    capsys.readouterr()
    state = run(tmp_path)
    assert_same(state, whole[1])
    assert log_without_speed(tmp_path) == log_without_speed(whole[0])
    dropped = "dropped damaged line 17; damaged line 18; damaged line 19; 6 lines of steps after 20, which run again"
    assert f"{tmp_path / 'log.jsonl'}: {dropped}" in capsys.readouterr().err


def test_a_row_that_cannot_be_read_loses_no_work(whole, tmp_path):
    """The steps before it are saved; once it is mended, the run goes on with it."""

    def batches(cursor):
        for batch, after in stream(cursor):
            require(after != 34, "rows.jsonl, row 7", "", "cannot be read")
            yield batch, after

    with pytest.raises(ConfigError, match="row 7='': cannot be read") as stopped:
        training.train(TEACHER, MODEL, CONFIG, batches, tmp_path)
    assert stopped.value.__notes__ == [f"the newest whole checkpoint in {tmp_path / 'checkpoints'} is that of step 33"]
    with pytest.raises(ConfigError, match="row 7"):
        training.train(TEACHER, MODEL, CONFIG, batches, tmp_path)
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [33, 20], "and is not saved again"
    assert_same(run(tmp_path), whole[1])


def test_a_run_in_two_parts(whole, tmp_path):
    """Up to the end of the retirement, then from a copy of its checkpoint in another folder."""
    run(tmp_path / "start", until=CONFIG.retirement)
    assert log_of(tmp_path / "start")[-1]["step"] == CONFIG.retirement
    checkpoint.copy(CONFIG.retirement, tmp_path / "start" / "checkpoints", tmp_path / "rest" / "checkpoints")
    assert_same(run(tmp_path / "rest"), whole[1])


def test_a_finished_run_takes_no_more_steps(whole, monkeypatch):
    before, members = (whole[0] / "log.jsonl").read_bytes(), []
    monkeypatch.setattr(training, "compiled_step", None)
    state = run(whole[0], on_member=lambda cr, params: members.append((cr, params)))
    assert_same(state, whole[1])
    ((cr, params),) = members
    assert cr == 2.0 and (whole[0] / "log.jsonl").read_bytes() == before
    assert_same(params, whole[1].params)


def test_utilisation_is_that_of_the_mesh(tmp_path, monkeypatch):
    """Of 8 devices that are there the mesh has one."""
    monkeypatch.setattr(flops, "device_of", lambda kind: flops.DEVICES["H100"])
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    run(tmp_path, until=6)
    first, *lines = log_of(tmp_path)
    assert "mfu" not in first and len(lines) == 2
    for line in lines:
        np.testing.assert_allclose(line["mfu"], line["tflops"] * 1e12 / flops.DEVICES["H100"].flops, rtol=1e-6)
        np.testing.assert_allclose(
            line["tflops"] * 1e12 / line["tokens_per_second"],
            flops.step_flops(MODEL, CONFIG, 1, 8.5),
            rtol=1e-6,
        )
    assert flops.peak_flops(2) == 2 * flops.DEVICES["H100"].flops


def test_a_loss_of_nan_stops_the_run_and_spares_the_checkpoint(whole, tmp_path, monkeypatch):
    before_step = training.Retrofit.before_step

    def poisoned(self, step, state):
        state = before_step(self, step, state)
        return state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params)) if step == 43 else state

    with monkeypatch.context() as patch:
        patch.setattr(training.Retrofit, "before_step", poisoned)
        with pytest.raises(FloatingPointError, match="loss=nan at step 43; .* starts at 44; last good checkpoint: 40"):
            run(tmp_path)
    with np.load(tmp_path / "batch_of_step_43.npz") as saved:
        want = one_document(batch_at(POOL, 43, CONFIG.batch_size, CONFIG.seed))
        np.testing.assert_array_equal(saved["tokens"], want.tokens)
        np.testing.assert_array_equal(saved["segments"], want.segments)
    assert "NaN" not in (tmp_path / "log.jsonl").read_text() and log_of(tmp_path)[-1]["step"] == 42
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        step, state, cursor = checkpoints.restore(start()[0])
    assert step == state.step == cursor == 40
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert_same(run(tmp_path), whole[1])


def test_a_token_that_the_model_has_not_is_named(tmp_path):
    """A tokenizer may know more tokens than the model has embeddings: those would be NaN."""

    def batches(cursor):
        for batch, after in stream(cursor):
            yield batch._replace(tokens=batch.tokens + 2 * (after > 3)), after

    with pytest.raises(ConfigError, match=rf"data={V + 1}: is no token of the model, which has {V}"):
        training.train(TEACHER, MODEL, CONFIG, batches, tmp_path)


def test_a_gradient_of_nan_is_not_saved(tmp_path):
    """The loss is that of the parameters before the step: it may be finite when what would be saved is not."""
    state = TrainState({"w": jnp.ones(2)}, (), jnp.zeros((), jnp.int32))

    def step_fn(step, state, batch):
        metrics = {"loss": jnp.ones(()), "grad_norm": jnp.array(jnp.nan)}
        return state._replace(params={"w": jnp.full(2, jnp.nan)}), metrics

    with pytest.raises(FloatingPointError, match="grad_norm=nan at step 0; .*; last good checkpoint: None"):
        Loop(tmp_path, 2, save_every=1).run(step_fn, state, stream)
    assert checkpoint.steps_in(tmp_path / "checkpoints") == []


def test_ctrl_c_names_the_newest_checkpoint(tmp_path):
    state = TrainState({"w": jnp.ones(2)}, (), jnp.zeros((), jnp.int32))

    def step_fn(step, state, batch):
        if step == 3:
            raise KeyboardInterrupt
        return state._replace(step=state.step + 1), {"loss": jnp.ones(()), "grad_norm": jnp.ones(())}

    with pytest.raises(KeyboardInterrupt) as stopped:
        Loop(tmp_path, 5, save_every=2).run(step_fn, state, stream)
    assert stopped.value.__notes__ == [f"the newest whole checkpoint in {tmp_path / 'checkpoints'} is that of step 2"]
    assert json.loads((tmp_path / "checkpoints" / "2" / checkpoint.SEAL).read_text())["step"] == 2
