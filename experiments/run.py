"""A run folder: the evidence that an experiment leaves, never overwritten by another configuration.

runs/aime-20260101-120000-1a2b3c4d/
  config.json     what identifies the run: a run continues only under an equal configuration
  metadata.json   one entry for each time it was started: command, versions, device, commit
  samples.jsonl   one JSON line per problem and chain, flushed at once
  results.json    the table; its presence means that the run is finished
"""

import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dms_jax.files import write_atomically

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "math-verify")
SYNC_SECONDS = 1.0


class RunError(RuntimeError):
    """A run folder that cannot be used; the message says why."""


def file_digest(source: str | Path) -> str | None:
    """SHA-256 of a model's weights where they are local: of the file, or of a folder's list of them.

    None for a hub name or the bundled model: a commit, or dms_jax's version, says what those are.
    """
    path = Path(source)
    if not path.exists():
        return None
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    each = [f"{file_digest(file)} {file.relative_to(path)}\n" for file in sorted(path.glob("**/*.safetensors"))]
    return hashlib.sha256("".join(each).encode()).hexdigest()


def digest(value: Any) -> str:
    """A short hash of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


class RunInUse(RunError):
    """Another process is writing to the run folder."""


class Run:
    """An open run folder. `samples` holds what was already there; `append` adds to the file and to it.

    A lock on samples.jsonl keeps two processes from writing to one folder.
    """

    def __init__(self, path: Path, config: dict):
        self.path = path
        self.config = config
        self.samples_path = path / "samples.jsonl"
        if self.samples_path.exists() and not self.samples_path.is_file():
            raise RunError(f"{self.samples_path}: no regular file")
        self._file = self.samples_path.open("a+b")
        if not _lock(self._file):
            self._file.close()
            raise RunInUse(f"{path}: another process is writing to this run")
        self._synced = 0.0
        _drop_truncated_line(self._file, self.samples_path)
        try:
            self.samples = read_jsonl(self.samples_path)
        except RunError:
            self._file.close()
            raise

    def append(self, rows: list[dict]) -> None:
        """Writes samples, one line each; they outlive the process, and within a second or so the machine."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._file.write(lines.encode())
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:  # slow: a sweep ends many chains a second
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()
        self.samples.extend(rows)

    def started(self, **fields) -> dict:
        """Records that the run was started (again), and returns the entry."""
        path = self.path / "metadata.json"
        entries = read_json(path, list) if path.exists() else []
        entry = {"started": _now(), **environment(), **fields}
        write_json(path, [*entries, entry])
        return entry

    def finish(self, results: dict) -> None:
        """Writes results.json, which marks the run as finished."""
        write_json(self.path / "results.json", results)

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def open_run(
    root: str | Path,
    experiment: str,
    config: dict,
    run_dir: str | Path | None = None,
    fresh: bool = False,
    extendable: tuple[str, ...] = (),
) -> Run:
    """The run to write to: the named folder, else the newest unfinished one with an equal config, else a new one.

    Args:
      root: where run folders are made.
      run_dir: a folder to use, new or to be continued.
      fresh: begin a new folder in any case.
      extendable: keys that may differ where `run_dir` is continued: they say how much to do, not what.
    Raises:
      RunError: the named folder belongs to another configuration or is in use, or a samples file is damaged.
    """
    config = json.loads(json.dumps(config))  # as it will be read back: tuples become lists
    if run_dir is not None:
        path = Path(run_dir)
        if fresh and path.exists():
            raise RunError(f"{path}: exists already, so --fresh cannot begin there")
        return Run(path, config) if _matches(path, config, extendable) else _create(path, config)
    for path in [] if fresh else sorted(Path(root).glob(f"{experiment}-*"), reverse=True):
        there = read_config(path)
        if there is not None and not (path / "results.json").exists() and not differences(there, config):
            try:
                return Run(path, config)
            except RunInUse:
                continue
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = Path(root) / f"{experiment}-{stamp}-{digest(config)}"
    while path.exists():
        path = path.with_name(path.name + "b")
    return _create(path, config)


