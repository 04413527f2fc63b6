"""Retrofits a model with DMS by distillation and writes one member of the family at each whole CR.

An interrupted run continues from its newest checkpoint.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import dms_jax
from dms_jax import hub, retrofit
from dms_jax.config import load_yaml
from dms_jax.data import batch_at
from scripts.pretrain_mini import training_pool


def snapshots(config: retrofit.RetrofitConfig, crs: tuple[int, ...]) -> dict[int, float]:
    """The step at which the target CR has just been reached, for each CR; the highest waits for the hold."""
    steps = {config.retirement + round((cr - 1) * config.steps_per_cr): cr for cr in crs if cr < config.max_cr}
    return steps | {config.total_steps: config.max_cr}


def main(
    config: Path = Path("configs/mini_retrofit.yaml"),
    model: str = "mini",
    max_cr: float | None = None,
    crs: tuple[int, ...] = (),
    out: Path | None = None,
    pool: int = 200_000,
    slip_rate: float = 0.045,
) -> None:
    """Retrofits MODEL and writes OUT/cr8 (for max_cr 8) and OUT/log.jsonl.

    Args:
      config: YAML file with the fields of RetrofitConfig.
      model: what `dms_jax.load` takes: "mini", a folder, a hub name.
      max_cr: overrides the config.
      crs: CRs below the highest at which the model is written as the schedule passes them.
      out: folder for checkpoints, the log and the models; a run found there is continued.
        Default: runs/retrofit-cr8 (for max_cr 8).
      pool: how many training problems of the mini task are used, drawn with another seed than the base model saw.
      slip_rate: the share of their lines with a wrong digit, as in pretraining.
    """
    settings = load_yaml(retrofit.RetrofitConfig, config)
    if max_cr is not None:
        settings = dataclasses.replace(settings, max_cr=max_cr)
    out = out or Path(f"runs/retrofit-cr{settings.max_cr:g}")
    lm = dms_jax.load(model, dtype="float32")
    problems = training_pool(settings.seed, pool, slip_rate)
    due = snapshots(settings, crs)
    out.mkdir(parents=True, exist_ok=True)

    def on_step(step: int, state: retrofit.TrainState) -> retrofit.TrainState:
        if step == settings.retirement and settings.retirement:
            state = state._replace(params=retrofit.reset_neuron(state.params, lm.config, settings.dms))
        if step in due:
            params = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), state.params)
            member = dataclasses.replace(settings.dms, cr=float(due[step]))
            hub.save(hub.LM(lm.config, params, lm.tokenizer, member), out / f"cr{due[step]:g}")
        return state

    def step_fn(state: retrofit.TrainState, batch):
        retiring = int(state.step) < settings.retirement
        return retrofit.train_step(state, lm.params, batch, model=lm.config, config=settings, retiring=retiring)

    retrofit.fit(
        step_fn,
        retrofit.fresh_state(retrofit.with_gate(lm.params, lm.config, settings.dms), retrofit.optimizer(settings)),
        lambda step: batch_at(problems, step, settings.batch_size, settings.seed),
        settings.total_steps,
        out,
        on_step=on_step,
    )


if __name__ == "__main__":
    tyro.cli(main)
