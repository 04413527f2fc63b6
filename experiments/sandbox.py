"""A sandbox for programs that nobody has read: Python in bubblewrap, with nothing of the host but the interpreter.

A program sees a read-only interpreter, its own source and an empty home of limited size; no network, no process but
its own, no file of the host. Memory, processor time, processes and the size of files are limited from inside, and the
time by the clock from outside. Without bubblewrap (`bwrap`) nothing is run.
"""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PREFIX = "/python"
HOME = "/home/program"
PROGRAM = "/program.py"
PACKAGES = "/packages"
FIRST_UID = 1 << 20  # user ids that nobody on the host has; each run takes another, since limits count by user
NUMBERS = itertools.count(os.getpid() * 1_000)
# Runs in the sandbox before the program: root becomes a user without rights, since limits on processes spare root.
BEGIN = """
import json, os, resource, sys
limits, user = json.loads(sys.argv[1])
if user is not None:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
for name, value in limits.items():
    resource.setrlimit(getattr(resource, name), (value, value))
os.execv(sys.executable, [sys.executable, "-P", "-B", sys.argv[2]])
"""


class SandboxError(RuntimeError):
    """Programs cannot be run safely here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    seconds: by the clock, for all of it. cpu_seconds, memory: of each process; memory in bytes of address space.
    processes: at the same time, threads included. file_bytes: of a file, and of what is printed. home_bytes: of all
    files together.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory: int = 1 << 30
    processes: int = 8
    file_bytes: int = 16 << 20
    home_bytes: int = 64 << 20

    def resources(self) -> dict[str, int]:
        """Names of the resource module, and their values."""
        return {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_CORE": 0,
            "RLIMIT_NOFILE": 128,
        }


class Outcome(NamedTuple):
    """How a program ended: its exit status (128 + n after signal n), None if its time was up; and what it printed."""

    status: int | None
    output: str
    errors: str


def run(program: str, given: bytes = b"", limits: Limits | None = None, packages: Sequence[str] = ()) -> Outcome:
    """Runs a Python program in a sandbox of its own; `given` is its standard input.

    packages: of this environment (numpy, say), to be imported by the program.
    Raises:
      SandboxError: no bubblewrap, or it cannot make a sandbox here.
    """
    check()
    return _run(program, given, limits or Limits(), packages)


@functools.cache
def check() -> None:
    """Raises SandboxError where no program can be run safely."""
    if sys.platform != "linux" or shutil.which("bwrap") is None:
        raise SandboxError(
            "model-written code runs only in a sandbox, and bubblewrap (bwrap) is not installed: "
            "apt-get install bubblewrap, or your system's package of that name"
        )
    tried = _run("print(1 + 1)", b"", Limits(seconds=60), ())
    if tried.output != "2\n":
        reason = tried.errors.strip() or f"exit status {tried.status}"
        raise SandboxError(f"bubblewrap cannot make a sandbox here ({reason}); it needs version 0.7 and namespaces")


def _run(program: str, given: bytes, limits: Limits, packages: Sequence[str]) -> Outcome:
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as stdin:
        source.write(program.encode("utf-8", "replace"))
        stdin.write(given)
        for file in (source, stdin):
            file.seek(0)
        command = [*_bubblewrap(source.fileno(), limits, packages), f"{PREFIX}/bin/python3", "-P", "-B", "-c", BEGIN]
        user = FIRST_UID + next(NUMBERS) % FIRST_UID if os.getuid() == 0 else None
        command += [json.dumps([limits.resources(), user]), PROGRAM]
        return _wait(command, stdin, source.fileno(), limits)


def _wait(command: list[str], stdin, source: int, limits: Limits) -> Outcome:
    """Printed text goes to files, so that the limit on the size of files holds for it too."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=stdin, stdout=output, stderr=errors, pass_fds=(source,), start_new_session=True
        )
        try:
            status = process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.kill()  # ends the namespace, and so every process in it
            process.wait()
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read(limits.file_bytes).decode("utf-8", "replace"))
    return Outcome(status, *texts)


