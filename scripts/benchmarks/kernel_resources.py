"""Compiles the GPU kernels for the attention shapes of real models, without a GPU, and lists what each one uses.

Registers and local memory (spilled registers) of a thread, shared memory of a program. The kernels, arguments and tile
sizes are those that dms_jax.kernels launches: its calls are traced and recorded, not repeated here. Needs triton.
"""

import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dms_jax import kernels
from dms_jax.config import one_of
from dms_jax.kernels import launch as launching
from scripts import command

# H, K, D, U; with U < D there is no kernel of flash attention
SHAPES = {
    "Llama-3.2-1B": (32, 8, 64, 64),
    "Qwen3-8B": (32, 8, 128, 128),
    "Qwen-R1-32B": (40, 8, 128, 128),
    "Youtu-LLM-2B": (16, 1, 576, 512),
    "MiniCPM3-4B": (40, 1, 288, 256),
    "DeepSeek-V3": (128, 1, 576, 512),
}
QUANTIZED = ("Qwen3-8B", "Youtu-LLM-2B")  # whose pages are also compiled in fewer bits
ARCHS = (80, 90)  # A100; H100 and H200


@dataclass(frozen=True)
class Settings:
    """What to compile.

    archs: compute capabilities. models: keys of SHAPES. backward: also the backward pass.
    context: tokens. out: JSON file for the results ("-" prints JSON instead of a table).
    """

    archs: tuple[int, ...] = ARCHS
    models: tuple[str, ...] = tuple(SHAPES)
    backward: bool = True
    context: int = 8192
    out: str | None = None


def traced_launches(call, *shapes) -> list[tuple]:
    """`(kernel, dtypes, options)` of every launch that `call` makes, found by tracing it with a stand-in."""
    launches = []

    def record(kernel, arrays, out, grid, aliases, options):
        launches.append((kernel, [str(x.dtype) for x in (*arrays, *out)], options))
        return [jnp.zeros(x.shape, x.dtype) for x in out]

    before, launching.xla_call = launching.xla_call, record
    try:
        jax.eval_shape(call, *shapes)
    finally:
        launching.xla_call = before
    return launches


def decode_launches(shape: tuple[int, ...], context: int, pages: str = "bfloat16", B: int = 16) -> list[tuple]:
    """Those of one decode step of B sequences; pages of 16 tokens, of more than 16 sequences or latent of 64."""
    H, K, D, U = shape
    N, page = 4096, 64 if U < D or B > 16 else 16
    spec = jax.ShapeDtypeStruct
    pools = spec((N, page, D), jnp.dtype(pages)), spec((N, 0 if U < D else page, U), jnp.dtype(pages))
    scales = [spec((N, page), jnp.float32) if pages != "bfloat16" else None] * 2

    def call(q, k, v, table, lengths, k_scale, v_scale):
        pages = kernels.Pages(k, v, table, lengths, k_scale, v_scale)
        return kernels.paged_decode_attention(q, pages, implementation="triton")

    table, lengths = spec((B, K, context // page), jnp.int32), spec((B, K), jnp.int32)
    return traced_launches(call, spec((B, H, D), jnp.bfloat16), *pools, table, lengths, *scales)


def flash_launches(shape: tuple[int, ...], context: int, backward: bool) -> list[tuple]:
    """The launches of one pass over a sequence, with the backward pass or without."""
    H, K, D, _ = shape
    spec = jax.ShapeDtypeStruct
    key = spec((1, context, K, D), jnp.bfloat16)
    log_keep_prob = spec((1, K, context), jnp.float32)
    key_pos = spec((1, K, context), jnp.int32)

    def call(q, k, v, query_pos, key_pos, log_keep_prob):
        mask = kernels.EvictionMask(query_pos, key_pos, log_keep_prob, 256)
        out = kernels.flash_attention(q, k, v, mask, implementation="triton")
        return out.astype(jnp.float32).sum()

    call = jax.grad(call, (0, 1, 2, 5)) if backward else call
    arrays = (spec((1, context, H, D), jnp.bfloat16), key, key, spec((1, context), jnp.int32), key_pos, log_keep_prob)
    return traced_launches(call, *arrays)


def resources(kernel, dtypes: list[str], options: dict, arch: int) -> dict:
    """Compiles one launch with Triton's own compiler (every pointer aligned to 16 bytes) and reads the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = dict(options)
    build = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    pointers = {name: launching.POINTERS[dtype] for name, dtype in zip(kernel.arg_names, dtypes, strict=False)}
    signature = pointers | dict.fromkeys(options, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    source = ASTSource(kernel, signature=signature, constexprs=options, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=build)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(found["REG"]),
        "spilled_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        "shared_bytes": compiled.metadata.shared,
        **build,
    }


def main(settings: Settings) -> None:
    console = Console(stderr=settings.out == "-")
    jobs = []
    for model in settings.models:
        one_of("models", model, tuple(SHAPES))
        shape = SHAPES[model]
        for pages in ("bfloat16", "int8", "float8_e4m3fn") if model in QUANTIZED else ("bfloat16",):
            jobs += [(model, pages, launch) for launch in decode_launches(shape, settings.context, pages)]
        if shape[2] == shape[3]:  # not latent: programs of many heads merge their splits themselves
            more = decode_launches(shape, settings.context, B=256)
            more += flash_launches(shape, settings.context, settings.backward)
            jobs += [(model, "bfloat16", launch) for launch in more]
    rows = []
    # Before sm_89 there is no float8 of this kind.
    todo = [(*job, arch) for arch in settings.archs for job in jobs if arch >= 89 or job[1] != "float8_e4m3fn"]
    for model, dtype, launch, arch in track(todo, "compiling", console=console):
        used = resources(*launch, arch)
        rows.append({"arch": arch, "model": model, "kernel": launch[0].__name__, "dtype": dtype, **used})
    if settings.out == "-":
        print(json.dumps(rows))
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    if settings.out:
        Path(settings.out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    command.run(main, Settings)
