"""Configurations from files: YAML that a user wrote, and settings that a run saved."""

import contextlib
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from dms_jax.config import ConfigError, described, field_kinds, fits, in_file, members, require


def load_yaml(cls: type, path: str | Path):
    """An instance of the config dataclass `cls` from a YAML file; an unknown or mistyped key raises ConfigError."""
    import yaml

    require(Path(path).is_file() or not Path(path).exists(), "config", str(path), "is no regular file")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from error
    return from_saved(cls, values, path)


def from_saved(cls: type, values: Any, where: str | Path):
    """An instance of the config dataclass `cls` from the keys and values in a file, also of an older version's.

    Raises:
      ConfigError: an unknown or mistyped key, or an impossible value; names the file.
    """
    with in_file(where):
        return _built(cls, _renamed(values), "")


def _renamed(values: Any) -> Any:
    """Saved settings under today's names: `offset` of `dms` is `logit_bias`, and `cr` is not in it."""
    if not isinstance(values, dict) or not isinstance(values.get("dms"), dict):
        return values
    dms = {key: value for key, value in values["dms"].items() if key != "cr"}
    if "offset" in dms:
        dms["logit_bias"] = dms.pop("offset")
    return {**values, "dms": dms}


def _built(cls: type, values: Any, prefix: str) -> Any:
    require(isinstance(values, Mapping), prefix.rstrip(".") or "settings", values, "expected keys with values")
    kinds, made = field_kinds(cls), {}
    for key, value in values.items():
        require(key in kinds, f"{prefix}{key}", value, f"no such key, there are {', '.join(kinds)}")
        made[key] = _converted(value, kinds[key], f"{prefix}{key}")
    for each in fields(cls):
        given = each.name in made or each.default is not MISSING or each.default_factory is not MISSING
        require(given, prefix + each.name, None, "is needed")
    return cls(**made)


def _converted(value: Any, kind: Any, key: str) -> Any:
    """What a file can say (lists, maps, a path as text, and 1e-5, text to YAML) as the annotation wants it."""
    options = members(kind)
    for option in options:
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if is_dataclass(option) and isinstance(value, Mapping):
            value = _built(typing.cast(type, option), value, f"{key}.")
        elif origin is tuple and isinstance(value, list):
            each = arguments[:1] * len(value) if arguments[-1] is ... else arguments
            if len(each) == len(value):
                value = tuple(_converted(v, k, f"{key}[{n}]") for n, (v, k) in enumerate(zip(value, each, strict=True)))
        elif option is Path and isinstance(value, str):
            value = Path(value)
        elif option is float and isinstance(value, str) and str not in options:
            with contextlib.suppress(ValueError):
                value = float(value)
    require(fits(value, kind), key, value, f"expected {described(kind)}")
    return value