def _create(path: Path, config: dict) -> Run:
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", config)
    return Run(path, config)


def _matches(path: Path, config: dict, extendable: tuple[str, ...]) -> bool:
    """Whether a folder holds a run of this config; False where there is nothing yet."""
    there = read_config(path)
    if there is None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(f"{path}: exists, but is not a run folder")
        return False
    changed = differences(there, config, extendable)
    if changed:
        said = "; ".join(f"{key} was {there.get(key)!r}, is {config.get(key)!r}" for key in changed)
        raise RunError(f"{path}: holds a run of another configuration ({said})")
    return True


def differences(there: dict, here: dict, free: tuple[str, ...] = ()) -> list[str]:
    """Keys in which two configurations differ, but for `free` ones; an option that is not there was not given."""

    def given(config: dict, key: str):
        return None if config.get(key) in ([], ()) else config.get(key)

    return [key for key in sorted({*there, *here} - {*free}) if given(there, key) != given(here, key)]


def read_config(path: Path) -> dict | None:
    """The configuration of a run folder; None where there is none that can be read."""
    try:
        return read_json(path / "config.json", dict)
    except RunError:
        return None


def read_json(path: Path, kind: type) -> Any:
    """The dict or list that a file of a run folder holds.

    Raises:
      RunError: it cannot be read, or holds something else; names it.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such file, or no regular one")
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, kind):
        raise RunError(f"{path}: expected a JSON {kind.__name__}, got {type(value).__name__}")
    return value


def read_jsonl(path: Path) -> list[dict]:
    """The lines of a samples file, all of one form, without a last one that was cut off or is still being written.

    Raises:
      RunError: a line that is not JSON, or not of the form of the first one, with the file and its number.
    """
    rows: list[dict] = []
    content = path.read_bytes()
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise RunError(f"{path}:{number}: not a line of JSON") from None
        first = rows[0] if rows else row
        if not isinstance(row, dict) or row.keys() != first.keys():
            raise RunError(f"{path}:{number}: not a sample like that of the first line")
        odd = [key for key, value in row.items() if not _alike(value, first[key])]
        if odd:
            raise RunError(f"{path}:{number}: {odd[0]}={row[odd[0]]!r} is of another kind than in the first line")
        rows.append(row)
    return rows


def _alike(a: Any, b: Any) -> bool:
    """Whether two values of a field are of one kind; a text (an answer) may be None."""
    kinds = {float if type(value) is int else type(value) for value in (a, b)}
    return len(kinds) == 1 or kinds == {str, type(None)}


def write_json(path: Path, value: Any) -> None:
    """Writes through a temporary file, so that an interruption leaves the old file or the new one."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _lock(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _drop_truncated_line(file, path: Path) -> None:
    """Cuts what follows the last line end, and says so: a process that was killed may leave half a line."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        print(f"{path}: dropped its last line, which was cut off; that chain runs again", file=sys.stderr)
        file.truncate(whole)
    file.seek(0, os.SEEK_END)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """git's answer about the source tree; None outside a repository or without git."""
    root = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command_line() -> str:
    """The command that started this process, as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name.removesuffix('.__main__')}" if spec else sys.argv[0]
    return f"python {program} {shlex.join(sys.argv[1:])}".strip()


def environment() -> dict:
    """Versions, device, commit and command of this process."""
    import jax

    import dms_jax

    device = jax.devices()[0]
    status = _git("status", "--porcelain")
    return {
        "command": command_line(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "dms_jax": dms_jax.__version__,
        **{package: version_of(package) for package in PACKAGES},
        "system": platform.platform(),
        "device": f"{len(jax.devices())} x {device.platform} {device.device_kind}",
        "cpu_count": os.cpu_count(),
    }
