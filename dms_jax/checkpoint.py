"""Level 3. Orbax checkpoints of a training state: saved whole or not at all, the newest whole one restored."""

from pathlib import Path

import orbax.checkpoint as ocp

from dms_jax.types import State


def manager(folder: Path, keep: int = 2) -> ocp.CheckpointManager:
    """The checkpoints in `folder`, of which the newest `keep` are kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(Path(folder).absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state: State) -> None:
    """Saves `state` (a pytree of arrays) under `step` and waits until it is on disk."""
    checkpoints.save(step, args=ocp.args.StandardSave(state))
    checkpoints.wait_until_finished()


def restore(checkpoints: ocp.CheckpointManager, state: State) -> tuple[int, State]:
    """The newest step and its state, shaped like `state`; step 0 and `state` itself where there is none."""
    step = checkpoints.latest_step()
    if step is None:
        return 0, state
    return step, checkpoints.restore(step, args=ocp.args.StandardRestore(state))