def _bubblewrap(source: int, limits: Limits, packages: Sequence[str]) -> list[str]:
    """The command up to the program: what is shared with the host (nothing), and what is mounted."""
    if os.getuid() == 0:  # root needs no user namespace, and can become another user only without one
        apart = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        apart += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        apart = ["--unshare-all", "--cap-drop", "ALL"]
    command = ["bwrap", *apart, "--die-with-parent", "--new-session", "--clearenv"]
    names = {"HOME": HOME, "TMPDIR": HOME, "PATH": f"{PREFIX}/bin", "PYTHONPATH": PACKAGES, "OPENBLAS_NUM_THREADS": "1"}
    for name, value in names.items():
        command += ["--setenv", name, value]
    command += _interpreter()
    command += _packages(tuple(packages))
    command += ["--perms", "0444", "--ro-bind-data", str(source), PROGRAM]
    command += ["--perms", "0755", "--dir", "/dev", "--dev-bind", "/dev/null", "/dev/null"]
    command += ["--dir", "/home", "--size", str(limits.home_bytes), "--perms", "1777", "--tmpfs", HOME]
    return [*command, "--remount-ro", "/", "--chdir", HOME]


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib", vars={"base": sys.base_prefix, "installed_base": sys.base_prefix}))


@functools.cache
def _interpreter() -> tuple[str, ...]:
    """Mounts of the interpreter and its standard library."""
    stdlib, binary = _stdlib(), Path(sys.executable).resolve()
    mounts = [*_folders(PREFIX, f"{PREFIX}/bin", f"{PREFIX}/lib"), "--ro-bind", str(binary), f"{PREFIX}/bin/python3"]
    mounts += ["--ro-bind", str(stdlib), f"{PREFIX}/lib/{stdlib.name}"]
    if (stdlib / "site-packages").is_dir():
        site = f"{PREFIX}/lib/{stdlib.name}/site-packages"  # what else is installed is not the program's affair
        mounts += ["--tmpfs", site, "--remount-ro", site]
    return (*mounts, *_libraries([binary, *sorted((stdlib / "lib-dynload").glob("*.so"))]))


@functools.cache
def _packages(names: tuple[str, ...]) -> tuple[str, ...]:
    """Mounts of these packages, and of nothing else that is installed beside the interpreter."""
    from importlib.util import find_spec

    mounts, files = _folders(PACKAGES), []
    for name in names:
        spec = find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise SandboxError(f"package {name}: not installed")
        folder = Path(spec.submodule_search_locations[0])
        for path in (folder, folder.with_name(f"{name}.libs")):  # a wheel's own libraries are in the second
            if path.is_dir():
                mounts += ["--ro-bind", str(path), f"{PACKAGES}/{path.name}"]
                files += sorted(path.rglob("*.so*"))
    return (*mounts, *(_libraries(files) if files else ()))


def _libraries(files: Sequence[Path]) -> list[str]:
    """Mounts of the shared libraries that these files load, as the dynamic linker finds them here."""
    said = subprocess.run(["ldd", *map(str, files)], capture_output=True, text=True, check=False).stdout
    # "libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x...)", "/lib64/ld-linux-x86-64.so.2 (0x...)"
    words = [line.split(" (")[0].split("=>")[-1].strip() for line in said.splitlines() if " (" in line]
    own = [str(file.parent) for file in files]
    found = sorted({word for word in words if word.startswith("/") and not word.startswith(tuple(own))})
    parents = [str(parent) for path in found for parent in reversed(Path(path).parents) if str(parent) != "/"]
    return [*_folders(*parents), *(word for path in found for word in ("--ro-bind", path, path))]


def _folders(*paths: str) -> list[str]:
    """Folders that everybody may read: bubblewrap's own, made on the way, are its user's alone."""
    return [word for path in dict.fromkeys(paths) for word in ("--perms", "0755", "--dir", path)]
