"""Orbax checkpoints of a training run: asynchronous, sharded, and checked before they are trusted.

A checkpoint is whole once its folder holds SEAL, the sizes and checksums of its files, written when everything else
is on disk. One without it was interrupted; one that differs from it is damaged. Both are named, put aside and passed
over for the one before.
"""

import json
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dms_jax.types import State

SEAL = "sums.json"
PIECE = 8 << 20


class CheckpointError(RuntimeError):
    """Checkpoints exist, but none of them is whole; names them."""


def sums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file below `folder`, the seal itself excepted."""
    out = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL):
        crc = 0
        with open(file, "rb") as stream:
            while piece := stream.read(PIECE):
                crc = zlib.crc32(piece, crc)
        out[str(file.relative_to(folder))] = [file.stat().st_size, crc]
    return out


def seal(folder: Path) -> None:
    """Marks a checkpoint as whole, by a rename, so that there is never half a seal."""
    new = folder / f".{SEAL}.new"
    text = json.dumps(sums(folder))
    new.write_text(text)
    new.rename(folder / SEAL)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not (folder / SEAL).exists():
        return "interrupted while it was saved"
    try:
        want = json.loads((folder / SEAL).read_text())
    except ValueError:
        return f"damaged: {SEAL} cannot be read"
    got = sums(folder)
    for name, (size, crc) in want.items():
        if name not in got:
            return f"damaged: {name} is missing"
        if got[name][0] != size:
            return f"damaged: {name} has {got[name][0]} bytes, not {size}"
        if got[name][1] != crc:
            return f"damaged: the checksum of {name} is wrong"
    return None


def steps_in(folder: Path) -> list[int]:
    """The steps of which there are checkpoints, whole or not, the newest first."""
    return sorted((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), reverse=True)


def sift(folder: Path) -> int | None:
    """The newest whole checkpoint; those behind it are moved to `rejected` beside `folder` and named on stderr.

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
        damaged = {n: reason for n, reason in faults.items() if reason.startswith("damaged")}
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
    """The checkpoints of a run in `folder`: the newest `keep`, and those of the steps `always`. A context manager."""

    def __init__(self, folder: Path, keep: int = 2, always: tuple[int, ...] = ()):
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.good = _agreed(lambda: sift(self.folder))
        policies = [preservation_policy.LatestN(keep), preservation_policy.CustomSteps(list(always))]
        policy = preservation_policy.AnyPreservationPolicy(policies)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)
        self.sealing: threading.Thread | None = None
        self.error: BaseException | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def save(self, step: int, state: State, cursor: Any) -> None:
        """Starts to save a state and the data cursor; returns once the state's buffers may be used again."""
        self.wait()
        if jax.default_backend() == "cpu":  # there a host copy is a view of the buffer that the next step overwrites
            state = jax.tree.map(jnp.copy, state)
        items = {"state": ocp.args.StandardSave(state), "cursor": ocp.args.JsonSave({"cursor": cursor})}
        self.manager.save(step, args=ocp.args.Composite(**items))
        self.sealing = threading.Thread(target=self._seal, args=(step,))
        self.sealing.start()

    def _seal(self, step: int) -> None:
        try:
            self.manager.wait_until_finished()
            if jax.process_index() == 0:
                seal(self.folder / str(step))
            self.good = step
        except BaseException as error:  # raised by wait, in the thread that saved
            self.error = error

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

        step: None is the newest whole one; where there is none, step 0, `state` itself and no cursor.
        """
        step = self.good if step is None else step
        if step is None:
            return 0, state, None
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        items = {"state": ocp.args.StandardRestore(target), "cursor": ocp.args.JsonRestore()}
        found = self.manager.restore(step, args=ocp.args.Composite(**items))
        return step, found["state"], found["cursor"]["cursor"]

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self.manager.close()


def read(folder: Path, step: int, state: State) -> State:
    """The state of one checkpoint, laid out like `state`; nothing in `folder` is moved or removed."""
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    with ocp.CheckpointManager(
        Path(folder).absolute(), options=ocp.CheckpointManagerOptions(read_only=True)
    ) as manager:
        return manager.restore(step, args=args)["state"]


def _agreed(find) -> int | None:
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
