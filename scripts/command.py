"""How a script is run from a shell: its options, and errors that end it with one line instead of a traceback."""

import gc
import logging
import sys
from collections.abc import Callable

import tyro

from dms_jax.config import ConfigError
from dms_jax.training.checkpoint import CheckpointError
from dms_jax.weights.safetensors import WeightError
from experiments.tasks.data import DataError

# What a user can mend: settings and files, and what the machine refuses (a full disk, a folder that is read-only).
MISTAKES = (ConfigError, WeightError, CheckpointError, DataError, FloatingPointError, OSError)


def run(main: Callable[..., object], settings: type | None = None) -> None:
    """Runs `main` with the options of the command line; ends with status 1 after a mistake, 130 after Ctrl-C.

    settings: the dataclass that `main` takes and whose fields are the options; None: they are its own parameters.
    """
    # Where a save fails, Orbax logs the traceback of each error that it raises, too, and TensorStore prints those of
    # its writes that were still under way.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    try:
        if settings is None:
            tyro.cli(main)
        else:
            main(tyro.cli(settings, description=sys.modules[main.__module__].__doc__))
        return
    except MISTAKES as error:
        lines, status = [f"error: {error}", *getattr(error, "__notes__", ())], 1
    except KeyboardInterrupt as error:
        lines, status = ["interrupted", *getattr(error, "__notes__", ())], 130
    logging.disable()
    sys.unraisablehook = lambda _: None
    gc.collect()
    print("; ".join(lines), file=sys.stderr)
    raise SystemExit(status)


def _unraisable(raised) -> None:
    if str(raised.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(raised)
