"""Retrofits a model with DMS by distillation and writes one member of the family at each whole CR.

An interrupted run continues from its newest checkpoint. On several hosts every process runs the same command with
--distributed (see scripts/slurm/).

examples:
  python -m scripts.retrofit --max-cr 8
  python -m scripts.retrofit --config configs/smollm2_adapter.yaml --model file.gguf --data a.jsonl b.jsonl
  python -m scripts.retrofit --config configs/qwen3_8b_release.yaml --mesh 1 8 1
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

import dms_jax
from dms_jax import sharding
from dms_jax.config import ConfigError, ModelConfig, from_saved, load_yaml, require
from dms_jax.training import data, flops, loop, watch
from dms_jax.training import step as retrofit
from dms_jax.training.config import RetrofitConfig, SourceConfig
from dms_jax.training.documents import open_documents
from dms_jax.weights.lm import LM
from scripts import pretrain_mini

RUN, FINISHED = "run.json", "finished"
MAY_CHANGE = ("mesh", "save_every", "log_every", "remat", "loss_chunk")  # when a run is continued


@dataclasses.dataclass(frozen=True)
class Overrides:
    """Fields of the config file to replace."""

    model: str | None = None
    """what `dms_jax.load` takes: "mini", a folder, a hub name, a .gguf file"""
    data: tuple[str, ...] = ()
    """JSONL or parquet files, or hub names, in place of the config's data"""
    weights: tuple[float, ...] = ()
    """the shares of --data in the documents; default: equal"""
    mode: Literal["full", "adapter", "lora"] | None = None
    max_cr: float | None = None
    steps_per_cr: int | None = None
    hold_steps: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None
    context: int | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    compute: Literal["float32", "bfloat16"] | None = None
    remat: Literal["none", "dots", "block"] | None = None
    mesh: tuple[int, int, int] | None = None
    """devices along data, fsdp and tensor"""
    save_every: int | None = None
    log_every: int | None = None
    seed: int | None = None


def settings_of(config: Path, overrides: Overrides) -> RetrofitConfig:
    """The config file with what the command line replaces."""
    changes = {key: value for key, value in vars(overrides).items() if value not in (None, ())}
    weights = changes.pop("weights", ())
    if "data" in changes:
        paths = changes["data"]
        fits = len(weights) in (0, len(paths))
        require(fits, "weights", weights, f"expected one for each of the {len(paths)} paths in --data")
        changes["data"] = tuple(SourceConfig(p, w) for p, w in zip(paths, weights or [1.0] * len(paths), strict=True))
    else:
        require(not weights, "weights", weights, "belong to --data")
    return dataclasses.replace(load_yaml(RetrofitConfig, config), **changes)


def stream_of(settings: RetrofitConfig, lm: LM, pool: int, slip_rate: float) -> data.Stream:
    """The batches: packed documents, or problems of the mini task, a row each."""
    if settings.data:
        sources = [open_documents(source, lm.tokenizer) for source in settings.data]
        weights = [source.weight for source in settings.data]
        return data.packed_stream(sources, weights, settings.context, settings.batch_size, settings.seed)
    mini = lm.config.vocab_size <= pretrain_mini.MODEL.vocab_size
    require(mini, "data", (), f"{settings.model} does not speak the mini task, name its --data")
    problems = data.pool_stream(
        pretrain_mini.training_pool(settings.seed, pool, slip_rate), settings.batch_size, settings.seed
    )
    return lambda cursor: ((data.one_document(batch), after) for batch, after in problems(cursor))


def check_continued(out: Path, settings: RetrofitConfig) -> None:
    """Writes the settings beside the run, or compares them with those that it was started with.

    Raises:
      ConfigError: names the first field that differs.
    """
    now, file = json.loads(json.dumps(dataclasses.asdict(settings))), out / RUN
    if not file.exists():
        if jax.process_index() == 0:
            file.write_text(json.dumps(now, indent=2) + "\n")
        return
    started = from_saved(RetrofitConfig, json.loads(file.read_text()), file)
    before = json.loads(json.dumps(dataclasses.asdict(started)))
    for key, value in now.items():
        same = key in MAY_CHANGE or before.get(key) == value
        require(same, key, value, f"the run in {out} was started with {before.get(key)!r}; choose another --out")


