"""Dynamic Memory Sparsification in JAX. Names are imported on first use: `import dms_jax` is quick."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dms_jax.config import CacheConfig, ConfigError, DMSConfig, ModelConfig, SamplingConfig  # noqa: F401
    from dms_jax.inference.chat import Conversation  # noqa: F401
    from dms_jax.inference.generation import generate  # noqa: F401
    from dms_jax.weights.lm import LM  # noqa: F401
    from dms_jax.weights.load import load  # noqa: F401
    from dms_jax.weights.safetensors import WeightError  # noqa: F401
    from dms_jax.weights.save import save, save_gate  # noqa: F401

__version__ = "0.1.0"

_HOME = {
    "CacheConfig": "config",
    "ConfigError": "config",
    "DMSConfig": "config",
    "ModelConfig": "config",
    "SamplingConfig": "config",
    "LM": "weights.lm",
    "load": "weights.load",
    "save": "weights.save",
    "save_gate": "weights.save",
    "generate": "inference.generation",
    "Conversation": "inference.chat",
    "WeightError": "weights.safetensors",
}
__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return sorted(__all__)
