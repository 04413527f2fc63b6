"""Damaged files, and what becomes of them: `python -m tests.helpers.mutations --count 500` prints a table of counts.

A mutation depends on its kind, the seed and its number alone, so that one can be looked at again:
`--kinds config --seed 7 --first 123 --count 1 --shown`. Files are used in another process, whose time (for each) and
memory are limited, so that nothing can hang or kill what counts.
"""

import argparse
import copy
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SECONDS, MEMORY = 20, 12 << 30  # of one use; bytes of address space, of which XLA takes some
REFUSED, SAME, SAYS = "refused by name", "accepted, same result", "accepted, as the file now says"
BAD = ("refused without a name", "crash without a name", "hang", "accepted with another result")

NASTY = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**18, 1e300, 1e-300, 0.5, -0.5, float("nan"), float("inf"), "", "x",
    "\ud800", "1", "../model.safetensors", "/etc/hostname", [], {}, [None], [1, 2], [[]], {"a": 1}, "F16", "BF16",
)  # fmt: skip


class Mutation(NamedTuple):
    """What became of a damaged file."""

    kind: str
    number: int
    outcome: str
    file: str
    message: str


class Kind(NamedTuple):
    """A kind of file. `use(root)` is what users do with it, and gives {name: array or value}; `says(root, got)`
    whether that is what the file says, as another program reads it. `file` may be a pattern, of which one is drawn."""

    file: str
    mutate: Callable[[np.random.Generator, bytes], bytes]
    use: Callable[[Path], dict[str, Any]]
    says: Callable[[Path, dict[str, Any]], bool]


# Mutations of a file's content


def places(value: Any, path: tuple = ()):
    """The path of every value inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def json_text(rng: np.random.Generator, text: bytes) -> bytes:
    """One value replaced, left out, given twice, nested without end or put under another name."""
    value = json.loads(text)
    every = list(places(value))
    path, new = every[rng.integers(len(every))], NASTY[rng.integers(len(NASTY))]
    if not path:
        return json.dumps(new).encode()
    holder, key, kind = at(value, path[:-1]), path[-1], rng.integers(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(new)] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):
        holder["x" + key] = copy.deepcopy(holder[key])
    elif kind == 3:
        holder[key] = "DEEP"
        return json.dumps(value).encode().replace(b'"DEEP"', b"[" * 20000 + b"]" * 20000)
    elif kind == 4:
        holder[key] = copy.deepcopy(at(value, every[rng.integers(len(every))]))
    else:
        holder[key] = new
    return json.dumps(value).encode()


def some_bytes(rng: np.random.Generator, data: bytes, most: int | None = None) -> bytes:
    """A few bytes of the first `most` changed, or the file cut, filled or shifted there."""
    start, count, kind = int(rng.integers(most or len(data))), int(rng.integers(1, 9)), rng.integers(7)
    before, inside, after = data[:start], data[start : start + count], data[start + count :]
    if kind == 0:
        return before
    if kind == 1:
        return before + rng.bytes(count) + inside + after
    if kind == 2:
        return before + after
    if kind == 5:
        return before + bytes([data[start] ^ 1 << int(rng.integers(8))]) + data[start + 1 :]
    return before + {3: b"\xff" * count, 4: b"\0" * count}.get(kind, rng.bytes(count)) + after


def text_file(rng: np.random.Generator, data: bytes) -> bytes:
    """JSON, most of the time still JSON."""
    return json_text(rng, data) if rng.random() < 0.8 else some_bytes(rng, data)


def yaml_file(rng: np.random.Generator, data: bytes) -> bytes:
    import yaml

    return json_text(rng, json.dumps(yaml.safe_load(data)).encode()) if rng.random() < 0.7 else some_bytes(rng, data)


def line_file(rng: np.random.Generator, data: bytes) -> bytes:
    """One line of JSON lines."""
    lines = data.splitlines()
    n = int(rng.integers(len(lines)))
    lines[n] = text_file(rng, lines[n])
    return b"\n".join(lines) + b"\n"[: rng.integers(2)]


def tensor_file(rng: np.random.Generator, data: bytes) -> bytes:
    """Half of the mutations are in the header, which is written again with its length; few are in the data."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        header = json_text(rng, data[8 : 8 + size])
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    return some_bytes(rng, data, len(data) if rng.random() < 0.2 else 8 + size)


def gguf_file(rng: np.random.Generator, data: bytes) -> bytes:
    return some_bytes(rng, data, len(data) if rng.random() < 0.1 else data.index(b"blk.0.ffn_up") + 200)


def apply(kind: Kind, rng: np.random.Generator, root: Path) -> Path:
    """Damages a file below `root`; now and then it becomes a FIFO or a folder, or is gone."""
    files = sorted(file for file in root.glob(kind.file) if file.is_file())
    file = files[rng.integers(len(files))]
    data, other = file.read_bytes(), rng.random()
    file.unlink()
    if other < 0.01:
        os.mkfifo(file)
    elif other < 0.02:
        file.mkdir()
    elif other > 0.01 + 0.02:
        file.write_bytes(kind.mutate(rng, data) if data else rng.bytes(3))
    return file


