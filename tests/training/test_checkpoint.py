"""Checkpoints that survive what happens to them: kill -9, SIGTERM, truncation, flipped bits."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.training import checkpoint
from dms_jax.training.checkpoint import CheckpointError, Checkpoints

ROOT = Path(__file__).resolve().parents[2]
RUN = [sys.executable, str(ROOT / "tests" / "helpers" / "killed.py")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def state(number: float):
    return {"w": jnp.full((4, 3), number), "step": jnp.int32(number)}


def three(folder: Path) -> Path:
    """Checkpoints of steps 1, 2 and 3."""
    with Checkpoints(folder, keep=3) as checkpoints:
        for n in (1, 2, 3):
            checkpoints.save(n, state(n), [n, 2 * n])
    return folder


def newest(folder: Path):
    with Checkpoints(folder, keep=3) as checkpoints:
        return checkpoints.restore(state(0))


def biggest(folder: Path) -> Path:
    return max(
        (f for f in folder.rglob("*") if f.is_file() and f.name != checkpoint.SEAL), key=lambda f: f.stat().st_size
    )


def test_saved_and_restored(tmp_path):
    step, got, cursor = newest(three(tmp_path))
    assert step == got["step"] == 3 and cursor == [3, 6]
    np.testing.assert_array_equal(got["w"], np.full((4, 3), 3))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state(0), step=1)[1]["step"] == 1


def test_nothing_to_restore(tmp_path):
    own = state(0)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(own) == (0, own, None) and checkpoints.good is None


def test_which_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2, always=(2, 4)) as checkpoints:
        for n in range(1, 7):
            checkpoints.save(n, state(n), None)
    assert checkpoint.steps_in(tmp_path) == [6, 5, 4, 2]


def truncate(folder: Path) -> None:
    with open(biggest(folder), "r+b") as file:
        file.truncate(file.seek(0, 2) // 2)


def flip(folder: Path) -> None:
    content = bytearray(biggest(folder).read_bytes())
    content[len(content) // 2] ^= 4
    biggest(folder).write_bytes(content)


def lose(folder: Path) -> None:
    biggest(folder).unlink()


def unseal(folder: Path) -> None:
    (folder / checkpoint.SEAL).unlink()


def garble(folder: Path) -> None:
    (folder / checkpoint.SEAL).write_text('{"a')


@pytest.mark.parametrize(
    "harm, reason",
    [
        (truncate, "bytes, not"),
        (flip, "checksum of .* is wrong"),
        (lose, "is missing"),
        (unseal, "interrupted"),
        (garble, "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, harm, reason, capsys):
    folder = three(tmp_path / "checkpoints")
    harm(folder / "3")
    step, got, cursor = newest(folder)
    assert step == got["step"] == 2 and cursor == [2, 4]
    message = capsys.readouterr().err
    assert f"{folder / '3'} was" in message and "back to step 2" in message
    with Checkpoints(folder, keep=3) as checkpoints:  # the step is saved again, over nothing
        checkpoints.save(3, state(30), None)
    assert newest(folder)[1]["w"][0, 0] == 30
    assert [path.name for path in (tmp_path / "rejected").iterdir()] == ["0-step3"]


def test_two_damaged_ones(tmp_path):
    folder = three(tmp_path / "checkpoints")
    truncate(folder / "3")
    unseal(folder / "2")
    assert newest(folder)[0] == 1


def test_no_whole_one_left_is_an_error(tmp_path):
    folder = three(tmp_path / "checkpoints")
    for n in "123":
        flip(folder / n)
    with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
        Checkpoints(folder)
    assert checkpoint.steps_in(folder) == [3, 2, 1], "nothing was touched"


def test_a_save_that_fails_is_told(tmp_path, monkeypatch):
    def full(folder):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "seal", full)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1), None)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.close()
    assert checkpoints.good is None


# Processes that are ended


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([*RUN, str(folder)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def lines(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def saving(folder: Path) -> bool:
    """Whether a checkpoint is half on disk: in Orbax's temporary folder, or not sealed yet."""
    root = folder / "checkpoints"
    steps = [path for path in root.glob("*") if path.name[0].isdigit()]
    return any("tmp" in path.name or not (path / checkpoint.SEAL).exists() for path in steps)


def when(process: subprocess.Popen, condition, seconds: float = 60.0) -> None:
    """Waits until the condition holds, or the process is over."""
    end = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < end
        time.sleep(0.0005)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The log of a run that nobody ended."""
    folder = tmp_path_factory.mktemp("whole")
    _, errors = (process := start(folder)).communicate(timeout=120)
    assert process.returncode == 0, errors
    return (folder / "log.jsonl").read_bytes()


@pytest.mark.slow
def test_kill_9_changes_nothing(whole, tmp_path):
    """Twice at a random moment, twice during a save; the loss curve is the same to the last bit."""
    rng, caught = random.Random(0), 0
    for during_save in (False, True, True, False):
        process, before = start(tmp_path), lines(tmp_path)
        target = rng.randint(2, 12)
        when(process, lambda before=before, target=target: lines(tmp_path) != before and lines(tmp_path) > target)
        if during_save:
            when(process, lambda: saving(tmp_path))
            caught += process.poll() is None
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was to be killed before its end"
        process.stderr.close()
    assert caught == 2
    _, errors = (process := start(tmp_path)).communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (tmp_path / "log.jsonl").read_bytes() == whole
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [60, 57, 20]


@pytest.mark.slow
def test_sigterm_saves_and_ends_cleanly(whole, tmp_path):
    process = start(tmp_path)
    when(process, lambda: lines(tmp_path) > 7)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "terminated at step" in errors
    step = int(errors.split("terminated at step ")[1].split(",")[0])
    assert checkpoint.steps_in(tmp_path / "checkpoints")[0] == step == lines(tmp_path) < 60
    assert process.wait() == 0
    _, errors = (process := start(tmp_path)).communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (tmp_path / "log.jsonl").read_bytes() == whole
