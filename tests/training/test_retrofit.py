"""The distillation loss, one step, and the loop: what it learns, and that no interruption changes it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

import dms_jax
from dms_jax import dms, sharding
from dms_jax.config import ConfigError, DMSConfig, ModelConfig, load_yaml
from dms_jax.models import transformer
from dms_jax.models.gates import gate_of
from dms_jax.training import checkpoint, data, loop
from dms_jax.training import parameters as trainable
from dms_jax.training import step as retrofit
from dms_jax.training.config import LoraConfig, RetrofitConfig
from dms_jax.training.data import Batch, batch_at
from dms_jax.training.loss import distillation_loss
from experiments import aime
from scripts import generate, pretrain_mini
from scripts import retrofit as script
from scripts.benchmarks import bench_generate
from tests.helpers.models import random_params

V = 31
MODEL = ModelConfig("llama", V, 2, 12, 4, 2, 6, 16)
QUERY = DMSConfig(window=2)
CONFIG = RetrofitConfig(
    dms=QUERY,
    retire_steps=20,
    steps_per_cr=20,
    max_cr=2.0,
    hold_steps=20,
    learning_rate=1e-2,
    warmup_steps=2,
    batch_size=8,
)
TOTAL = 60


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
    real = jnp.arange(th.shape[1]) < lengths[:, None]
    return distillation_loss(th, sh, tk, sk, real, direction, chunk) / lengths.sum()


@functools.partial(jax.jit, static_argnames=("chunk", "direction"))
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
        return jax.jit(grad).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    one = 4 * T * V
    assert scratch(64) < 0.7 * one < one < scratch(T)


def apply(params, config, attend, neuron_scale=0.0):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (3, 14)))
    positions = transformer.arange_positions(tokens)
    decoder = transformer.Decoder(MODEL, config)
    return decoder.apply({"params": params}, tokens, positions, attend, (), neuron_scale, method="logits")


@pytest.mark.parametrize("gate, offset, sinks", [("query", 0, 0), ("adapter", 1, 2), ("query", 3, 0)])
def test_saturated_soft_mask_is_the_hard_mask(gate, offset, sinks):
    """Logits far beyond the noise: training sees what inference does, and counts what it evicts."""
    config = DMSConfig(window=2, gate=gate, decision_offset=offset, scale=1e6, logit_bias=1e5, sinks=sinks)
    params = random_params(MODEL, config)
    lengths = jnp.array([14, 1, 6])
    batch = data.one_document(Batch(np.zeros((3, 14), int), np.ones(3, int), np.asarray(lengths)))
    keys = jax.random.split(jax.random.PRNGKey(0), 3)

    @functools.partial(jax.jit)
    def both():
        soft = apply(params, config, retrofit.soft_eviction(config, batch, keys))
        return soft, apply(params, config, transformer.hard_eviction(config, lengths))

    (soft, counts), (hard, alphas) = both()
    real = np.asarray(batch.segments > 0)  # what padding sees is no one's concern
    np.testing.assert_allclose(soft[real], hard[real], atol=1e-5)
    assert 0.1 < np.mean(counts) / lengths.sum() < 0.8
    assert not np.any(np.asarray(alphas)[..., :sinks])
    for count, alpha in zip(counts, alphas, strict=True):
        real = np.arange(14) < lengths[:, None, None]
        np.testing.assert_allclose(count, (alpha & real).sum((0, 2)), rtol=1e-5)


def test_retirement_starts_at_the_teacher_and_ends_without_the_neuron():
    params = random_params(MODEL, None)

    @functools.partial(jax.jit, static_argnames="config")
    def logits(params, scale, config):
        return apply(params, config, transformer.causal, scale)[0]

    student, teacher = functools.partial(logits, config=QUERY), logits(params, 0.0, None)
    np.testing.assert_array_equal(student(params, 1.0), teacher)
    assert np.abs(dms.kl(teacher, student(params, 1.0))).max() == 0
    without = student(params, 0.0)
    assert np.asarray(dms.kl(teacher, without)).mean() > 1e-3
    reset = gate_of(QUERY).reset_neuron(params, MODEL)
    np.testing.assert_array_equal(student(reset, 0.0), without)
    half = student(params, 0.5)
    assert np.abs(half - teacher).max() > 1e-3 and np.abs(half - without).max() > 1e-3


def test_schedule_of_a_run():
    assert CONFIG.total_steps == TOTAL
    assert dataclasses.replace(CONFIG, dms=DMSConfig(gate="adapter")).retirement == 0
    assert RetrofitConfig().total_steps == 2000 + 700


def test_with_gate_adds_a_gate_that_evicts_nothing():
    adapter = DMSConfig(window=2, gate="adapter")
    params = random_params(MODEL, None)
    assert gate_of(QUERY).with_gate(params, MODEL) is params
    got = gate_of(adapter).with_gate(params, MODEL)
    want = jax.eval_shape(lambda: transformer.init(jax.random.key(0), MODEL, adapter))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), want)
    assert "gate" not in params["layers_0"]["attn"], "the teacher's tree is as it was"
    own = jax.tree.map(lambda x: x + 1, got)
    again = gate_of(adapter).with_gate(own, MODEL)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(own), strict=True))


# The loop

TEACHER = random_params(MODEL, None)


def sequences() -> Batch:
    rng = np.random.default_rng(0)
    return Batch(rng.integers(0, V, (64, 16)), np.ones(64, int), rng.integers(4, 17, 64))


POOL = sequences()


@functools.cache
def quick_step(model, config, retiring, places=None):
    return retrofit.compiled_step(model, config, retiring, places)


def nothing(step, state):
    return state


def start(config=CONFIG):
    return retrofit.start(TEACHER, MODEL, config, sharding.make_mesh((1, 1, 1)))


def problems(cursor):
    """The pool as a stream of rows."""
    pool = data.pool_stream(POOL, CONFIG.batch_size, CONFIG.seed)
    return ((data.one_document(batch), after) for batch, after in pool(cursor))


def fit(folder, on_step=nothing, config=CONFIG, **options):
    """The run of scripts/retrofit.py on the tiny model."""
    state, base, _ = start(config)

    def each(step, state):
        if step == config.retirement and step:
            state = state._replace(params=config.gate.reset_neuron(state.params, MODEL))
        return on_step(step, state)

    def step_fn(step, state, batch):
        return quick_step(MODEL, config, step < config.retirement)(state, base, batch)

    options = {"save_every": 20, "log_every": 2, "on_step": each, **options}
    return loop.fit(step_fn, state, problems, config.total_steps, folder, **options)


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
        state, base, _ = start()
        batch = data.one_document(batch_at(POOL, 0, 8, 0))
        return quick_step(MODEL, CONFIG, False)(state._replace(step=jnp.array(step)), base, batch)[1]["kl"]

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


def newest(folder, like):
    with checkpoint.Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.restore(like)


def test_a_loss_of_nan_stops_the_run_and_spares_the_checkpoint(whole, tmp_path):
    def poison(step, state):
        return state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params)) if step == 43 else state

    with pytest.raises(FloatingPointError, match="loss=nan at step 43; .* starts at 44; last good checkpoint: 40"):
        fit(tmp_path, poison)
    with np.load(tmp_path / "batch_of_step_43.npz") as saved:
        want = data.one_document(batch_at(POOL, 43, CONFIG.batch_size, CONFIG.seed))
        np.testing.assert_array_equal(saved["tokens"], want.tokens)
        np.testing.assert_array_equal(saved["segments"], want.segments)
    assert "NaN" not in (tmp_path / "log.jsonl").read_text() and log_of(tmp_path)[-1]["step"] == 42
    step, state, cursor = newest(tmp_path, start()[0])
    assert step == state.step == cursor == 40
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert_same(fit(tmp_path), whole[1])


def test_a_gradient_of_nan_is_not_saved(tmp_path):
    """The loss is that of the parameters before the step: it may be finite when what would be saved is not."""
    state = retrofit.TrainState({"w": jnp.ones(2)}, (), jnp.zeros((), jnp.int32))

    def step_fn(step, state, batch):
        metrics = {"loss": jnp.ones(()), "grad_norm": jnp.array(jnp.nan)}
        return state._replace(params={"w": jnp.full(2, jnp.nan)}), metrics

    with pytest.raises(FloatingPointError, match="grad_norm=nan at step 0; .*; last good checkpoint: None"):
        loop.fit(step_fn, state, problems, 2, tmp_path, save_every=1)
    assert checkpoint.steps_in(tmp_path / "checkpoints") == []


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
    file.write_text("dms: {window: 7, offset: 2.5, cr: 8}")  # as it was called before, and a field that is gone
    assert load_yaml(RetrofitConfig, file).dms == DMSConfig(window=7, logit_bias=2.5)
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


def test_members_of_a_family():
    config = dataclasses.replace(CONFIG, max_cr=4.0, steps_per_cr=100, hold_steps=50)
    assert config.members() == {120: 2, 220: 3, 370: 4}
    adapter = dataclasses.replace(config, dms=DMSConfig(gate="adapter"), max_cr=2.5)
    assert adapter.members() == {100: 2, 200: 2.5}


HELP = {
    "scripts.pretrain_mini": lambda: tyro.cli(pretrain_mini.main, args=["--help"]),
    "scripts.retrofit": lambda: tyro.cli(script.main, args=["--help"]),
    "scripts.benchmarks.bench_generate": lambda: tyro.cli(bench_generate.Settings, args=["--help"]),
    "scripts.generate": lambda: generate.main(["--help"]),
    "experiments.aime": lambda: aime.main(["--help"]),
}


@pytest.mark.parametrize("name", HELP)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        HELP[name]()
    assert stop.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.fixture
def tiny_script(tmp_path, monkeypatch):
    """A one-layer model in a folder, and short problems."""
    model = dataclasses.replace(MODEL, num_layers=1, family="llama", tie_embeddings=True)
    dms_jax.save(dms_jax.LM(model, random_params(model, None)), tmp_path / "mini")
    monkeypatch.setattr(
        pretrain_mini, "training_pool", lambda seed, count, slip_rate: Batch(*(x[:count] for x in POOL))
    )
    return tmp_path


@pytest.mark.parametrize("mode, gate", [("full", "query"), ("lora", "query"), ("adapter", "adapter")])
def test_script_writes_the_family(mode, gate, tiny_script):
    """The script as it is, on a one-layer model and short problems: what it writes is loaded, and evicts."""
    folder = tiny_script
    (folder / "config.yaml").write_text(
        f"mode: {mode}\ndms: {{window: 3, gate: {gate}}}\nretire_steps: 2\nsteps_per_cr: 2\nmax_cr: 2.5\nbatch_size: 4"
    )
    overrides = script.Overrides(model=str(folder / "mini"), learning_rate=0.3)
    script.main(folder / "config.yaml", overrides, out=folder / "run", pool=16)
    ids = np.arange(12)[None]
    base = dms_jax.load(folder / "mini", dtype="float32").logits(ids)
    for cr in (2, 2.5):
        if mode == "adapter":
            lm = dms_jax.load(folder / "mini", gate=folder / "run" / f"gate_cr{cr:g}.safetensors")
        else:
            lm = dms_jax.load(folder / "run", cr=cr)
        assert lm.dms == DMSConfig(window=3, gate=gate) and lm.cr == cr
        sparse = lm.logits(ids, dms=lm.dms)
        assert np.isfinite(sparse).all()
        if mode == "adapter":
            assert np.abs(lm.logits(ids) - base).max() < 0.1, "the base is as it was"
    saved = json.loads((folder / "run" / "run.json").read_text())
    saved["dms"] = {**saved["dms"], "offset": saved["dms"].pop("logit_bias"), "cr": None}
    saved["dms"].pop("sinks")
    (folder / "run" / "run.json").write_text(json.dumps(saved))  # of an older version
    with pytest.raises(ConfigError, match="max_cr=3.0: .* started with 2.5"):
        script.main(folder / "config.yaml", dataclasses.replace(overrides, max_cr=3.0), out=folder / "run", pool=16)


# The modes

ADAPTER = DMSConfig(window=2, gate="adapter")


@pytest.mark.parametrize("gate", ("query", "adapter"))
def test_lora_merged_is_what_was_trained(gate):
    """Multiplied out, the low-rank model gives the logits of the one that adds updates as it goes."""
    settings = DMSConfig(window=2, gate=gate)
    config = dataclasses.replace(
        CONFIG, mode="lora", dms=settings, lora=LoraConfig(rank=3, alpha=7.0, targets=("q", "o"))
    )
    state, base, _ = start(config)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32), state.params)
    assert len(jax.tree.leaves(trained)) == 2 * (2 * 2 + (2 if gate == "adapter" else 0))
    if gate == "query":
        trained = config.gate.reset_neuron(trained, MODEL)
    under = config.gate.reset_neuron(base, MODEL) if gate == "query" else base
    student = trainable.overlay(under, trainable.scaled(trained, config, jnp.float32))

    @functools.partial(jax.jit)
    def logits(params):
        return apply(params, settings, transformer.causal)[0]

    merged = logits(trainable.merged(base, trained, MODEL, config, jnp.float32))
    np.testing.assert_allclose(logits(student), merged, atol=1e-5)
    assert np.abs(merged - logits(trainable.overlay(under, config.gate.with_gate({**under}, MODEL)))).max() > 0.1


def test_what_is_trained():
    """Paths of each mode; and that a step changes them all, and nothing but them."""

    def paths(**changes):
        state, _, _ = start(dataclasses.replace(CONFIG, **changes))
        return {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(state.params)
        }

    gates = {f"layers_{n}/attn/gate/{name}" for n in range(2) for name in ("norm/scale", "proj/kernel")}
    assert paths(mode="adapter", dms=ADAPTER) == gates
    low = {f"layers_{n}/attn/v/lora/{name}" for n in range(2) for name in "ab"}
    lora = LoraConfig(targets=("v",))
    assert paths(mode="lora", lora=lora) == low and paths(mode="lora", lora=lora, dms=ADAPTER) == low | gates
    assert paths(dms=ADAPTER) == paths() | gates and len(paths()) == 2 * 9 + 3


def test_micro_batches_change_nothing():
    """Gradients of a batch taken whole, and in four micro-batches with every block recomputed."""
    gate = dataclasses.replace(ADAPTER, logit_bias=1.0)  # near the threshold, where gradients are large
    config = dataclasses.replace(CONFIG, dms=gate, mode="adapter", max_cr=8.0)
    batch = data.one_document(batch_at(POOL, 0, 8, 0))
    step = jnp.array(40)  # alpha is below its target in every micro-batch: the compression loss is linear there

    def grads(**changes):
        settings = dataclasses.replace(config, **changes)
        state, base, _ = start(settings)
        own = functools.partial(retrofit.gradients, model=MODEL, config=settings, retiring=False)
        return jax.jit(own)(state.params, base, batch, step)

    whole, terms = grads()
    for changes in ({"accumulate": 4, "remat": "block"}, {"accumulate": 2, "remat": "dots", "loss_chunk": 5}):
        parts, same = grads(**changes)
        for x, y in zip(jax.tree.leaves((whole, terms)), jax.tree.leaves((parts, same)), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6)
    assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(whole)[1::2])


def test_packed_documents_do_not_see_each_other():
    """A row of two documents and padding gives each what it gets alone: hidden states, evictions, loss."""
    config = dataclasses.replace(CONFIG, dms=DMSConfig(window=1, gate="adapter", decision_offset=1), loss_chunk=7)
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, V, (1, 9)), rng.integers(0, V, (1, 5))
    row = np.concatenate([first, second, np.zeros((1, 2), int)], 1)
    positions = np.concatenate([np.arange(9), np.arange(5), np.arange(2)])[None]
    packed = data.Packed(row, positions, np.array([[1] * 9 + [2] * 5 + [0] * 2]))
    params = random_params(MODEL, config.dms)
    seen = []
    for batch in (packed, *(data.Packed(x, np.arange(x.size)[None], np.ones_like(x)) for x in (first, second))):

        def noiseless(logit, key, tau):
            return logit * 50

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dms, "gumbel_sigmoid", noiseless)
            attend = retrofit.soft_eviction(config.dms, batch, jax.random.split(jax.random.PRNGKey(0), 1))
            decoder = transformer.Decoder(MODEL, config.dms)
            seen.append(decoder.apply({"params": params}, batch.tokens, batch.positions, attend))
    (whole, counts), (one, ones), (two, twos) = seen
    np.testing.assert_allclose(whole[:, :9], one, atol=1e-5)
    np.testing.assert_allclose(whole[:, 9:14], two, atol=1e-5)
    for count, a, b in zip(counts, ones, twos, strict=True):
        np.testing.assert_allclose(count, a + b, atol=1e-5)
    assert 0 < np.sum(counts) < 0.9 * 14 * 2 * 2
