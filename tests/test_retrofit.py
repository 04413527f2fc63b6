"""The distillation loss, one step, and the loop: what it learns, and that no interruption changes it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_dms
import tyro

import dms_jax
from dms_jax import checkpoint, dms, retrofit, transformer
from dms_jax.config import ConfigError, DMSConfig, ModelConfig, load_yaml
from dms_jax.data import Batch, batch_at
from dms_jax.retrofit import RetrofitConfig
from experiments import aime
from scripts import bench_generate, generate, pretrain_mini
from scripts import retrofit as script

V = 31
MODEL = ModelConfig("llama", V, 2, 12, 4, 2, 6, 16)
QUERY = DMSConfig(window=2)
CONFIG = RetrofitConfig(
    QUERY, 20, steps_per_cr=20, max_cr=2.0, hold_steps=20, learning_rate=1e-2, warmup_steps=2, batch_size=8
)
TOTAL = 60
# Compiled for a few runs only: LLVM's optimisation costs more than it saves here.
QUICK = {"xla_backend_optimization_level": 0}


# The loss

T, E = 37, 5
LENGTHS = jnp.array([37, 5, 20])


@pytest.fixture(scope="module")
def hiddens():
    """Hidden states and unembeddings of teacher and student."""
    rng = np.random.default_rng(0)
    shapes = ((3, T, E), (3, T, E), (E, V), (E, V))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def distance(th, sh, tk, sk, chunk, direction="forward", lengths=LENGTHS):
    """The loss as a function of hidden states and unembeddings of teacher and student."""
    return retrofit.distillation_loss(lambda h: h @ tk, lambda h: h @ sk, th, sh, lengths, direction, chunk)


@functools.partial(jax.jit, static_argnames=("chunk", "direction"), compiler_options=QUICK)
def distance_and_gradients(*arrays, chunk, direction="forward"):
    return jax.value_and_grad(distance, (0, 1, 2, 3))(*arrays, chunk, direction)


@pytest.mark.parametrize("direction", ("forward", "reverse"))
def test_chunks_change_nothing_and_padding_counts_for_nothing(hiddens, direction):
    th, sh, tk, sk = hiddens
    per_token = np.asarray(dms.kl(th @ tk, sh @ sk, direction), np.float64)
    want = np.concatenate([per_token[b, :n] for b, n in enumerate(LENGTHS)]).mean()
    whole, whole_grads = distance_and_gradients(*hiddens, chunk=T, direction=direction)
    np.testing.assert_allclose(whole, want, rtol=1e-5)
    got, grads = distance_and_gradients(*hiddens, chunk=8, direction=direction)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for g, w in zip(grads[1::2], whole_grads[1::2], strict=True):
        np.testing.assert_allclose(g, w, atol=1e-6)
        assert np.abs(w).max() > 1e-4
    assert not grads[2].any(), "the teacher's weights get no gradient"
    padding = np.arange(T) >= np.asarray(LENGTHS)[:, None]
    assert not np.asarray(grads[1])[padding].any()
    garbage = jnp.where(padding[..., None], 1e4, sh)
    same, _ = distance_and_gradients(th, garbage, tk, sk, chunk=8, direction=direction)
    assert same == got


def test_no_logits_of_the_whole_sequence_are_kept():
    """Scratch of the chunked loss, forward and backward: less than one [B, T, V] float32 array; unchunked: more."""
    T, V = 512, 2048

    def scratch(chunk):
        shapes = ((1, T, E), (1, T, E), (E, V), (E, V))
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        grad = jax.grad(functools.partial(distance, chunk=chunk, lengths=jnp.array([T])), (1, 3))
        return jax.jit(grad, compiler_options=QUICK).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    one = 4 * T * V
    assert scratch(64) < 0.7 * one < one < scratch(T)


def apply(params, config, attend, neuron_scale=0.0):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (3, 14)))
    positions = transformer.arange_positions(tokens)
    decoder = transformer.Decoder(MODEL, config)
    return decoder.apply({"params": params}, tokens, positions, attend, (), neuron_scale, method="logits")


@pytest.mark.parametrize("gate, offset", [("query", 0), ("adapter", 1), ("query", 3)])
def test_saturated_soft_mask_is_the_hard_mask(gate, offset):
    """Logits far beyond the noise: training sees what inference does, and counts what it evicts."""
    config = DMSConfig(window=2, gate=gate, decision_offset=offset, scale=1e6, offset=1e5)
    params = test_dms.random_params(MODEL, config)
    lengths = jnp.array([14, 1, 6])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both():
        soft = apply(params, config, retrofit.soft_eviction(config, lengths, jax.random.PRNGKey(0)))
        return soft, apply(params, config, transformer.hard_eviction(config, lengths))

    (soft, shares), (hard, alphas) = both()
    np.testing.assert_allclose(soft, hard, atol=1e-5)
    assert 0.1 < np.mean(shares) < 0.8
    for share, alpha in zip(shares, alphas, strict=True):
        real = np.arange(14) < lengths[:, None, None]
        np.testing.assert_allclose(share, (alpha & real).sum((0, 2)) / lengths.sum(), rtol=1e-5)


def test_retirement_starts_at_the_teacher_and_ends_without_the_neuron():
    params = test_dms.random_params(MODEL, None)

    @functools.partial(jax.jit, static_argnames="config", compiler_options=QUICK)
    def logits(params, scale, config):
        return apply(params, config, transformer.causal, scale)[0]

    student, teacher = functools.partial(logits, config=QUERY), logits(params, 0.0, None)
    np.testing.assert_array_equal(student(params, 1.0), teacher)
    assert np.abs(dms.kl(teacher, student(params, 1.0))).max() == 0
    without = student(params, 0.0)
    assert np.asarray(dms.kl(teacher, without)).mean() > 1e-3
    reset = retrofit.reset_neuron(params, MODEL, QUERY)
    np.testing.assert_array_equal(student(reset, 0.0), without)
    half = student(params, 0.5)
    assert np.abs(half - teacher).max() > 1e-3 and np.abs(half - without).max() > 1e-3


def test_schedule_of_a_run():
    assert CONFIG.total_steps == TOTAL
    assert dataclasses.replace(CONFIG, dms=DMSConfig(gate="adapter")).retirement == 0
    assert RetrofitConfig().total_steps == 2000 + 700


def test_with_gate_adds_a_gate_that_evicts_nothing():
    adapter = DMSConfig(window=2, gate="adapter")
    params = test_dms.random_params(MODEL, None)
    assert retrofit.with_gate(params, MODEL, QUERY) is params
    got = retrofit.with_gate(params, MODEL, adapter)
    want = jax.eval_shape(lambda: transformer.init(jax.random.key(0), MODEL, adapter))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), want)
    assert "gate" not in params["layers_0"]["attn"], "the teacher's tree is as it was"
    own = jax.tree.map(lambda x: x + 1, got)
    again = retrofit.with_gate(own, MODEL, adapter)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(own), strict=True))


# The loop

TEACHER = test_dms.random_params(MODEL, None)


def sequences() -> Batch:
    rng = np.random.default_rng(0)
    return Batch(rng.integers(0, V, (64, 16)), np.ones(64, int), rng.integers(4, 17, 64))


POOL = sequences()


quick_step = jax.jit(
    retrofit.train_step.__wrapped__,
    static_argnames=("model", "config", "retiring"),
    donate_argnames="state",
    compiler_options=QUICK,
)


def train_step(state, batch, config, retiring):
    return quick_step(state, TEACHER, batch, model=MODEL, config=config, retiring=retiring)


def nothing(step, state):
    return state


def fit(folder, on_step=nothing, config=CONFIG):
    """The run of scripts/retrofit.py on the tiny model."""

    def each(step, state):
        if step == config.retirement and step:
            state = state._replace(params=retrofit.reset_neuron(state.params, MODEL, config.dms))
        return on_step(step, state)

    def step_fn(state, batch):
        return train_step(state, batch, config, int(state.step) < config.retirement)

    def batches(step):
        return batch_at(POOL, step, config.batch_size, config.seed)

    params = retrofit.with_gate(TEACHER, MODEL, config.dms)
    state = retrofit.fresh_state(params, retrofit.optimizer(config))
    return retrofit.fit(step_fn, state, batches, config.total_steps, folder, save_every=20, log_every=2, on_step=each)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the final state of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    state = fit(folder)
    return folder, jax.tree.map(np.asarray, state)


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
    settings = DMSConfig(window=2, gate="adapter", decision_offset=1)
    fit(tmp_path, config=dataclasses.replace(CONFIG, dms=settings, kl="reverse"))
    log = log_of(tmp_path)
    assert log[0]["step"] == 2 and log[0]["kl"] < 5e-3 and len(log) == 20
    assert_reaches_its_target(log)


def test_noise_is_new_at_every_step_and_the_same_when_it_is_run_again():
    def kl_at(step):
        state = retrofit.fresh_state(TEACHER, retrofit.optimizer(CONFIG))._replace(step=jnp.array(step))
        return train_step(state, batch_at(POOL, 0, 8, 0), CONFIG, False)[1]["kl"]

    assert kl_at(50) == kl_at(50) != kl_at(51)


class Interrupted(Exception):
    pass


def interrupt_at(number):
    def on_step(step, state):
        if step == number:
            raise Interrupted
        return state

    return on_step


def test_interruptions_change_nothing(whole, tmp_path):
    """Before the first checkpoint, right after one (before the neuron's reset), and between two, with a torn log."""
    for step in (9, 20, 33):
        with pytest.raises(Interrupted):
            fit(tmp_path, interrupt_at(step))
    assert log_of(tmp_path)[-1]["step"] == 32
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 34, "lo')
    state = fit(tmp_path)
    assert_same(state, whole[1])
    assert (tmp_path / "log.jsonl").read_bytes() == (whole[0] / "log.jsonl").read_bytes()


def test_a_finished_run_takes_no_more_steps(whole):
    before, steps = (whole[0] / "log.jsonl").read_bytes(), []

    def on_step(step, state):
        steps.append(step)
        return state

    assert_same(fit(whole[0], on_step), whole[1])
    assert steps == [TOTAL] and (whole[0] / "log.jsonl").read_bytes() == before


def test_a_loss_of_nan_stops_the_run_and_spares_the_checkpoint(whole, tmp_path):
    def poison(step, state):
        return state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params)) if step == 43 else state

    with pytest.raises(FloatingPointError, match="loss=nan at step 43; last good checkpoint: 40"):
        fit(tmp_path, poison)
    log = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in log and log_of(tmp_path)[-1]["step"] == 42
    with checkpoint.manager(tmp_path / "checkpoints") as checkpoints:
        step, state = checkpoint.restore(checkpoints, whole[1])
    assert step == state.step == 40
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert_same(fit(tmp_path), whole[1])


