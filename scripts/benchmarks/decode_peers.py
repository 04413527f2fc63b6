"""Decode steps of Hugging Face transformers, and of FastDMS, at the shapes of bench_decode, timed.

SDPA attention, a StaticCache of the context and the steps timed, random weights and random keys and values, all made
on the device: no prefill runs. A step is the model and the greedy choice of the next token, fed to the next step. With
a static cache transformers always passes a mask, and then repeats the keys and values for every query head, layer by
layer; that copy is part of what is timed, and is counted in what a batch needs.

modes: "eager"; "compiled" is torch.compile(mode="reduce-overhead", fullgraph=True), as transformers' generate does
with a static cache; "graph" replays the eager step as one CUDA graph, which costs no compilation.

    python -m scripts.benchmarks.decode_peers --model qwen3_8b --cells 8x8192 maxx32768 --out peers.json

With --fastdms, the folder of a clone of FastDMS, that is timed too, in the modes that fastdms_peer names.
scripts/benchmarks/small_batches.sh runs ours, transformers and FastDMS side by side.
"""

import dataclasses
import gc
import inspect
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers.initialization import no_init_weights

from dms_jax.config import ModelConfig, one_of, require
from dms_jax.weights.huggingface import config_to_hf
from experiments.run import environment
from scripts import command
from scripts.benchmarks import fastdms_peer
from scripts.benchmarks.bench_decode import MODELS
from scripts.benchmarks.records import Record


@dataclass(frozen=True)
class Settings:
    """What to measure.

    cells: BATCHxCONTEXT; a batch of "max" is the largest that fits in --memory. steps: decode steps in one timed
    round, after a round to warm up. memory: bytes of the device that may be used, None for all that is free.
    fastdms: a clone of FastDMS; its cells hold context / cr tokens a head.
    out: JSON file, complete after every row; rows already there and not asked for stay.
    """

    model: str = "qwen3_8b"
    cells: tuple[str, ...] = ("8x8192",)
    modes: tuple[Literal["eager", "compiled", "graph"], ...] = ("eager", "compiled")
    steps: int = 16
    rounds: int = 3
    dtype: str = "bfloat16"
    device: str = "cuda"
    memory: int | None = None
    seed: int = 0
    fastdms: Path | None = None
    fastdms_modes: tuple[str, ...] = tuple(fastdms_peer.MODES)
    cr: float = 8.0
    out: Path | None = None


def random_model(config: ModelConfig, dtype: str, device: str, seed: int) -> torch.nn.Module:
    """transformers' model of this shape with random weights, made on the device in its dtype."""
    values = config_to_hf(config)
    hf_config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(device), no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(
            hf_config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    model.tie_weights()  # what no_init_weights left out
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.02) if weight.ndim > 1 else weight.fill_(1)
    return model.eval().requires_grad_(False)


