"""How what reads a model is run from a shell: its options, its terminal, and errors that end it with one line."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from dms_jax.config import ConfigError
from dms_jax.weights.safetensors import WeightError
from experiments import report
from experiments.judge import JudgeError
from experiments.run import RunError
from experiments.sandbox import SandboxError
from experiments.tasks.data import DataError

MINI = "mini"
MISTAKES = (ConfigError, WeightError, RunError, DataError, JudgeError, SandboxError, FileNotFoundError)
NOT_IDENTITY = ("run_dir", "runs", "fresh", "limit", "batch_size")  # they change no sample


def metavar(name: str):
    """How an option's value is called in --help; the help texts name the defaults themselves."""
    return tyro.conf.arg(metavar=name, help_behavior_hint="")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Options of every experiment that compares policies on one model."""

    model: Annotated[str, metavar("MODEL")] = MINI
    """mini (the default, bundled), a hub name, a folder in Hugging Face's format, or a .gguf file"""
    budget: Annotated[tuple[int | float, ...], metavar("TOKENS|SHARE ...")] = ()
    """tokens a head may keep (256), or their share of the length (0.25), for training-free policies"""
    protect_prompt: Annotated[bool | None, metavar("True|False")] = None
    """whether training-free policies never evict a token of the prompt; default: as each method has it"""
    evict_every: Annotated[int | None, metavar("STEPS")] = None
    """steps from one eviction to the next, for training-free policies that evict; default: as each method has it"""
    window: Annotated[int | None, metavar("TOKENS")] = None
    """overrides the window that the model was retrofitted with"""
    gate: Annotated[Path | None, metavar("FILE")] = None
    """adapter gate (safetensors) to lay over the model's weights, or a folder of them, one for each CR"""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, metavar("DTYPE")] = None
    """float32, bfloat16 or float16, of parameters and cache; default: float32 on a CPU, bfloat16 elsewhere"""
    runs: Annotated[Path, metavar("FOLDER")] = Path("runs")
    """where run folders are made; default: runs"""
    run_dir: Annotated[Path | None, metavar("FOLDER")] = None
    """the run folder to use, new or to be continued (also with another --limit)"""
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """start a new run folder even where an interrupted run could go on"""


def identity(config: Any) -> dict:
    """The options that change samples, as JSON can write them."""
    options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    return {key: value for key, value in options.items() if key not in NOT_IDENTITY}


def default_dtype() -> str:
    """float32 on a CPU, bfloat16 elsewhere."""
    import jax

    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def import_transformers() -> None:
    """Imports transformers as if there were no torch, which release 5.17 imports with any tokenizer.

    That takes seconds, and no command uses it. Nor is transformers to warn that it found none.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    hidden = sys.modules.setdefault("torch", None) is None  # pyright: ignore[reportArgumentType]
    try:
        from transformers import PreTrainedTokenizerFast  # noqa: F401 (what it finds now, it goes by later)
    finally:
        if hidden:
            del sys.modules["torch"]


def main(
    config_class: type,
    execute: Callable[[Any, Console, float], int],
    description: str,
    program: str,
    arguments: list[str] | None = None,
) -> int:
    """Reads the options and runs `execute(config, console, start)`.

    Returns the exit status: what `execute` says, 2 for a mistake, 130 after Ctrl-C.
    """
    start = time.monotonic()
    config = tyro.cli(config_class, args=arguments, description=description, prog=f"python -m {program}")
    if arguments is None:
        import_transformers()
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, report.WIDE))
    try:
        return execute(config, console, start)
    except MISTAKES as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