def test_a_gradient_of_nan_is_not_saved(tmp_path):
    """The loss is that of the parameters before the step: it may be finite when what would be saved is not."""
    state = retrofit.TrainState({"w": jnp.ones(2)}, (), jnp.zeros((), jnp.int32))

    def step_fn(state, batch):
        metrics = {"loss": jnp.ones(()), "grad_norm": jnp.array(jnp.nan)}
        return state._replace(params={"w": jnp.full(2, jnp.nan)}), metrics

    with pytest.raises(FloatingPointError, match="grad_norm=nan at step 1; last good checkpoint: None"):
        retrofit.fit(step_fn, state, lambda step: None, 2, tmp_path, save_every=2, log_every=2)
    with checkpoint.manager(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() is None


def test_save_every_must_be_a_multiple_of_log_every(tmp_path):
    """Otherwise some states would never be saved, or be saved unseen."""
    with pytest.raises(ConfigError, match="save_every=25"):
        retrofit.fit(None, None, None, 100, tmp_path, save_every=25, log_every=10)


@pytest.mark.parametrize(
    "field, value", [("kl", "both"), ("max_cr", 1.0), ("steps_per_cr", 0), ("batch_size", 0), ("retire_steps", -1)]
)
def test_config_names_the_field(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value!r}"):
        RetrofitConfig(**{field: value})


def test_config_files_are_read_and_checked(tmp_path):
    settings = load_yaml(RetrofitConfig, "configs/mini_retrofit.yaml")
    assert settings.dms.gate == "query" and settings.learning_rate == 5e-4
    load_yaml(pretrain_mini.PretrainConfig, "configs/mini_pretrain.yaml")
    file = tmp_path / "config.yaml"
    for text, message in (
        ("learning_rat: 1", "learning_rat"),
        ("batch_size: many", "batch_size"),
        ("dms: {window: -3}", "window=-3"),
        ("kl: both", "kl='both'"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message) as error:
            load_yaml(RetrofitConfig, file)
        assert str(file) in str(error.value)


# The scripts


def test_snapshots():
    config = dataclasses.replace(CONFIG, max_cr=8.0, steps_per_cr=100, hold_steps=50)
    assert script.snapshots(config, (2, 4, 8, 9)) == {120: 2, 320: 4, 770: 8}
    adapter = dataclasses.replace(config, dms=DMSConfig(gate="adapter"), max_cr=2.5)
    assert script.snapshots(adapter, (2,)) == {100: 2, 200: 2.5}
    assert script.snapshots(config, ()) == {config.total_steps: 8}


HELP = {
    "scripts.pretrain_mini": lambda: tyro.cli(pretrain_mini.main, args=["--help"]),
    "scripts.retrofit": lambda: tyro.cli(script.main, args=["--help"]),
    "scripts.bench_generate": lambda: tyro.cli(bench_generate.Settings, args=["--help"]),
    "scripts.generate": lambda: generate.main(["--help"]),
    "experiments.aime": lambda: aime.main(["--help"]),
}


@pytest.mark.parametrize("name", HELP)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        HELP[name]()
    assert stop.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize("gate", ("query", "adapter"))
def test_script_writes_the_family(gate, tmp_path, monkeypatch):
    """The script as it is, on a one-layer model and short problems."""
    model = dataclasses.replace(MODEL, num_layers=1, family="llama", tie_embeddings=True)
    params = test_dms.random_params(model, None)
    dms_jax.save(dms_jax.LM(model, params), tmp_path / "base")
    monkeypatch.setattr(retrofit, "train_step", quick_step)
    monkeypatch.setattr(script, "training_pool", lambda seed, count, slip_rate: Batch(*(x[:count] for x in POOL)))
    (tmp_path / "config.yaml").write_text(
        f"dms: {{window: 3, gate: {gate}}}\nretire_steps: 2\nsteps_per_cr: 2\nmax_cr: 2.5\nbatch_size: 4"
    )
    script.main(tmp_path / "config.yaml", str(tmp_path / "base"), crs=(2,), out=tmp_path / "run", pool=16)
    for cr in (2, 2.5):
        lm = dms_jax.load(tmp_path / "run", cr=cr)
        assert lm.dms == DMSConfig(window=3, gate=gate, cr=cr)
        assert np.isfinite(lm.logits(np.arange(6)[None], dms=lm.dms)).all()
