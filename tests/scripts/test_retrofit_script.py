"""scripts.retrofit from its options to the models that it writes, and how it ends after a mistake."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest
import tyro

import dms_jax
from dms_jax.config import ConfigError, DMSConfig
from dms_jax.training.data import Batch
from experiments import aime
from scripts import command, generate, long_documents, pretrain_mini, retrofit
from scripts.benchmarks import bench_decode, bench_generate, bench_job, bench_retrofit
from tests.helpers.models import random_params
from tests.helpers.training import MODEL, POOL

HELP = {
    "scripts.pretrain_mini": lambda: tyro.cli(pretrain_mini.main, args=["--help"]),
    "scripts.retrofit": lambda: tyro.cli(retrofit.main, args=["--help"]),
    "scripts.benchmarks.bench_retrofit": lambda: tyro.cli(bench_retrofit.main, args=["--help"]),
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
def folder(tmp_path, monkeypatch):
    """A folder with a one-layer model, and short problems in place of the mini task's."""
    model = dataclasses.replace(MODEL, num_layers=1, tie_embeddings=True)
    dms_jax.save(dms_jax.LM(model, random_params(model, None)), tmp_path / "mini")
    monkeypatch.setattr(
        pretrain_mini, "training_pool", lambda seed, count, slip_rate: Batch(*(x[:count] for x in POOL))
    )
    return tmp_path


def config_file(folder, mode="full", gate="query"):
    text = (
        f"mode: {mode}\ndms: {{window: 3, gate: {gate}}}\nretire_steps: 2\nsteps_per_cr: 2\nmax_cr: 2.5\nbatch_size: 4"
    )
    (folder / "config.yaml").write_text(text)
    return folder / "config.yaml"


@pytest.mark.parametrize("mode, gate", [("full", "query"), ("lora", "query"), ("adapter", "adapter")])
def test_script_writes_the_family(mode, gate, folder):
    """The script as it is, on a one-layer model and short problems: what it writes is loaded, and evicts."""
    config = config_file(folder, mode, gate)
    overrides = retrofit.Overrides(model=str(folder / "mini"), learning_rate=0.3)
    half = "run/.gate_cr2.safetensors.new" if mode == "adapter" else "run/cr2/.dms_jax-save/model.safetensors"
    (folder / half).parent.mkdir(parents=True)
    (folder / half).write_text("as a process leaves it that was killed")
    retrofit.main(config, overrides, out=folder / "run", pool=16)
    assert not list((folder / "run").rglob(".*"))
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
    with pytest.raises(ConfigError, match="max_cr=3.0: .* started with 2.5"):
        retrofit.main(config, dataclasses.replace(overrides, max_cr=3.0), out=folder / "run", pool=16)


def test_a_run_goes_on_with_what_may_change(folder):
    """The settings in the folder are then those of the last start; before, they may be those of an older version."""
    config = config_file(folder)
    settings = retrofit.settings_of(config, retrofit.Overrides())
    retrofit.record_run(folder, settings)
    saved = json.loads((folder / "run.json").read_text())
    del saved["crs"]
    (folder / "run.json").write_text(json.dumps(saved))
    changed = dataclasses.replace(settings, crs=(1.5,), log_every=3)
    retrofit.record_run(folder, changed)
    assert retrofit.read_run(folder) == changed
    (folder / "checkpoints" / "5").mkdir(parents=True)
    retrofit.record_run(folder, changed)
    with pytest.raises(ConfigError, match=r"crs=\(1.5, 2.0\): the run in .* is at step 5 already"):
        retrofit.record_run(folder, dataclasses.replace(settings, crs=(1.5, 2.0)))
    (folder / "checkpoints" / "5").rmdir()
    with pytest.raises(ConfigError, match=r"dms=.*window=4.* was started with .*window=3"):
        retrofit.record_run(folder, dataclasses.replace(settings, dms=DMSConfig(window=4)))


def test_a_branch_ends_as_a_run_to_its_ratio_does(folder):
    """Copied from a run to a higher one, held at its own: bit by bit what a run from the start gives."""
    config = config_file(folder)
    overrides = retrofit.Overrides(model=str(folder / "mini"), learning_rate=0.3, hold_steps=3)
    retrofit.main(config, overrides, out=folder / "long", pool=16)
    lower = dataclasses.replace(overrides, max_cr=2.0)
    retrofit.main(config, lower, out=folder / "branch", branch_of=folder / "long", pool=16)
    retrofit.main(config, lower, out=folder / "straight", pool=16)
    steps = [json.loads(line)["step"] for line in (folder / "branch" / "log.jsonl").read_text().splitlines()]
    assert steps and min(steps) > 4, "steps to warm up, retire the neuron and reach CR 2 are not taken again"
    branched, straight, copied = (dms_jax.load(folder / run, cr=2).params for run in ("branch", "straight", "long"))
    assert jax.tree.all(jax.tree.map(np.array_equal, branched, straight))
    assert not jax.tree.all(jax.tree.map(np.array_equal, branched, copied))
    retrofit.main(config, lower, out=folder / "branch", branch_of=folder / "long", pool=16)  # finished: nothing changes


