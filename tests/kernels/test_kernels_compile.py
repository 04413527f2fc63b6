"""Every kernel compiles for the GPUs that matter, without one, and those that count for speed spill no registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"split_kv", "merge_splits", "forward", "key_gradients", "query_gradients"}
NO_SPILLS = {"split_kv", "merge_splits", "forward"}
MODELS = ("Llama-3.2-1B", "Qwen3-8B")  # head dims of 64 and 128
LATENT = ("Youtu-LLM-2B", "MiniCPM3-4B", "DeepSeek-V3")  # only decoded, with tiles for an H100
# The most bytes that a thread spills where it has the sums of 64 query heads: before and after the loop over tiles.
KEPT = {"MiniCPM3-4B": 512, "DeepSeek-V3": 512}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # the most that one program may have


def compiled(*arguments: str, models: tuple[str, ...] = MODELS) -> list[dict]:
    """Rows of kernel_resources.py, in its own process: Triton compiles only where it does not interpret."""
    command = [sys.executable, "-m", "scripts.benchmarks.kernel_resources", "--out", "-", "--models", *models]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """All for an H100; for an A100 without the backward pass."""
    latent = compiled("--archs", "90", models=LATENT)
    return compiled("--archs", "90") + compiled("--archs", "80", "--no-backward") + latent


def test_everything_is_compiled(rows):
    for arch, kernels in ((90, KERNELS), (80, NO_SPILLS)):
        for model in MODELS:
            assert {row["kernel"] for row in rows if (row["arch"], row["model"]) == (arch, model)} == kernels
    latent = {(row["model"], row["kernel"]) for row in rows if row["model"] in LATENT}
    assert latent == {(model, kernel) for model in LATENT for kernel in ("split_kv", "merge_splits")}
    decoded = {(row["arch"], row["dtype"]) for row in rows if row["kernel"] == "split_kv"}
    assert decoded == {(80, "bfloat16"), (80, "int8"), (90, "bfloat16"), (90, "int8"), (90, "float8_e4m3fn")}


def test_resources(rows, record_property):
    """Decode and the forward pass spill nothing in their loops, and two programs of decode fit a multiprocessor."""
    for row in rows:
        name = "/".join(map(str, (row["arch"], row["model"], row["kernel"], row["dtype"])))
        record_property(name, f"{row['registers']} registers, {row['shared_bytes']} B shared, {row['spilled_bytes']} B")
        print(name, row)
        assert 0 < row["registers"] <= 255 and row["shared_bytes"] <= SHARED_MEMORY[row["arch"]]
        if row["kernel"] in NO_SPILLS:
            assert row["spilled_bytes"] <= KEPT.get(row["model"], 0)
        if row["kernel"] == "split_kv" and row["model"] != "DeepSeek-V3":  # which has sums of 128 KB
            assert 2 * (row["shared_bytes"] + 1024) <= SHARED_MEMORY[row["arch"]] + 1024
            assert 2 * row["registers"] * row["num_warps"] * 32 <= 65536


def test_a_spill_would_be_seen():
    """More values than a thread has registers."""
    code = """
import os; os.environ["TRITON_INTERPRET"] = "0"
import triton, triton.language as tl
from scripts.benchmarks.kernel_resources import resources
from dms_jax.kernels import triton_flash_kernels

options = {"T": 64, "S": 64, "H": 1, "K": 1, "D": 256, "D_PAD": 256, "BM": 128, "BN": 128, "Q_TILES": 64, "K_TILES": 64}
options |= {"SCALE": 1.0, "WINDOW": 4, "HARD": False, "SEGMENTS": False, "num_warps": 4, "num_stages": 1}
dtypes = ["bfloat16"] * 3 + ["int32"] * 2 + ["float32"] + ["int32"] * 4 + ["bfloat16", "float32"]
assert resources(triton_flash_kernels.forward, dtypes, options, 90)["spilled_bytes"] > 100
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def test_what_xla_is_given():
    """Triton IR of both kernels with helpers inlined and no line numbers; the pools share buffers with the outputs."""
    code = """
import os; os.environ["TRITON_INTERPRET"] = "0"
import jax
from dms_jax import kernels

jax.default_backend = lambda: "gpu"
spec, new, heads = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((2, 4, 64), "bfloat16"), (3, 2, 4)
pool = spec((50, 16, 64), "bfloat16")
pages = kernels.Pages(pool, pool, spec((*heads, 8), "int32"), spec(heads, "int32"))
update = jax.jit(lambda *arrays: kernels.paged_decode_attention_update(*arrays, layer=1), donate_argnums=3)
traced = update.trace(spec((2, 16, 64), "bfloat16"), new, new, pages, spec(heads, "int32"))
print(traced.lower(lowering_platforms=("cuda",)).as_text())
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    calls = [line for line in run.stdout.splitlines() if "__gpu$xla.gpu.triton" in line]
    assert ["@split_kv(" in line for line in calls] == [True, False]
    assert "num_warps = 4 : i32" in calls[0] and "@merge_splits(" in calls[1]
    assert not any("tt.call" in line or ".py" in line for line in calls)
    assert calls[0].count("output_operand_alias<") == 2 and calls[1].count("output_operand_alias<") == 0
