"""What comes out of a run: exported models and gates with their cards, and chains sampled to train on."""

import dataclasses
import json

import numpy as np
import pytest

import dms_jax
from dms_jax.config import ConfigError, DMSConfig, ModelConfig
from dms_jax.config_files import load_yaml
from dms_jax.training import checkpoint, watch
from dms_jax.training.config import RetrofitConfig
from dms_jax.training.data import Batch
from paper_figures import training_curves
from scripts import export, pretrain_mini, sample_traces
from scripts import retrofit as script
from scripts.benchmarks import bench_retrofit
from tests.helpers.models import random_params

MODEL = ModelConfig("llama", 31, 1, 12, 4, 2, 6, 16, tie_embeddings=True)
CONFIG = """mode: {mode}
dms: {{window: 3, gate: {gate}}}
retire_steps: 2
steps_per_cr: 2
max_cr: 3
learning_rate: 0.3
batch_size: 4
log_every: 1
"""


@pytest.fixture(scope="module", params=[("adapter", "adapter"), ("lora", "query")], ids=["adapter", "lora"])
def run(request, tmp_path_factory):
    """The folder of a run with CR 2 and 3, and its mode."""
    mode, gate = request.param
    folder = tmp_path_factory.mktemp(mode)
    dms_jax.save(dms_jax.LM(MODEL, random_params(MODEL)), folder / "base")
    (folder / "config.yaml").write_text(CONFIG.format(mode=mode, gate=gate))
    rng = np.random.default_rng(0)
    pool = Batch(rng.integers(0, 31, (8, 16)), np.ones(8, int), rng.integers(4, 17, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_mini, "training_pool", lambda *args: pool)
        script.main(folder / "config.yaml", script.Overrides(model=str(folder / "base")), out=folder / "run")
    return folder, mode


def test_exported_is_what_the_run_wrote(run):
    """From the checkpoint at a whole CR comes what the run wrote when it passed there, bit for bit."""
    folder, mode = run
    for cr in (2.0, 3.0):
        export.main(folder / f"out{cr:g}", folder / "run", cr)
        lm = dms_jax.load(folder / f"out{cr:g}")
        if mode == "adapter":
            want = dms_jax.load(folder / "base", gate=folder / "run" / f"gate_cr{cr:g}.safetensors")
        else:
            want = dms_jax.load(folder / "run", cr=cr)
        assert lm.dms == want.dms and lm.cr == want.cr == cr
        ids = np.arange(12)[None]
        np.testing.assert_array_equal(lm.logits(ids, dms=lm.dms), want.logits(ids, dms=want.dms))
    assert (folder / "run" / "finished").exists()


def test_the_card_tells_what_was_done(run):
    folder, mode = run
    export.main(folder / "card", folder / "run", 2.0)
    card = (folder / "card" / "README.md").read_text()
    figures = export.measured(folder / "run", export.step_of(2.0, export.settings_of_run(folder / "run")))
    assert f"{figures['kl']:.4g} nats" in card and f"{figures['achieved_cr']:.2f}" in card
    log = folder / "run" / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-7] + b"\nno line")  # cut off: what is left is read
    assert export.measured(folder / "run", 10**6)["kl"] > 0
    log.write_bytes(whole)
    assert "the mini task" in card and f"base_model: {folder / 'base'}" in card
    assert ("the gate, over frozen weights" if mode == "adapter" else "low-rank updates of q, k, v, o, rank 16") in card


def test_the_card_says_how_each_program_loads_it(run):
    """From this folder, from another export, or why not; and the run's settings are there to repeat it."""
    folder, mode = run
    export.main(folder / "hf", folder / "run", 3.0, format="hf")
    card = (folder / "hf" / "README.md").read_text()
    assert "library_name: transformers" in card and 'pipeline("text-generation", model="this folder"' in card
    assert 'dms_jax.load("this folder")' in card
    assert "Not in nvidia: family='llama': NVIDIA's code is for qwen3." in card
    if mode == "adapter":
        assert "Not in fastdms: gate='adapter'" in card
    else:
        assert '`python -m scripts.export --model "this folder" --format fastdms --out OUT`' in card
        assert 'LLM("OUT")' in card
    settings = load_yaml(RetrofitConfig, folder / "hf" / "retrofit.json")
    assert settings == export.settings_of_run(folder / "run") and "--config retrofit.json" in card


