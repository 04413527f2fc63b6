"""Retrofits a model with DMS by distillation and writes one member of the family at each whole CR.

An interrupted run continues from its newest checkpoint. On several hosts every process runs the same command with
--distributed (see scripts/slurm/).

examples:
  python -m scripts.retrofit --max-cr 8
  python -m scripts.retrofit --max-cr 4 --branch-of runs/retrofit-cr8
  python -m scripts.retrofit --config configs/smollm2_adapter.yaml --model file.gguf --data a.jsonl b.jsonl
  python -m scripts.retrofit --config configs/qwen3_8b_release.yaml --mesh 1 8 1
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

import dms_jax
from dms_jax import sharding
from dms_jax.config import Share, Size, described, fits, require
from dms_jax.config_files import from_saved, load_yaml
from dms_jax.files import write_atomically
from dms_jax.training import checkpoint
from dms_jax.training.config import RetrofitConfig, SourceConfig
from dms_jax.training.data import PackedStream, PoolStream, Stream
from dms_jax.training.documents import open_documents
from dms_jax.training.train import retrofitted, train
from dms_jax.training.watch import watcher
from dms_jax.types import Params
from dms_jax.weights.json_files import read_json
from scripts import command, pretrain_mini

RUN, FINISHED = "run.json", "finished"
MAY_CHANGE = ("mesh", "save_every", "log_every", "remat", "loss_chunk", "crs")  # when a run is continued
LATER = ("max_cr", "hold_steps")  # what the steps up to a lower ratio do not depend on


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
    gate: Literal["query", "adapter"] | None = None
    """what the eviction logits are read from; this and the next two replace fields of `dms`"""
    window: int | None = None
    decision_offset: int | None = None
    """0 or 1: the decision is read off the token itself or the next (delayed eviction); the window: immediate"""
    max_cr: float | None = None
    crs: tuple[float, ...] = ()
    """the members that are written besides the highest; default: every whole CR"""
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


@dataclasses.dataclass(frozen=True)
class Processes:
    """Of a run on several hosts, which process this is; Slurm or a cloud says so where only the first is given."""

    distributed: bool = False
    """this is one of several processes of the run"""
    coordinator: str | None = None
    """host:port of the first process"""
    processes: int | None = None
    """how many there are"""
    process: int | None = None
    """the number of this one, from 0"""


def settings_of(config: Path, overrides: Overrides) -> RetrofitConfig:
    """The config file with what the command line replaces."""
    changes = {key: value for key, value in vars(overrides).items() if value not in (None, ())}
    dms = {key: changes.pop(key) for key in ("gate", "window", "decision_offset") if key in changes}
    weights = changes.pop("weights", ())
    if "data" in changes:
        paths = changes["data"]
        fits = len(weights) in (0, len(paths))
        require(fits, "weights", weights, f"expected one for each of the {len(paths)} paths in --data")
        changes["data"] = tuple(SourceConfig(p, w) for p, w in zip(paths, weights or [1.0] * len(paths), strict=True))
    else:
        require(not weights, "weights", weights, "belong to --data")
    settings = load_yaml(RetrofitConfig, config)
    return dataclasses.replace(settings, dms=dataclasses.replace(settings.dms, **dms), **changes)


def stream_of(settings: RetrofitConfig, lm: dms_jax.LM, pool: int, slip_rate: float) -> Stream:
    """The batches: packed documents, or problems of the mini task, a row each."""
    if settings.data:
        sources = [open_documents(source, lm.tokenizer) for source in settings.data]
        weights = [source.weight for source in settings.data]
        return PackedStream(sources, weights, settings.context, settings.batch_size, settings.seed)
    mini = lm.config.vocab_size <= pretrain_mini.MODEL.vocab_size
    require(mini, "data", (), f"{settings.model} does not speak the mini task, name its --data")
    problems = pretrain_mini.training_pool(settings.seed, pool, slip_rate)
    return PoolStream(problems, settings.batch_size, settings.seed).packed


def read_run(out: Path) -> RetrofitConfig:
    """The settings of the run in a folder.

    Raises:
      ConfigError: the file is damaged.
    """
    return from_saved(RetrofitConfig, read_json(out / RUN), out / RUN)


def check_same(before: RetrofitConfig, settings: RetrofitConfig, but: tuple[str, ...], reason: str) -> None:
    """Raises ConfigError, naming the first field that differs and is not among `but`."""
    for key, value in vars(settings).items():
        was = getattr(before, key)
        require(key in but or was == value, key, value, f"{reason} was started with {was!r}")


def record_run(out: Path, settings: RetrofitConfig) -> None:
    """Writes the settings into the run's folder, once they were compared with those that it was started with.

    Raises:
      ConfigError: names the first field that differs and may not, or a member that the run has gone past.
    """
    if (out / RUN).exists():
        before, now = read_run(out), max(checkpoint.steps_in(out / "checkpoints"), default=0)
        check_same(before, settings, MAY_CHANGE, f"choose another --out: the run in {out}")
        added = settings.members().keys() - before.members().keys()
        require(now <= min(added, default=now), "crs", settings.crs, f"the run in {out} is at step {now} already")
    if jax.process_index() == 0:
        write_atomically(out / RUN, json.dumps(dataclasses.asdict(settings), indent=2) + "\n")


def branch(run: Path, settings: RetrofitConfig, out: Path) -> None:
    """Lets a run that is not begun go on from where the schedule of another reached max_cr.

    A family's members are copies on the way, at the full learning rate, but for the highest, which ends with a hold. A
    branch holds at a lower ratio; its steps are those of a run to that ratio from the start.

    Raises:
      ConfigError: the other run differs in a field that its first steps depend on, or has no checkpoint there.
      CheckpointError: that one is not whole.
    """
    if (out / RUN).exists():
        return
    before = read_run(run)
    check_same(before, settings, (*MAY_CHANGE, *LATER), f"branch_of: the run in {run}")
    step, there = before.step_of(settings.max_cr), checkpoint.steps_in(run / "checkpoints")
    kept = [cr for at, cr in before.members().items() if at in there]
    on_the_way = settings.max_cr < before.max_cr and settings.max_cr in kept
    reason = f"the run in {run} keeps checkpoints of {kept} and ends at its highest"
    require(on_the_way, "max_cr", settings.max_cr, reason)
    if jax.process_index() == 0 and not (out / "checkpoints" / str(step)).exists():
        checkpoint.copy(step, run / "checkpoints", out / "checkpoints")


def write_member(cr: float, params: Params, lm: dms_jax.LM, settings: RetrofitConfig, out: Path) -> None:
    """A member of the family: a model folder, or for an adapter over a frozen base the gate's file alone."""
    if jax.process_index() == 0:
        member = retrofitted(lm, params, settings.dms, cr)
        if settings.mode == "adapter":
            dms_jax.save_gate(member, out / f"gate_cr{cr:g}.safetensors")
        else:
            dms_jax.save(member, out / f"cr{cr:g}")


