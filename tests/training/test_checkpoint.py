"""Checkpoints that survive what happens to them: kill -9, SIGTERM, Ctrl-C, a full disk, truncation, flipped bits."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax.training import checkpoint
from dms_jax.training.checkpoint import CheckpointError, Checkpoints
from dms_jax.training.step import TrainState

ROOT = Path(__file__).resolve().parents[2]
RUN = [sys.executable, str(ROOT / "tests" / "helpers" / "killed.py")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def state(number: float, step: int | None = None) -> TrainState:
    return TrainState({"w": jnp.full((4, 3), number)}, (), jnp.int32(number if step is None else step))


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
    assert step == got.step == 3 and cursor == [3, 6]
    np.testing.assert_array_equal(got.params["w"], np.full((4, 3), 3))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state(0), step=1)[1].step == 1
    assert checkpoint.read(tmp_path, 2, state(0)).step == 2


def test_a_restored_state_takes_the_place_of_the_one_given(tmp_path):
    own = state(0)
    with Checkpoints(three(tmp_path)) as checkpoints:
        _, got, _ = checkpoints.restore(own)
    assert got.step == 3 and all(x.is_deleted() for x in jax.tree.leaves(own)), "memory is for one state"


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


def add(folder: Path) -> None:
    (folder / "state" / "another").write_text("")


def unseal(folder: Path) -> None:
    (folder / checkpoint.SEAL).unlink()


def written(text: str):
    def write(folder: Path) -> None:
        (folder / checkpoint.SEAL).write_text(text)

    return write


def rename(folder: Path) -> None:
    """Step 1 takes the name of step 3."""
    shutil.rmtree(folder)
    (folder.parent / "1").rename(folder)


def half_sealed(folder: Path) -> None:
    """Two processes wrote it, of which one was killed before its seal."""
    seal = json.loads((folder / checkpoint.SEAL).read_text())
    (folder / checkpoint.SEAL).write_text(json.dumps(seal | {"processes": 2}))


@pytest.mark.parametrize(
    "harm, reason",
    [
        (truncate, "bytes, not"),
        (flip, "checksum of .* is wrong"),
        (lose, "is missing"),
        (add, "state/another is in no seal"),
        (unseal, "interrupted"),
        (half_sealed, "interrupted"),
        (rename, "it is that of step 1"),
        (written('{"a'), "sums.json cannot be read"),
        (written("[]"), "sums.json cannot be read"),
        (written('{"step": 3, "processes": 1, "files": {"a": 3}}'), "sums.json cannot be read"),
        (written('{"step": 3, "processes": 1, "files": {}}'), "is in no seal"),
        (written("{}"), "is in no seal"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, harm, reason, capsys):
    folder = three(tmp_path / "checkpoints")
    harm(folder / "3")
    step, got, cursor = newest(folder)
    assert step == got.step == 2 and cursor == [2, 4]
    message = capsys.readouterr().err
    assert re.search(f"{folder / '3'} was .*{reason}", message) and "back to step 2" in message
    with Checkpoints(folder, keep=3) as checkpoints:  # the step is saved again, over nothing
        checkpoints.save(3, state(30, 3), None)
    assert newest(folder)[1].params["w"][0, 0] == 30
    assert [path.name for path in (tmp_path / "rejected").iterdir()] == ["0-step3"]


def test_a_seal_of_an_older_version(tmp_path, capsys):
    """It held the files alone: they are checked as ever, and the step is the state's own."""
    folder = three(tmp_path / "checkpoints")
    for step in "123":
        files = json.loads((folder / step / checkpoint.SEAL).read_text())["files"]
        (folder / step / checkpoint.SEAL).write_text(json.dumps(files))
    assert newest(folder)[0] == 3
    flip(folder / "3")
    assert newest(folder)[0] == 2
    (folder / "1").rename(folder / "7")
    with pytest.raises(CheckpointError, match="checkpoints/7 holds the state of step 1"):
        newest(folder)


def test_every_process_seals_its_own_files(tmp_path, monkeypatch):
    """Files as two processes leave them; neither reads what the other wrote."""
    folder = tmp_path / "5"
    names = {"state/d/a": 0, "state/ocdbt.process_0/d/b": 0, "state/ocdbt.process_1/d/c": 1, "state/process_1": 1}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    read, whole = [], checkpoint._sum
    monkeypatch.setattr(checkpoint, "_sum", lambda file: (read.append(str(file.relative_to(folder))), whole(file))[1])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert checkpoint.fault(folder) == checkpoint.INTERRUPTED
        read.clear()
        checkpoint.seal(folder, 5)
        assert sorted(read) == sorted(name for name in names if names[name] == process)
    assert checkpoint.fault(folder) is None
    (folder / "state/process_1").write_text("else")
    assert "state/process_1 has 4 bytes" in checkpoint.fault(folder)


def test_a_copy_goes_on_where_its_original_is(tmp_path):
    folder = three(tmp_path / "one" / "checkpoints")
    checkpoint.copy(2, folder, tmp_path / "other" / "checkpoints")
    assert newest(tmp_path / "other" / "checkpoints")[0] == 2 and newest(folder)[0] == 3
    flip(folder / "1")
    for step, reason in ((1, "damaged"), (4, "not there")):
        with pytest.raises(CheckpointError, match=f"checkpoints/{step} is {reason}"):
            checkpoint.copy(step, folder, tmp_path / "other" / "checkpoints")


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
    def full(folder, step):
        raise OSError("[Errno 28] No space left on device")

    monkeypatch.setattr(checkpoint, "seal", full)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1), None)
    with pytest.raises(CheckpointError, match="1 cannot be saved .no space left on the device.; there is no whole"):
        checkpoints.close()
    assert checkpoints.good is None


# Processes that are ended


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([*RUN, str(folder), *arguments], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def without_bar(errors: str) -> list[str]:
    """The lines that are not the progress bar's."""
    return [line for line in errors.splitlines() if line and "step/s" not in line and "s/step" not in line]


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


@pytest.mark.slow
def test_ctrl_c_ends_with_one_line_and_loses_nothing(whole, tmp_path):
    process = start(tmp_path)
    when(process, lambda: lines(tmp_path) > 7)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    step = checkpoint.steps_in(tmp_path / "checkpoints")[0]
    newest = f"interrupted; the newest whole checkpoint in {tmp_path / 'checkpoints'} is that of step {step}"
    assert process.returncode == 130 and without_bar(errors) == [newest]
    _, errors = (process := start(tmp_path)).communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (tmp_path / "log.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_a_full_disk_ends_with_one_line(tmp_path):
    _, errors = (process := start(tmp_path, "100000")).communicate(timeout=60)
    (line,) = without_bar(errors)
    assert process.returncode == 1
    assert line.startswith(f"error: {tmp_path / 'checkpoints' / '3'} cannot be saved (") and "File too large" in line
