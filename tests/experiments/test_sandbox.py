"""The sandbox: what a program there can not read, write, reach or use up. Needs bubblewrap."""

import socket
import time
from pathlib import Path

import pytest

from experiments import sandbox
from experiments.sandbox import Limits, SandboxError, run

SHORT = Limits(seconds=3)


def test_a_program_runs_and_is_given_its_input():
    assert run("print(sum(map(int, input().split())))", b"1 2 3") == (0, "6\n", "")
    ended = run("import sys; print('out'); print('é', file=sys.stderr); sys.exit(3)")
    assert ended == (3, "out\n", "é\n")
    assert run("1 / 0").errors.endswith("ZeroDivisionError: division by zero\n")


def test_packages_are_imported_only_where_they_are_named():
    program = "import numpy; print(numpy.arange(3).sum())"
    assert run(program, packages=("numpy",)).output == "3\n"
    assert "No module named 'numpy'" in run(program).errors
    with pytest.raises(SandboxError, match="package nothing_of_the_kind: not installed"):
        run(program, packages=("nothing_of_the_kind",))


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/hostname", __file__, "/proc/self/environ", "/proc/1/cmdline"])
def test_no_file_of_the_host_is_read(path):
    ended = run(f"print(open({path!r}).read())")
    assert ended.status == 1 and not ended.output and "No such file" in ended.errors


def test_nothing_of_the_host_is_listed():
    ended = run("import os\nfor folder, _, files in os.walk('/'): print(folder, *files, sep='\\n')")
    seen = ended.output.splitlines()
    assert "/program.py" in [f"{seen[0]}{name}" for name in seen[1:20]]
    assert not any(name.endswith("site-packages/numpy") or "experiments" in name for name in seen)
    environment = run("import os; print(sorted(os.environ))").output
    assert environment == "['HOME', 'OPENBLAS_NUM_THREADS', 'PATH', 'PWD', 'PYTHONPATH', 'TMPDIR']\n"


@pytest.mark.parametrize(
    "path", ["/program.py", "/x", "/etc/x", "/home/x", "/dev/x", "/packages/x", "/python/x", "/python/bin/python3"]
)
def test_nothing_is_written_but_in_the_home(path):
    assert run(f"open({path!r}, 'w')").status == 1
    assert run("open('x', 'w').write('7'); print(open('/home/program/x').read())").output == "7\n"
    assert not Path("/home/program/x").exists()


def test_nothing_is_left_for_the_next():
    run("open('x', 'w').write('7')")
    assert "No such file" in run("open('x')").errors


def test_no_connection_is_made():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reached = "import socket; socket.create_connection(('127.0.0.1', {}), 2); print('connected')"
        assert run(reached.format(port)).output == ""
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
        socket.create_connection(("127.0.0.1", port), 2).close()  # the server was there
    for address in ("'1.1.1.1', 53", "'example.com', 80"):
        assert (
            run(f"import socket; socket.create_connection(({address}), 2); print('connected')", limits=SHORT).output
            == ""
        )


def test_other_processes_are_out_of_reach():
    ended = run(
        "import os\nfor n in range(2, 100_000):\n  try: os.kill(n, 0); print(n)\n  except ProcessLookupError: pass"
    )
    assert len(ended.output.split()) <= 2, "the program itself, and what started it"


def test_rights_are_given_up():
    ended = run(
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.mount(b'none', b'/home', b'tmpfs', 0, 0), libc.setuid(0) if os.getuid() else -1)"
    )
    assert ended.output == "-1 -1\n"


def test_memory_is_limited():
    ended = run("x = bytearray(4 << 30)")
    assert "MemoryError" in ended.errors
    assert run(f"x = bytearray({1 << 28}); print(len(x))").output == f"{1 << 28}\n"


def test_a_fork_bomb_ends():
    begun = time.monotonic()
    run("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", limits=SHORT)
    assert time.monotonic() - begun < 30
    count = (
        "import os, time\nn = 0\ntry:\n  while n < 100:\n    if os.fork() == 0: time.sleep(2); os._exit(0)\n"
        "    n += 1\nexcept OSError: pass\nprint(n)"
    )
    assert 0 < int(run(count).output) < 8
    assert run("print(7)").output == "7\n"


def test_a_program_that_hangs_ends():
    begun = time.monotonic()
    assert run("import time; time.sleep(1000)", limits=Limits(seconds=1)).status is None
    assert run("while True: pass", limits=Limits(seconds=1)).status is None
    assert run("import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
               limits=Limits(seconds=1)).status is None  # fmt: skip
    assert run("while True: pass", limits=Limits(cpu_seconds=1, seconds=30)).status == 137
    assert time.monotonic() - begun < 40


def test_what_a_program_leaves_running_ends_with_it():
    program = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(1000)\nprint('done')"
    begun = time.monotonic()
    assert run(program, limits=Limits(seconds=20)).output == "done\n"
    assert time.monotonic() - begun < 15


def test_files_and_output_are_limited():
    limits = Limits(file_bytes=1 << 20, home_bytes=4 << 20)
    assert "File too large" in run("open('x', 'w').write('7' * (2 << 20))", limits=limits).errors
    many = "for n in range(9): open(str(n), 'w').write('7' * 1_000_000)"
    assert "No space left" in run(many, limits=limits).errors
    printed = run("while True: print('7' * 1000)", limits=limits)
    assert printed.status and len(printed.output) == 1 << 20


def test_without_bubblewrap_nothing_is_run(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(SandboxError, match="bubblewrap .*apt-get install bubblewrap"):
        sandbox.check.__wrapped__()


def test_a_sandbox_that_cannot_be_made_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(SandboxError, match="cannot make a sandbox here .*No permissions"):
        sandbox.check.__wrapped__()