def main(
    config: Path = Path("configs/mini_retrofit.yaml"),
    overrides: Annotated[Overrides, tyro.conf.arg(name="")] = Overrides(),  # noqa: B008 (frozen)
    out: Path | None = None,
    branch_of: Path | None = None,
    watch_with: Annotated[tuple[Literal["tensorboard", "wandb"], ...], tyro.conf.arg(name="watch")] = (),
    several: Annotated[Processes, tyro.conf.arg(name="")] = Processes(),  # noqa: B008 (frozen)
    pool: int = 200_000,
    slip_rate: float = 0.045,
) -> None:
    """Retrofits a model and writes OUT/cr8 (or OUT/gate_cr8.safetensors), OUT/log.jsonl and checkpoints.

    Args:
      config: YAML file with the fields of RetrofitConfig.
      out: folder for checkpoints, the log and the models; a run found there is continued.
        Default: runs/retrofit-cr8 (for max_cr 8).
      branch_of: folder of another run to a higher max_cr; this one goes on from where that reached its own, and holds.
      watch_with: where the log goes besides OUT/log.jsonl.
      pool: how many training problems of the mini task are used, drawn with another seed than the base model saw.
      slip_rate: the share of their lines with a wrong digit, as in pretraining.
    """
    if several.distributed:
        jax.distributed.initialize(several.coordinator, several.processes, several.process)
    for key, value, kind in (("pool", pool, Size), ("slip_rate", slip_rate, Share)):
        require(fits(value, kind), key, value, f"expected {described(kind)}")
    settings = settings_of(config, overrides)
    out = out or Path(f"runs/retrofit-cr{settings.max_cr:g}")
    with sharding.on_host():
        lm = dms_jax.load(settings.model, dtype=settings.compute)
    require(lm.dms is None, "model", settings.model, "is retrofitted already: name the original, which is the teacher")
    stream = stream_of(settings, lm, pool, slip_rate)
    out.mkdir(parents=True, exist_ok=True)
    if branch_of is not None:
        branch(branch_of, settings, out)
    record_run(out, settings)
    first = jax.process_index() == 0
    watchers = [watcher(name, out, dataclasses.asdict(settings)) for name in watch_with if first]
    write = functools.partial(write_member, lm=lm, settings=settings, out=out)
    train(lm.params, lm.config, settings, stream, out, on_member=write, watchers=watchers)
    if first:
        (out / FINISHED).touch()


if __name__ == "__main__":
    command.run(main)
