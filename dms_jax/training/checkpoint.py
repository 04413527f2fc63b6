"""Orbax checkpoints of a training run: asynchronous, sharded, and checked before they are trusted.

A checkpoint is whole once its folder holds a seal of every process that wrote it: the step, and the sizes and
checksums of that process's files, written when the files are on disk. A checkpoint that lacks a seal was interrupted,
one that differs from its seals is damaged; either is named, put aside and passed over for the one before.
"""

import concurrent.futures
import json
import os
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dms_jax.config import ConfigError
from dms_jax.files import write_atomically
from dms_jax.types import State

SEAL = "sums.json"  # of the first process; the second's is sums.1.json
PIECE = 8 << 20
INTERRUPTED = "interrupted while it was saved"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be saved or read; names it."""


class Seal(NamedTuple):
    """What one process wrote of a checkpoint: size and CRC-32 of each file, by its path in the folder.

    step: None in a seal of an older version, which held `files` alone.
    """

    step: int | None
    processes: int
    files: dict[str, list[int]]

    @classmethod
    def read(cls, file: Path) -> "Seal":
        """Raises ValueError where the file is damaged."""
        value = json.loads(file.read_text())
        if not isinstance(value, dict):
            raise ValueError("expected a JSON object")
        seal = cls(**value) if set(value) == set(cls._fields) else cls(None, 1, value)
        entries = seal.files.values() if isinstance(seal.files, dict) else [None]
        if not all(isinstance(entry, list) and len(entry) == 2 for entry in entries):
            raise ValueError("expected a size and a checksum for each file")
        return seal


def seal_name(process: int) -> str:
    return SEAL if process == 0 else f"sums.{process}.json"


def writer_of(name: str) -> int:
    """The process that wrote a file of a checkpoint: the one whose number is in the path, or else the first."""
    found = re.search(r"\bprocess_(\d+)\b", name)
    return int(found[1]) if found else 0


def sums(folder: Path, process: int | None = None) -> dict[str, list[int]]:
    """Size and CRC-32 of every file below `folder`, or of those that one process wrote; seals excepted."""
    seals = re.compile(r"\.?sums(\.\d+)?\.json(\.new)?")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if not seals.fullmatch(name) and process in (None, writer_of(name))]
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(names, threads.map(_sum, (folder / name for name in names)), strict=True))


def _sum(file: Path) -> list[int]:
    size = crc = 0
    with open(file, "rb") as stream:
        while piece := stream.read(PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


def seal(folder: Path, step: int) -> None:
    """Marks this process's part of a checkpoint as whole. Every process reads back its own files only."""
    process = jax.process_index()
    written = Seal(step, jax.process_count(), sums(folder, process))
    write_atomically(folder / seal_name(process), json.dumps(written._asdict()))


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, whose folder is named after its step, or None."""
    if not (folder / SEAL).is_file():
        return INTERRUPTED
    name = SEAL
    try:
        seals = [Seal.read(folder / SEAL)]
        for process in range(1, seals[0].processes):
            name = seal_name(process)
            if not (folder / name).is_file():
                return INTERRUPTED
            seals.append(Seal.read(folder / name))
    except (ValueError, TypeError):
        return f"damaged: {name} cannot be read"
    if seals[0].step not in (None, int(folder.name)):
        return f"damaged: it is that of step {seals[0].step}"
    want = {name: entry for seal in seals for name, entry in seal.files.items()}
    got = sums(folder)
    for name, (size, crc) in want.items():
        if name not in got:
            return f"damaged: {name} is missing"
        if got[name][0] != size:
            return f"damaged: {name} has {got[name][0]} bytes, not {size}"
        if got[name][1] != crc:
            return f"damaged: the checksum of {name} is wrong"
    unsealed = sorted(got.keys() - want.keys())
    return f"damaged: {unsealed[0]} is in no seal" if unsealed else None


def steps_in(folder: Path) -> list[int]:
    """The steps of which there are checkpoints, whole or not, the newest first."""
    return sorted((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), reverse=True)


def newest_whole(folder: Path) -> int | None:
    """The step of the newest whole checkpoint; newer ones are moved to `rejected` beside `folder` and named on stderr.

    Raises:
      CheckpointError: there are damaged ones and no whole one, so going on would be to start again.
    """
    faults = {}
    for step in steps_in(folder):
        reason = fault(folder / str(step))
        if reason is None:
            break
        faults[step] = reason
    else:
        step = None
        damaged = {n: reason for n, reason in faults.items() if reason != INTERRUPTED}
        if damaged:
            named = "; ".join(f"{folder / str(n)} is {reason}" for n, reason in damaged.items())
            raise CheckpointError(f"{named}; no whole checkpoint is left. Remove {folder} to start again")
    for bad, reason in faults.items():
        aside = folder.parent / "rejected"
        aside.mkdir(exist_ok=True)
        number = len(list(aside.iterdir()))
        (folder / str(bad)).rename(aside / f"{number}-step{bad}")
        after = "start again" if step is None else f"step {step}"
        print(f"checkpoint {folder / str(bad)} was {reason}; back to {after}", file=sys.stderr)
    return step


class Checkpoints:
    """The checkpoints of a run in `folder`: the newest `keep`, and those of the steps `always`. A context manager.

    good: the step of the newest whole one.
    """

    def __init__(self, folder: Path, keep: int = 2, always: tuple[int, ...] = ()):
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.good = _agreed(lambda: newest_whole(self.folder))
        policies = [preservation_policy.LatestN(keep), preservation_policy.CustomSteps(list(always))]
        policy = preservation_policy.AnyPreservationPolicy(policies)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)
        self.sealing: threading.Thread | None = None
        self.error: CheckpointError | None = None
        self.failed = False

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()
        if isinstance(error, KeyboardInterrupt | OSError | ConfigError):
            error.add_note(self._newest())

    def save(self, step: int, state: State, cursor: Any) -> None:
        """Starts to save a state and the data cursor; returns once the state's buffers may be used again."""
        self.wait()
        if jax.default_backend() == "cpu":  # there a host copy is a view of the buffer that the next step overwrites
            state = jax.tree.map(jnp.copy, state)
        items = {"state": ocp.args.StandardSave(state), "cursor": ocp.args.JsonSave({"cursor": cursor})}
        try:
            self.manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise self._unsaved(step, error) from error
        self.sealing = threading.Thread(target=self._seal, args=(step,))
        self.sealing.start()

    def _seal(self, step: int) -> None:
        try:
            self.manager.wait_until_finished()
            seal(self.folder / str(step), step)
            self.good = step
        except Exception as error:  # raised by wait, in the thread that saved
            self.error = self._unsaved(step, error)
            self.error.__cause__ = error

    def _unsaved(self, step: int, error: Exception) -> CheckpointError:
        self.failed = True
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "No space left on device" in reason:  # TensorStore names every file that it was at
            reason = "no space left on the device"
        return CheckpointError(f"{self.folder / str(step)} cannot be saved ({reason}); {self._newest()}")

    def _newest(self) -> str:
        if self.good is None:
            return f"there is no whole checkpoint in {self.folder}"
        return f"the newest whole checkpoint in {self.folder} is that of step {self.good}"

    def wait(self) -> None:
        """Until the last save is on disk; raises what went wrong with it."""
        if self.sealing is not None:
            self.sealing.join()
            self.sealing = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def restore(self, state: State, step: int | None = None) -> tuple[int, State, Any]:
        """A step, its state laid out like `state` (which may be abstract), and its data cursor.

        The arrays of `state` are deleted first, as if they were donated: there may be no memory for two states.

        step: None is the newest whole one; where there is none, step 0, `state` itself and no cursor.
        """
        step = self.good if step is None else step
        if step is None:
            return 0, state, None
        for x in jax.tree.leaves(state):
            if isinstance(x, jax.Array):
                x.delete()  # its shape and sharding remain
        found = _restored(self.manager, step, state, cursor=ocp.args.JsonRestore())
        return step, found["state"], found["cursor"]["cursor"]

    def close(self) -> None:
        try:
            self.wait()
        finally:
            try:
                self.manager.close()
            except Exception:
                if not self.failed:  # or else it is what was raised before
                    raise


