"""Writes a member of a retrofitted family, from a run's checkpoint, for others to load: with a model card.

A folder in Hugging Face's format (weights, gate, a DMS section in config.json, tokenizer), which `dms_jax.load` reads;
or, for an adapter gate over a frozen base, the gate's file alone.

examples:
  python -m scripts.export --run runs/qwen3_8b --cr 8 --out qwen3-8b-dms-cr8
  python -m scripts.export --run runs/smollm2 --cr 4 --form adapter --out smollm2-gate-cr4
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import numpy as np

import dms_jax
from dms_jax import sharding
from dms_jax.config import require
from dms_jax.training import checkpoint
from dms_jax.training.config import RetrofitConfig
from dms_jax.training.log import read_log
from dms_jax.training.step import initial_state, member_params
from dms_jax.training.train import retrofitted
from scripts import command
from scripts.retrofit import RUN, read_run

CARD = "README.md"


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


def measured(run: Path, step: int, last: int = 10) -> dict[str, float]:
    """Means of the last lines of the log up to a step, of those with eviction."""
    lines, _ = read_log(run / "log.jsonl")
    lines = [line for line in lines if line["step"] <= step and "alpha" in line][-last:]
    return {key: float(np.mean([line[key] for line in lines])) for key in ("kl", "achieved_cr") if lines}


def card(settings: RetrofitConfig, cr: float, figures: dict[str, float], form: str) -> str:
    """A model card in Hugging Face's format: what it is, how it was made, what was measured, how to load it."""
    dms, step = settings.dms, step_of(cr, settings)
    sources = [f"{s.path} (weight {s.weight:g})" for s in settings.data] or ["the mini task's training problems"]
    rows = {
        "base model": settings.model,
        "gate": f"{dms.gate}, window {dms.window}, decision offset {dms.decision_offset}, per {dms.per}",
        "trained": {"full": "all weights", "adapter": "the gate, over frozen weights"}.get(
            settings.mode, f"low-rank updates of {', '.join(settings.lora.targets)}, rank {settings.lora.rank}"
        ),
        "data": "; ".join(sources),
        "steps": f"{step:,} of {settings.batch_size} x {settings.context} tokens",
        "learning rate": f"{settings.learning_rate:g} (AdamW), {settings.kl} KL to the base model",
        "target compression ratio": f"{cr:g}",
        "achieved in training": f"{figures['achieved_cr']:.2f} (the window, which is never evicted, not counted)"
        if "achieved_cr" in figures
        else "not logged",
        "KL to the base model": f"{figures['kl']:.4g} nats a token, training mask" if "kl" in figures else "not logged",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    load = 'dms_jax.load("this folder")'
    if form == "adapter":
        load = f'dms_jax.load("{settings.model}", gate="gate.safetensors")'
    return f"""---
base_model: {settings.model}
library_name: dms_jax
tags: [dynamic-memory-sparsification, kv-cache]
---

# {Path(settings.model).name} with Dynamic Memory Sparsification, CR {cr:g}

The model decides itself which tokens of its KV cache to drop, {dms.window} tokens after the decision
([Łańcucki et al., 2025](https://arxiv.org/abs/2506.05345)). Retrofitted with dms_jax.

| | |
| :-- | :-- |
{table}

Figures are means over the last logged steps of training, on training data.

```python
import dms_jax

lm = {load}
out = dms_jax.generate(lm, ["..."])
```
"""


def main(
    run: Path,
    cr: float,
    out: Path,
    form: Literal["merged", "adapter"] = "merged",
    model: str | None = None,
) -> None:
    """Writes OUT.

    Args:
      run: folder of scripts.retrofit.
      cr: which member of the family.
      form: "merged" writes a whole model, "adapter" the gate alone (runs of mode adapter).
      model: where the base is, if not where the run found it.
    """
    settings = settings_of_run(run)
    require(form == "merged" or settings.mode == "adapter", "form", form, f"the run trained in mode {settings.mode}")
    with sharding.on_host():
        base = dms_jax.load(model or settings.model, dtype=settings.compute)
        member = trained_member(run, cr, settings, base)
    out.mkdir(parents=True, exist_ok=True)
    if form == "adapter":
        dms_jax.save_gate(member, out / "gate.safetensors")
    else:
        dms_jax.save(member, out)
    (out / CARD).write_text(card(settings, cr, measured(run, step_of(cr, settings)), form))
    print(f"wrote {out}")


if __name__ == "__main__":
    command.run(main)