def test_what_no_branch_can_begin_with(folder):
    config = config_file(folder)
    overrides = retrofit.Overrides(model=str(folder / "mini"), learning_rate=0.3)
    retrofit.main(config, overrides, out=folder / "long", pool=16)
    for changes, message in (
        ({"max_cr": 2.5}, r"max_cr=2.5: .*keeps checkpoints of \[2.0, 2.5\]"),
        ({"max_cr": 1.5}, "max_cr=1.5: "),
        ({"max_cr": 2.0, "seed": 3}, "seed=3: branch_of: the run in .*long was started with 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            retrofit.main(
                config,
                dataclasses.replace(overrides, **changes),
                out=folder / "new",
                branch_of=folder / "long",
                pool=16,
            )
        assert not (folder / "new" / "checkpoints").exists()
    shutil.rmtree(folder / "long" / "checkpoints" / "4")
    with pytest.raises(ConfigError, match=r"keeps checkpoints of \[2.5\]"):
        retrofit.main(
            config, dataclasses.replace(overrides, max_cr=2.0), out=folder / "new", branch_of=folder / "long", pool=16
        )


def test_fields_of_the_eviction_are_replaced_too(folder):
    """Also by 0, which is a window and an offset."""
    config = config_file(folder)
    overrides = retrofit.Overrides(gate="adapter", window=0, decision_offset=0, max_cr=2.0)
    settings = retrofit.settings_of(config, overrides)
    assert settings.dms == DMSConfig(window=0, gate="adapter") and settings.max_cr == 2
    with pytest.raises(ConfigError, match="decision_offset=9"):
        retrofit.settings_of(config, retrofit.Overrides(decision_offset=9))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"max_cr": 0}', '{"unknown": 1}', "[" * 5000])
def test_damaged_settings_are_named(folder, text):
    (folder / "run.json").write_text(text)
    with pytest.raises(ConfigError, match="run.json"):
        retrofit.record_run(folder, retrofit.settings_of(config_file(folder), retrofit.Overrides()))


# Mistakes end with one line


def ended(capsys, monkeypatch, main, *arguments, settings=None) -> tuple[int, str]:
    """Exit status and last line of a script that is run from a shell."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        command.run(main, settings)
    *_, line = capsys.readouterr().err.splitlines()
    return stop.value.code, line


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    """What `command.run` changes in the process that ends, this one gets back."""
    import logging

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(logging, "disable", lambda: None)
    level = logging.getLogger("absl").level
    yield
    logging.getLogger("absl").setLevel(level)


def test_mistakes_of_a_retrofit(folder, capsys, monkeypatch):
    (folder / "file").write_text("")
    model = dataclasses.replace(MODEL, num_layers=1)
    dms_jax.save(dms_jax.LM(model, random_params(model), dms=DMSConfig(window=3)), folder / "member")
    config = config_file(folder)
    run = ("--config", config, "--model", folder / "mini", "--out")
    for arguments, message in (
        ((*run, folder / "file" / "run"), "error: [Errno 20] Not a directory"),
        ((*run, folder / "run", "--max-cr", "1"), "error: max_cr=1.0: must be above 1"),
        ((*run, folder / "run", "--max-cr", "2.3"), "error: max_cr=2.3: no whole step reaches it"),
        ((*run, folder / "run", "--slip-rate", "1.5"), "error: slip_rate=1.5: expected a finite number from 0 to 1"),
        ((*run, folder / "run", "--pool", "0"), "error: pool=0: expected a whole number from 1"),
        ((*run, folder / "run", "--data", folder / "nothing.jsonl"), "error: tokenizer=None: "),
        (("--config", config, "--model", folder / "nothing"), f"error: {folder / 'nothing'}: neither an HF folder"),
        (("--config", config, "--model", folder / "member"), f"error: model='{folder / 'member'}': is retrofitted"),
        (("--config", folder / "nothing.yaml"), "error: [Errno 2] No such file or directory"),
    ):
        code, line = ended(capsys, monkeypatch, retrofit.main, *arguments)
        assert code == 1 and line.startswith(message)


def test_ctrl_c(folder, capsys, monkeypatch):
    def main() -> None:
        raise KeyboardInterrupt

    assert ended(capsys, monkeypatch, main) == (130, "interrupted")


def test_other_errors_keep_their_traceback(monkeypatch):
    def main() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(ZeroDivisionError):
        command.run(main)


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        (bench_decode, ("--model", "gpt"), "error: model='gpt': expected "),
        (bench_decode, ("--model", "tiny", "--cells", "8x"), "error: cells='8x': expected BATCHxCONTEXTxCR"),
        (bench_job, ("--model", "nosuch.yaml"), "error: [Errno 2] No such file or directory: 'nosuch.yaml'"),
        (long_documents, ("--problems", "nosuch.jsonl"), "error: nosuch.jsonl: no such file"),
    ],
)
def test_scripts_with_settings(script, arguments, message, capsys, monkeypatch):
    status, line = ended(capsys, monkeypatch, script.main, *arguments, settings=script.Settings)
    assert status == 1 and line.startswith(message)