# Outcomes


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results are equal, to the bit."""

    def equal(x, y) -> bool:
        return np.array_equal(x, y) if isinstance(x, np.ndarray) and isinstance(y, np.ndarray) else x == y

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def outcome(kind: Kind, root: Path, sound: dict[str, Any]) -> tuple[str, str]:
    """What became of the files below `root`, and the error's message."""
    from dms_jax.config import ConfigError
    from dms_jax.training.checkpoint import CheckpointError
    from dms_jax.weights.safetensors import WeightError
    from experiments.run import RunError

    try:
        got = kind.use(root)
    except (ConfigError, WeightError, FileNotFoundError, RunError, CheckpointError) as error:
        return (REFUSED if str(root) in str(error) else BAD[0]), f"{type(error).__name__}: {error}"
    except BaseException as error:  # a panic of Rust is no Exception
        return BAD[1], f"{type(error).__name__}: {error}"
    if same(got, sound):
        return SAME, ""
    try:
        return (SAYS if kind.says(root, got) else BAD[3]), ""
    except Exception as error:  # the other program refuses the file
        return BAD[3], f"the other reader: {type(error).__name__}: {error}"


def work(names: Sequence[str], seed: int, first: int, count: int, skip: int) -> None:
    """Prints the outcome of each mutation, but for the first `skip`, as a line of JSON. The alarm ends the process."""
    from tests.helpers import mutated_files

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    output = os.dup(1)
    for stream in (1, 2):  # libraries have much to say about damaged files
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    for name in names[skip // count :]:
        kind, begin, skip = mutated_files.KINDS[name], first + skip % count, 0
        with tempfile.TemporaryDirectory() as folder:
            sound = Path(folder) / "sound"
            mutated_files.write(name, sound)
            result = kind.use(sound)
            for number in range(begin, first + count):
                root = Path(folder) / str(number)
                shutil.copytree(sound, root)
                file = apply(kind, np.random.default_rng((zlib.crc32(name.encode()), seed, number)), root)
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                found, message = outcome(kind, root, result)
                signal.setitimer(signal.ITIMER_REAL, 0)
                line = Mutation(name, number, found, file.name, message[:2000])
                os.write(output, json.dumps(line).encode() + b"\n")
                shutil.rmtree(root)


def outcomes(names: Sequence[str], seed: int, first: int, count: int) -> list[Mutation]:
    """`count` mutations of each kind, from number `first`; what ended the process that used a file is an outcome."""
    found: list[Mutation] = []
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    while len(found) < len(names) * count:
        numbers = ["--seed", seed, "--first", first, "--count", count, "--skip", len(found)]
        command = [sys.executable, "-m", "tests.helpers.mutations", "--worker", *map(str, numbers), "--kinds", *names]
        done = subprocess.run(command, capture_output=True, env=environment, cwd=ROOT, check=False)
        new = [Mutation(*json.loads(line)) for line in done.stdout.splitlines()]
        found += new
        if len(found) == len(names) * count:
            break
        if not new and done.returncode > 0:
            raise RuntimeError(done.stderr.decode()[-2000:])
        kind, number = divmod(len(found), count)
        ended = BAD[2] if done.returncode == -signal.SIGALRM else BAD[1]
        found.append(Mutation(names[kind], first + number, ended, "", f"exit status {done.returncode}"))
    return found


def table(found: Sequence[Mutation]) -> str:
    """How many mutations of each kind came to which end."""
    ends = (REFUSED, SAME, SAYS, *BAD)
    lines = [f"({n}) {end}" for n, end in enumerate(ends, 1)]
    lines.append(f"{'':20}" + "".join(f"{f'({n})':>6}" for n in range(1, len(ends) + 1)))
    for name in dict.fromkeys(each.kind for each in found):
        counts = Counter(each.outcome for each in found if each.kind == name)
        lines.append(f"{name:20}" + "".join(f"{counts[end]:6}" for end in ends))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", help="default: all")
    parser.add_argument("--seed", type=int, help="default: a fresh one")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=500, help="of each kind; default: 500")
    parser.add_argument("--shown", action="store_true", help="every outcome, not only the bad ones")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.kinds, options.seed, options.first, options.count, options.skip)
        return 0
    from tests.helpers import mutated_files

    seed = np.random.SeedSequence().entropy % 2**32 if options.seed is None else options.seed
    found = outcomes(options.kinds or list(mutated_files.KINDS), seed, options.first, options.count)
    for each in found:
        if options.shown or each.outcome in BAD:
            print(each)
    print(f"seed {seed}\n{table(found)}")
    return int(any(each.outcome in BAD for each in found))


if __name__ == "__main__":
    sys.exit(main())
