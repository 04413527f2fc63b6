"""Files written in one piece: an interruption or a full disk leaves the old file or the new one, never half of one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Writes a file through a temporary one beside it, which is on disk before it takes the name.

    The temporary file of a process that was killed is written over by the next write of the same file.

    content: text (UTF-8), bytes, or a function that writes to the open file.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.new")
    try:
        with open(new, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
