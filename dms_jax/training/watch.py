"""Sends the lines of a run's log to TensorBoard or Weights & Biases, if asked for by name."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dms_jax.config import one_of, require

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def scalars(line: dict) -> dict[str, float]:
    """The numbers of a line; of eviction by layer and head `[L, K]`, the mean of each layer."""
    out: dict[str, float] = {
        key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"
    }
    for layer, heads in enumerate(line.get("alpha_by_head", [])):
        out[f"alpha_layer_{layer}"] = sum(heads) / len(heads)
    return out


def watcher(name: str, folder: Path, config: dict[str, Any]) -> Callable[[dict], None]:
    """A function to call with each line of the log. `config` is shown beside the run by W&B.

    Raises:
      ConfigError: an unknown name, or a package that is not installed.
    """
    one_of("watch", name, tuple(PACKAGES))
    try:
        package = importlib.import_module(PACKAGES[name])
    except ImportError as error:
        require(False, "watch", name, f"needs `pip install {PACKAGES[name]}` ({error})")
    if name == "wandb":
        run = package.init(project="dms_jax", name=folder.name, dir=str(folder), config=config, resume="allow")
        return lambda line: run.log(scalars(line), step=line["step"])
    writer = package.SummaryWriter(str(folder / "tensorboard"))

    def watch(line: dict) -> None:
        for key, value in scalars(line).items():
            writer.add_scalar(key, value, line["step"])
        writer.flush()

    return watch