def read(folder: Path, step: int, state: State) -> State:
    """The state of one checkpoint, laid out like `state`; nothing in `folder` is moved or removed."""
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(Path(folder).absolute(), options=options) as manager:
        return _restored(manager, step, state)["state"]


def copy(step: int, source: Path, target: Path) -> None:
    """Copies a checkpoint into the folder of another run, which then goes on from it.

    Raises:
      CheckpointError: it is not there, or not whole.
    """
    reason = fault(source / str(step)) if (source / str(step)).is_dir() else "not there"
    if reason:
        raise CheckpointError(f"{source / str(step)} is {reason}")
    target.mkdir(parents=True, exist_ok=True)
    new = target.parent / f".{step}.new"
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(source / str(step), new)
    new.rename(target / str(step))


def _restored(manager: ocp.CheckpointManager, step: int, state: State, **items) -> Any:
    """The items of a checkpoint.

    Raises:
      CheckpointError: the state, which knows its own step, is that of another.
    """
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    found = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), **items))
    own = getattr(found["state"], "step", step)
    if int(own) != step:
        raise CheckpointError(f"{Path(manager.directory) / str(step)} holds the state of step {int(own)}")
    return found


def _agreed(find: Callable[[], int | None]) -> int | None:
    """What process 0 finds, on every process; what it raises, too."""
    if jax.process_count() == 1:
        return find()
    from jax.experimental import multihost_utils

    none, failed, error = -1, -2, None
    try:
        step = find() if jax.process_index() == 0 else None
        code = none if step is None else step
    except CheckpointError as raised:
        code, error = failed, raised
    code = int(multihost_utils.broadcast_one_to_all(jnp.int32(code)))
    if code == failed:
        raise error or CheckpointError("the first process found no whole checkpoint")
    return None if code == none else code