def test_a_model_without_a_run(run):
    """What dms_jax.load reads is exported again, in another format."""
    folder, mode = run
    export.main(folder / "first", folder / "run", 2.0)
    form = "hf" if mode == "adapter" else "fastdms"
    export.main(folder / "again", model=str(folder / "first"), dtype="float32", format=form)
    first, again = (dms_jax.load(folder / name, dtype="float32") for name in ("first", "again"))
    ids = np.arange(12)[None]
    np.testing.assert_array_equal(again.logits(ids, dms=again.dms), first.logits(ids, dms=first.dms))
    assert again.dms == first.dms and again.cr == 2.0
    raw = json.loads((folder / "again" / "config.json").read_text())
    if form == "hf":
        assert raw["auto_map"] == {"AutoModelForCausalLM": "modeling_dms.DMSForCausalLM"}
        shipped = (folder / "again" / "modeling_dms.py").read_text()
        assert "Apache License" in shipped and shipped == export.MODELLING.read_text()
        gate = folder / "run" / "gate_cr3.safetensors"
        export.main(folder / "laid", model=str(folder / "base"), gate=str(gate))
        assert dms_jax.load(folder / "laid").cr == 3.0
    card = (folder / "again" / "README.md").read_text()
    assert f"Made from {folder / 'first'}." in card and "| target compression ratio | 2 |" in card


def test_the_adapter_alone(run):
    folder, mode = run
    if mode != "adapter":
        with pytest.raises(ConfigError, match="format='adapter': the run trained in mode lora"):
            export.main(folder / "alone", folder / "run", 2.0, format="adapter")
        return
    export.main(folder / "alone", folder / "run", 2.0, format="adapter")
    lm = dms_jax.load(folder / "base", gate=folder / "alone" / "gate.safetensors")
    assert (lm.dms, lm.cr) == (DMSConfig(window=3, gate="adapter"), 2.0)
    assert 'gate="gate.safetensors"' in (folder / "alone" / "README.md").read_text()


def test_what_cannot_be_exported(run, tmp_path):
    folder, _ = run
    with pytest.raises(ConfigError, match="model=None: expected a --run or a --model"):
        export.main(tmp_path)
    with pytest.raises(ConfigError, match="cr=None: which member"):
        export.main(tmp_path, folder / "run")
    with pytest.raises(ConfigError, match="gate='smollm2': is of a model without a run"):
        export.main(tmp_path, folder / "run", 2.0, gate="smollm2")
    with pytest.raises(ConfigError, match="model=.* never retrofitted"):
        export.main(tmp_path, model=str(folder / "base"))
    with pytest.raises(ConfigError, match="cr=5.0: the family has 2, 3"):
        export.main(tmp_path, folder / "run", 5.0)
    with pytest.raises(ConfigError, match="run.json"):
        export.main(tmp_path, folder / "base", 2.0)
    step = export.step_of(2.0, export.settings_of_run(folder / "run"))
    seal = folder / "run" / "checkpoints" / str(step) / checkpoint.SEAL
    sums = seal.read_text()
    try:
        seal.write_text(sums.replace('": [', '": [1'))
        with pytest.raises(checkpoint.CheckpointError, match=f"{step} is damaged"):
            export.main(tmp_path, folder / "run", 2.0)
    finally:
        seal.write_text(sums)
    (folder / "run" / "checkpoints" / str(step)).rename(folder / "run" / "checkpoints" / "aside")
    try:
        with pytest.raises(checkpoint.CheckpointError, match=f"{step} is not there"):
            export.main(tmp_path, folder / "run", 2.0)
    finally:
        (folder / "run" / "checkpoints" / "aside").rename(folder / "run" / "checkpoints" / str(step))


def test_curves_of_a_run(run, tmp_path):
    folder, mode = run
    rows = training_curves.read(folder / "run" / "log.jsonl")
    figure = training_curves.draw_run(rows)
    losses, ratios, layers = figure.axes[:3]
    evicting = [row for row in rows if "alpha" in row]
    assert len(losses.lines[0].get_xdata()) == len(rows) == len(evicting) + 2 * (mode == "lora")
    np.testing.assert_array_equal(ratios.lines[0].get_ydata(), [row["achieved_cr"] for row in evicting])
    assert layers.images[0].get_array().shape == (1, len(evicting))
    training_curves.main([str(folder / "run" / "log.jsonl"), "--out", str(tmp_path / "curves")])
    assert (tmp_path / "curves.png").stat().st_size > 1000


# Sampling chains


class Letters:
    """a = 1, b = 2 ...; no chat template."""

    eos_token = "!"

    def __call__(self, text):
        return {"input_ids": [ord(c) % 30 + 1 for c in text]}

    def decode(self, tokens, skip_special_tokens):
        return "".join(chr(96 + t) for t in tokens if t)


