"""Writes a retrofitted model for others to load, with a model card: a member of a run's family, or a model loaded.

A folder of weights, configuration and tokenizer that `dms_jax.load` reads, and with --format also transformers,
NVIDIA's Model-Optimizer or FastDMS (docs/interop.md); or, for an adapter over a frozen base, the gate's file alone.

examples:
  python -m scripts.export --run runs/qwen3_8b --cr 8 --format nvidia --out qwen3-8b-dms-cr8
  python -m scripts.export --run runs/smollm2 --cr 4 --format adapter --out smollm2-gate-cr4
  python -m scripts.export --model SmolLM2.gguf --gate smollm2 --cr 4 --format hf --out smollm2-dms-cr4
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

import dms_jax
from dms_jax import sharding
from dms_jax.config import require
from dms_jax.files import write_atomically
from dms_jax.models.gates import gate_of
from dms_jax.training import checkpoint
from dms_jax.training.config import RetrofitConfig
from dms_jax.training.log import read_log
from dms_jax.training.step import initial_state, member_params
from dms_jax.training.train import retrofitted
from scripts import command
from scripts.model_card import card, rows_of_run
from scripts.retrofit import RUN, read_run

CARD, SETTINGS = "README.md", "retrofit.json"
LINES = 10  # of the log, that the card's figures are means of
MODELLING, CLASS = Path(__file__).parent / "export_hf" / "modeling_dms.py", "DMSForCausalLM"


def settings_of_run(run: Path) -> RetrofitConfig:
    """The settings that a run was started with."""
    file = run / RUN
    require(file.is_file(), "run", str(run), f"is no folder of scripts.retrofit: it has no {RUN}")
    return read_run(run)


def step_of(cr: float, settings: RetrofitConfig) -> int:
    """The step at which the schedule has reached a CR of the family."""
    family = settings.members().values()
    require(cr in family, "cr", cr, f"the family has {', '.join(f'{value:g}' for value in family)}")
    return settings.step_of(cr)


def trained_member(run: Path, cr: float, settings: RetrofitConfig, lm: dms_jax.LM) -> dms_jax.LM:
    """The member from the checkpoint that was kept when the schedule reached its CR.

    Raises:
      CheckpointError: it is not there, or damaged.
    """
    step, folder = step_of(cr, settings), run / "checkpoints"
    fault = checkpoint.fault(folder / str(step)) if (folder / str(step)).is_dir() else "not there"
    if fault:
        raise checkpoint.CheckpointError(f"{folder / str(step)} is {fault}")
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    settings = dataclasses.replace(settings, mesh=(1, 1, 1))
    state, base = initial_state(lm.params, lm.config, settings, mesh)
    state = checkpoint.read(folder, step, state)
    return retrofitted(lm, member_params(state, base, lm.config, settings), settings.dms, cr)


def measured(run: Path, step: int, last: int = LINES) -> dict[str, float]:
    """Means of the last lines of the log up to a step, of those with eviction."""
    lines, _ = read_log(run / "log.jsonl")
    lines = [line for line in lines if line["step"] <= step and "alpha" in line][-last:]
    return {key: float(np.mean([line[key] for line in lines])) for key in ("kl", "achieved_cr") if lines}


def write(lm: dms_jax.LM, out: Path, format: str) -> None:
    """Writes a model in one of the formats.

    Raises:
      ConfigError: a model that the format cannot express.
    """
    if format == "adapter":
        out.mkdir(parents=True, exist_ok=True)
        dms_jax.save_gate(lm, out / "gate.safetensors")
    elif format == "hf":
        known = lm.dms is not None and bool(gate_of(lm.dms).foreign)
        require(known, "format", format, f"{MODELLING.name} has not the gate {lm.dms and lm.dms.gate!r}")
        require(lm.config.latent is None, "format", format, f"{MODELLING.name} has no latent attention")
        dms_jax.save(lm, out)
        shutil.copy(MODELLING, out)
        config = json.loads((out / "config.json").read_text())
        config |= {"architectures": [CLASS], "auto_map": {"AutoModelForCausalLM": f"{MODELLING.stem}.{CLASS}"}}
        write_atomically(out / "config.json", json.dumps(config, indent=2) + "\n")
    else:
        dms_jax.save(lm, out, format=format)


class Found(NamedTuple):
    """A model to export, the base it was retrofitted from, and for its card further rows and where they are from."""

    lm: dms_jax.LM
    base: str
    rows: dict[str, str]
    how: str


def from_run(run: Path, cr: float | None, format: str, model: str | None) -> Found:
    """A member of a run's family."""
    settings = settings_of_run(run)
    mode = settings.mode
    require(format != "adapter" or mode == "adapter", "format", format, f"the run trained in mode {mode}")
    require(cr is not None, "cr", cr, "which member of the family?")
    step = step_of(cr, settings)
    base = dms_jax.load(model or settings.model, dtype=settings.compute)
    how = (
        f"The figures are means over the last {LINES} lines of the run's log up to that step, on training data. "
        f"The run is `python -m scripts.retrofit --config {SETTINGS}`."
    )
    rows = rows_of_run(settings, step, measured(run, step))
    return Found(trained_member(run, cr, settings, base), settings.model, rows, how)


def from_model(model: str | None, cr: float | None, gate: str | None, dtype: str) -> Found:
    """A model that `dms_jax.load` reads."""
    require(model is not None, "model", model, "expected a --run or a --model")
    lm = dms_jax.load(model, dtype=dtype, gate=gate, cr=cr)
    require(lm.dms is not None, "model", model, "was never retrofitted (no DMSConfig)")
    source = model if gate is None else f"{model} and the gate {gate}"
    return Found(lm, model, {}, f"Made from {source}.")


def main(
    out: Path,
    run: Path | None = None,
    cr: float | None = None,
    format: Literal["dms_jax", "hf", "nvidia", "fastdms", "adapter"] = "dms_jax",
    model: str | None = None,
    gate: str | None = None,
    dtype: str = "bfloat16",
) -> None:
    """Writes OUT.

    Args:
      run: folder of scripts.retrofit.
      cr: which member of the family.
      format: who is to read it; "hf" is Hugging Face transformers, "adapter" the gate alone (runs of mode adapter).
      model: what dms_jax.load takes, in place of a run; or where the base of the run is, if not where it found it.
      gate: of a model without a run: see dms_jax.load.
      dtype: of a model without a run.
    """
    require(run is None or gate is None, "gate", gate, "is of a model without a run")
    with sharding.on_host():
        found = from_model(model, cr, gate, dtype) if run is None else from_run(run, cr, format, model)
    write(found.lm, out, format)
    if run is not None:
        shutil.copy(run / RUN, out / SETTINGS)
    (out / CARD).write_text(card(found.base, found.lm, found.rows, found.how, format))
    print(f"wrote {out}")


if __name__ == "__main__":
    command.run(main)