def write_member(state, base, cr: float, settings: RetrofitConfig, lm: LM, out: Path) -> Path:
    """A member of the family: a model folder, or for an adapter over a frozen base the gate's file alone."""
    alone = settings.mode == "adapter"
    params = retrofit.gate_alone(state) if alone else retrofit.member(state, base, lm.config, settings)
    path = out / (f"gate_cr{cr:g}.safetensors" if alone else f"cr{cr:g}")
    if jax.process_index() == 0:
        member = LM(lm.config, params, lm.tokenizer, settings.dms, cr)
        (dms_jax.save_gate if alone else dms_jax.save)(member, path)
    return path


def work_of(settings: RetrofitConfig, model: ModelConfig, keys: float) -> loop.Work:
    """Tokens (padding included) and model FLOPs of a step, for the speed in the log."""
    tokens = settings.batch_size * settings.context
    return loop.Work(tokens, flops.step_flops(model, settings, tokens, keys), flops.peak_flops())


def run(settings: RetrofitConfig, lm: LM, stream: data.Stream, out: Path, crs=None, watchers=()):
    """The run as it is, on the mesh of the settings; returns the last state."""
    mesh = sharding.make_mesh(settings.mesh)
    with jax.set_mesh(mesh):
        state, base, places = retrofit.start(lm.params, lm.config, settings, mesh)
        lm = dataclasses.replace(lm, params=None)  # the devices have them: the host's copy may go
        retiring = retrofit.compiled_step(lm.config, settings, True, places)
        evicting = retrofit.compiled_step(lm.config, settings, False, places)
        reset = jax.jit(lambda params: settings.gate.reset_neuron(params, lm.config), out_shardings=places.state.params)
        family = settings.members()
        due = family if crs is None else {s: cr for s, cr in family.items() if cr in (*crs, settings.max_cr)}

        def on_step(step: int, state: retrofit.TrainState) -> retrofit.TrainState:
            if step == settings.retirement and settings.retirement:
                state = state._replace(params=reset(state.params))
            if step in due:
                write_member(state, base, due[step], settings, lm, out)
            return state

        def step_fn(step: int, state: retrofit.TrainState, batch: data.Packed):
            return (retiring if step < settings.retirement else evicting)(state, base, batch)

        first, _ = next(stream(None))
        settings_work = dataclasses.replace(settings, context=first.tokens.shape[1])
        return loop.fit(
            step_fn,
            state,
            stream,
            settings.total_steps,
            out,
            settings.save_every,
            settings.log_every,
            tuple(family),
            on_step,
            lambda batch: sharding.place(batch, places.batch),
            work_of(settings_work, lm.config, float(np.mean(first.positions + 1))),
            watchers,
        )


def main(
    config: Path = Path("configs/mini_retrofit.yaml"),
    overrides: Annotated[Overrides, tyro.conf.arg(name="")] = Overrides(),  # noqa: B008 (frozen)
    crs: tuple[float, ...] | None = None,
    out: Path | None = None,
    watch_with: Annotated[tuple[Literal["tensorboard", "wandb"], ...], tyro.conf.arg(name="watch")] = (),
    distributed: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    pool: int = 200_000,
    slip_rate: float = 0.045,
) -> None:
    """Retrofits a model and writes OUT/cr8 (or OUT/gate_cr8.safetensors), OUT/log.jsonl and checkpoints.

    Args:
      config: YAML file with the fields of RetrofitConfig.
      crs: the members that are written besides the highest; default: every whole CR.
      out: folder for checkpoints, the log and the models; a run found there is continued.
        Default: runs/retrofit-cr8 (for max_cr 8).
      watch_with: where the log goes besides OUT/log.jsonl.
      distributed: one of several processes of this run; Slurm or a cloud says which, or the next three do.
      coordinator: host:port of the first process.
      processes: how many there are.
      process: the number of this one, from 0.
      pool: how many training problems of the mini task are used, drawn with another seed than the base model saw.
      slip_rate: the share of their lines with a wrong digit, as in pretraining.
    """
    if distributed:
        jax.distributed.initialize(coordinator, processes, process)
    settings = settings_of(config, overrides)
    out = out or Path(f"runs/retrofit-cr{settings.max_cr:g}")
    with sharding.on_host():
        lm = dms_jax.load(settings.model, dtype=settings.compute)
    stream = stream_of(settings, lm, pool, slip_rate)
    out.mkdir(parents=True, exist_ok=True)
    check_continued(out, settings)
    watchers = [
        watch.watcher(name, out, dataclasses.asdict(settings)) for name in watch_with if jax.process_index() == 0
    ]
    run(settings, lm, stream, out, crs, watchers)
    if jax.process_index() == 0:
        (out / FINISHED).touch()


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ConfigError, FileNotFoundError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