def test_sampled_chains_are_documents_to_train_on(tmp_path, tiny_family, monkeypatch):
    """A chain for each row and number, the same whatever ran before; a run that was cut off adds what is missing."""
    monkeypatch.setattr(dms_jax, "load", lambda *args, **kwargs: tiny_family("mini"))
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps({"problem": f"Let a = {n}."}) + "\n" for n in range(7)))
    settings = sample_traces.Settings(
        "mini", str(data), out, chains=2, max_num_seqs=3, max_new_tokens=12, finished_only=False
    )
    sample_traces.main(settings)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((line["row"], line["chain"]) for line in lines) == [(row, c) for row in range(7) for c in range(2)]
    assert all(line["messages"][0]["content"] == f"Let a = {line['row']}." for line in lines)
    whole = {(line["row"], line["chain"]): line for line in lines}
    assert any(line["finished"] for line in lines) and not all(line["finished"] for line in lines)
    out.write_bytes(out.read_bytes()[: len(out.read_bytes()) // 2])
    sample_traces.main(settings)
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(again) == 14 and {(line["row"], line["chain"]): line for line in again} == whole
    out.unlink()
    sample_traces.main(dataclasses.replace(settings, finished_only=True))
    kept = {(line["row"], line["chain"]) for line in map(json.loads, out.read_text().splitlines())}
    assert kept == {key for key, line in whole.items() if line["finished"]}


def test_the_mini_model_writes_chains(tmp_path):
    """The real writer and model, for a few tokens."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "Let a = 123."}) + "\n")
    out = tmp_path / "out.jsonl"
    data = str(tmp_path / "data.jsonl")
    settings = sample_traces.Settings("mini", data, out, max_new_tokens=4, finished_only=False, instruction="Be brief.")
    sample_traces.main(settings)
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["messages"][0]["content"] == "Let a = 123.\nBe brief."
    assert line["tokens"] == 4 and line["messages"][1]["content"]


def test_prompts_are_needed(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"a": "b"}\n')
    with pytest.raises(ConfigError, match="row 0: no text in nothing .*it has a"):
        data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
        sample_traces.main(sample_traces.Settings("mini", str(data), out, prompt="nothing"))
    for limit in (0, -1):
        with pytest.raises(ConfigError, match=f"limit={limit}: must be positive"):
            sample_traces.main(sample_traces.Settings("mini", str(data), out, limit=limit))


@pytest.mark.parametrize("line", ["{", "[1]", '{"row": 1}', '{"row": "1", "chain": 0}', '{"row": 1, "chain": -1}'])
def test_a_damaged_line_is_named(tmp_path, line):
    out = tmp_path / "out.jsonl"
    out.write_text(f'{{"row": 0, "chain": 1}}\n{line}\n{{"row": 2, "ch')
    with pytest.raises(ConfigError, match="out.jsonl, line 2: "):
        sample_traces.resume(out)
    out.write_text('{"row": 0, "chain": 1}\n{"row": 2, "ch')
    assert sample_traces.resume(out) == {(0, 1)} and out.read_text() == '{"row": 0, "chain": 1}\n'


# Watching, timing


class Writer:
    """Stands for tensorboardX.SummaryWriter and for a run of wandb."""

    def __init__(self, *args, **kwargs):
        self.seen = []

    def add_scalar(self, key, value, step):
        self.seen.append((step, key, value))

    def log(self, values, step):
        self.seen += [(step, *item) for item in values.items()]

    def flush(self):
        pass


@pytest.mark.parametrize("name", watch.PACKAGES)
def test_watchers_get_every_number(name, tmp_path, monkeypatch):
    writer = Writer()

    class Package:
        SummaryWriter = init = staticmethod(lambda *args, **kwargs: writer)

    monkeypatch.setattr(watch.importlib, "import_module", {watch.PACKAGES[name]: Package}.get)
    watch.watcher(name, tmp_path, {})({"step": 3, "loss": 0.5, "alpha_by_head": [[0.25, 0.75], [1.0, 1.0]]})
    assert set(writer.seen) == {(3, "loss", 0.5), (3, "alpha_layer_0", 0.5), (3, "alpha_layer_1", 1.0)}


def test_a_watcher_that_is_not_installed(tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr(watch.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match="watch='tensorboard': needs `pip install tensorboardX`"):
        watch.watcher("tensorboard", tmp_path, {})
    with pytest.raises(ConfigError, match="watch='email'"):
        watch.watcher("email", tmp_path, {})


def test_benchmark_of_a_tiny_shape(tmp_path):
    fields = {key: value for key, value in dataclasses.asdict(MODEL).items() if key not in ("rope", "eos_ids")}
    (tmp_path / "tiny.yaml").write_text(json.dumps(fields))
    options = bench_retrofit.Options(
        tmp_path / "tiny.yaml", context=16, rows=2, accumulate=2, window=2, steps=3, out=tmp_path / "out.json"
    )
    got = bench_retrofit.main(options)
    assert got["tokens_per_second"] == 32 / got["seconds_per_step"] and got["mfu"] is None
    assert json.loads((tmp_path / "out.json").read_text()) == got and np.isfinite(got["loss"])
