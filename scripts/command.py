"""How a script is run from a shell: its options, and errors that end it with one line instead of a traceback."""

import sys
from collections.abc import Callable

import tyro

from dms_jax.config import ConfigError
from dms_jax.training.checkpoint import CheckpointError
from dms_jax.weights.safetensors import WeightError

# What a user can mend: settings and files, and what the machine refuses (a full disk, a folder that is read-only).
MISTAKES = (ConfigError, WeightError, CheckpointError, FloatingPointError, OSError)


def run(main: Callable[..., object]) -> None:
    """Runs `main` with the options of the command line; status 1 after a mistake, 130 after Ctrl-C."""
    try:
        tyro.cli(main)
    except MISTAKES as error:
        end(f"error: {error}", error, 1)
    except KeyboardInterrupt as error:
        end("interrupted", error, 130)


def end(message: str, error: BaseException, status: int) -> None:
    print("; ".join([message, *getattr(error, "__notes__", ())]), file=sys.stderr)
    raise SystemExit(status) from error