def random_cache(model: torch.nn.Module, batch: int, capacity: int) -> transformers.StaticCache:
    """A static cache with random keys and values in all its slots; `rewind` says how many of them are tokens."""
    c = model.config
    cache = transformers.StaticCache(config=c, max_cache_len=capacity)
    cache.early_initialization(batch, c.num_key_value_heads, c.head_dim, model.dtype, model.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def rewind(cache: transformers.StaticCache, tokens: int) -> None:
    """The cache holds `tokens` tokens from now on. In place: a compiled step keeps the address."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)


def cache_argument(model: torch.nn.Module) -> str:
    """What the model calls its cache; newer versions of transformers changed the name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def stepper(model: torch.nn.Module, cache: transformers.StaticCache) -> Callable:
    """The step as a function: tokens `[B, 1]` -> the next tokens `[B, 1]` and the logits `[B, V]`."""
    given = {cache_argument(model): cache}

    def step(token):
        logits = model(input_ids=token, use_cache=True, **given).logits[:, -1]
        return logits.argmax(-1, keepdim=True), logits

    return step


def prepared(mode: str, step: Callable, token: torch.Tensor) -> Callable:
    """The step under a mode, tokens to next tokens. Capturing a graph takes a few steps of the cache."""
    if mode == "eager":
        return lambda token: step(token)[0]
    if mode == "compiled":
        compiled = torch.compile(lambda token: step(token)[0], mode="reduce-overhead", fullgraph=True, dynamic=False)
        return lambda token: compiled(token).clone()  # the next call overwrites what this one returned
    given, graph, side = token.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(given)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        made = step(given)[0]

    def replay(token):
        given.copy_(token)
        graph.replay()
        return made

    return replay


def bytes_needed(config: ModelConfig, batch: int, capacity: int, weights: int, item: int) -> int:
    """Weights, the cache, and one layer's keys and values once for each query head."""
    layer = 2 * batch * capacity * config.num_kv_heads * config.head_dim * item
    return weights + layer * config.num_layers + layer * (config.num_heads // config.num_kv_heads)


def largest_batch(config: ModelConfig, capacity: int, weights: int, item: int, memory: int) -> int:
    """The most sequences that fit beside the weights, with a tenth of the memory for the rest; at least one."""
    one = bytes_needed(config, 1, capacity, weights, item) - weights
    return max(1, int((0.9 * memory - weights) // one))


def timed(settings: Settings, cache, run: Callable, token: torch.Tensor, context: int) -> list[float]:
    """Seconds a step of each round, the first of which warms up (and compiles)."""
    wait = torch.cuda.synchronize if settings.device == "cuda" else lambda: None
    seconds = []
    for _ in range(settings.rounds + 1):
        rewind(cache, context)
        wait()
        start = time.perf_counter()
        for _ in range(settings.steps):
            token = run(token)
        wait()
        seconds.append((time.perf_counter() - start) / settings.steps)
    return seconds


@torch.inference_mode()
def measure(settings: Settings, model: torch.nn.Module, cache, batch: int, context: int, mode: str) -> dict:
    """The numbers of one row."""
    begun = time.perf_counter()
    on_gpu = settings.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rewind(cache, context)
    token = torch.randint(model.config.vocab_size, (batch, 1), device=settings.device)
    run = prepared(mode, stepper(model, cache), token)
    seconds = timed(settings, cache, run, token, context)
    step = statistics.median(seconds[1:])
    return {
        "seconds_per_step": step,
        "rounds": seconds[1:],
        "tokens_per_second": batch / step,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "first_round_seconds": seconds[0] * settings.steps,
        "seconds_in_all": time.perf_counter() - begun,
    }


def freed() -> None:
    """Gives back what compiled steps and caches of earlier cells hold."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(row: dict, call: Callable[[], dict]) -> dict:
    """The row with what `call` measures, or with its error: the other rows go on."""
    try:
        return row | call()
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"[:300]}


def rows_of(settings: Settings, model: torch.nn.Module, cell: tuple[str, int], memory: int) -> Iterator[dict]:
    """A row for each mode of one cell, as they come; one row says so where the cell cannot fit."""
    config, (asked, context) = MODELS[settings.model], cell
    item, capacity = model.dtype.itemsize, context + settings.steps
    weights = sum(weight.nbytes for weight in model.parameters())
    batch = largest_batch(config, capacity, weights, item, memory) if asked == "max" else int(asked)
    needed = bytes_needed(config, batch, capacity, weights, item)
    row = {
        "cell": f"{asked}x{context}",
        "batch": batch,
        "largest_batch": asked == "max",
        "context": context,
        "fits": needed <= 0.9 * memory,
        "bytes_needed": needed,
        "weight_bytes": weights,
        "kv_bytes": 2 * batch * context * config.num_layers * config.num_kv_heads * config.head_dim * item,
    }
    if not row["fits"]:
        yield row
        return
    held = {}  # emptied at the end: an exception's traceback must not keep the cache

    def fill() -> dict:
        with torch.inference_mode():
            held["cache"] = random_cache(model, batch, capacity)
        return {}

    failed = attempt(row, fill)
    if not held:
        yield failed
    for mode in settings.modes if held else ():
        named = row | {"mode": mode}
        yield attempt(named, lambda mode=mode: measure(settings, model, held["cache"], batch, context, mode))
        freed()
    held.clear()
    freed()


def fastdms_rows(settings: Settings, model: torch.nn.Module, cells: list[tuple[str, int]]) -> Iterator[dict]:
    """A row for each cell and mode of FastDMS, each from a process of its own; `model` is changed and moved to the CPU.

    A batch of "max" is left out: the engine does not say what it needs.
    """
    with tempfile.TemporaryDirectory() as folder:
        fastdms_peer.write_model(model.cpu(), Path(folder))
        freed()
        for (batch, context), mode in itertools.product(cells, settings.fastdms_modes):
            if batch == "max":
                continue
            source = str(settings.fastdms.resolve())
            cell = fastdms_peer.Cell(source, folder, mode, int(batch), context, settings.cr, settings.seed)
            row = {"cell": f"{batch}x{context}", "batch": int(batch), "largest_batch": False, "context": context}
            yield fastdms_peer.measure(cell, row | {"cr": settings.cr, "fits": True, "mode": mode})


def parse(cell: str) -> tuple[str, int]:
    """BATCHxCONTEXT, as in 8x8192 or maxx32768."""
    batch, _, context = cell.rpartition("x")
    whole = (batch == "max" or batch.isdigit()) and context.isdigit()
    require(whole, "cells", cell, "expected BATCHxCONTEXT, BATCH a number or max")
    return batch, int(context)


def main(settings: Settings) -> None:
    one_of("model", settings.model, tuple(MODELS))
    cells = [parse(cell) for cell in settings.cells]
    on_gpu = settings.device == "cuda"
    memory = settings.memory or (torch.cuda.mem_get_info()[0] if on_gpu else 2**30)
    about = environment() | {"torch": torch.__version__}
    if on_gpu:
        about["device"] = f"1 x gpu {torch.cuda.get_device_name()}"
    unsaid = {"out": None, "fastdms": None}  # places on one machine
    run = {"settings": dataclasses.asdict(settings) | unsaid, "environment": about}
    record = Record(settings.out, run | {"memory_limit": memory})
    model = random_model(MODELS[settings.model], settings.dtype, settings.device, settings.seed)
    for cell in cells:
        for row in rows_of(settings, model, cell, memory):
            record.add(row)
    if settings.fastdms:
        for row in fastdms_rows(settings, model, cells):
            record.add(row)


if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")  # the environment asks jax for its devices; torch has the GPU
    command.run(main, Settings)
