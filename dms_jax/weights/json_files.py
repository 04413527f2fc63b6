"""JSON objects in files, whose faults are ConfigErrors that name the file."""

import json
from pathlib import Path
from typing import Any

from dms_jax.config import ConfigError, require


def parse_json(text: str | bytes, where: str | Path) -> dict[str, Any]:
    """A JSON object, or a ConfigError that names where it stands."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: cannot be read as JSON ({error})") from error
    require(isinstance(value, dict), str(where), type(value).__name__, "expected a JSON object")
    return value


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds a JSON object, or a ConfigError that names the file."""
    require(file.is_file(), str(file), "", "is no regular file")
    try:
        return parse_json(file.read_bytes(), file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
