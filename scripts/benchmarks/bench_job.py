"""Tokens per second of a whole `generate`, of its decode steps alone, and where the time between the two goes.

examples:
  python -m scripts.benchmarks.bench_job                                        (the mini model, for a CPU)
  python -m scripts.benchmarks.bench_job --model qwen.gguf --prompts 256 --max-num-seqs 256 --profile
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

import dms_jax
from dms_jax.config import ModelConfig
from dms_jax.config_files import load_yaml
from dms_jax.inference import generation, sampling
from dms_jax.inference.generation import GenerationConfig
from dms_jax.inference.runner import Runner
from dms_jax.inference.scheduler import EngineConfig, Job
from dms_jax.models import transformer
from experiments.run import environment, write_json
from scripts import command
from scripts.benchmarks.device_events import covered, recorded


@dataclass(frozen=True)
class Settings:
    """What to measure.

    model, dtype, gate, cr, policy: as for `dms_jax.load` and `generate`; or a YAML file of configs/models, whose
      weights are random.
    prompts, prompt_length, max_new_tokens: random token ids, and no stop token.
    steps: of a chunk. rounds: timed calls, after one that compiles.
    profile: also read the device's own record of one call.
    out: JSON file for the results.
    """

    model: str = "mini"
    dtype: str = "float32"
    gate: str | None = None
    cr: float | None = None
    policy: str | None = None
    prompts: int = 32
    prompt_length: int = 100
    max_new_tokens: int = 128
    max_num_seqs: int = 32
    temperature: float = 0.6
    top_p: float = 0.95
    steps: int = 16
    prefill_tokens: int | None = None
    rounds: int = 3
    profile: bool = False
    out: Path | None = None


def load(settings: Settings) -> dms_jax.LM:
    if not settings.model.endswith(".yaml"):
        return dms_jax.load(settings.model, dtype=settings.dtype, gate=settings.gate, cr=settings.cr)
    config = load_yaml(ModelConfig, settings.model)

    def random(key):
        return jax.tree.map(lambda x: x.astype(settings.dtype), transformer.init(key, config))

    return dms_jax.LM(config, jax.jit(random)(jax.random.key(0)))


def engine_of(settings: Settings, lm, length: int) -> generation.Engine:
    engine = EngineConfig(settings.max_num_seqs, settings.steps, prefill_tokens=settings.prefill_tokens)
    config = GenerationConfig(
        temperature=settings.temperature, top_p=settings.top_p, stop=(), policy=settings.policy, engine=engine
    )
    return generation.build(lm, length, config)


def whole_job(engine, jobs: list[Job]) -> tuple[float, int]:
    """Seconds and tokens of one run of all jobs."""
    begun = time.perf_counter()
    tokens = sum(len(result.tokens) for result in engine.run(jobs))
    return time.perf_counter() - begun, tokens


def steps_alone(settings: Settings, engine, jobs: list[Job]) -> tuple[float, float]:
    """Seconds of a decode step with all rows running, halfway through the job, and of reading all prompts."""
    rows = min(settings.max_num_seqs, len(jobs))
    model, kv_cache = engine.spec.model.config, engine.spec.kv_cache
    live = np.zeros((rows, model.num_layers, model.num_kv_heads), np.int64)
    pages = int(kv_cache.pages_needed(live + settings.prompt_length + settings.max_new_tokens).max())
    runner = Runner(engine.spec, engine.params, rows, pages)
    size, seconds = max(1, min(rows, (settings.prefill_tokens or 8192) // settings.prompt_length)), 0.0
    for round_ in range(2):  # the first compiles
        begun = time.perf_counter()
        for start in range(0, rows, size):
            group = list(range(start, min(start + size, rows)))
            prompts = [jobs[n].prompt for n in group]
            runner.prefill(group, prompts, [settings.max_new_tokens] * len(group), live)
        jax.block_until_ready(runner.state)
        seconds = time.perf_counter() - begun
        if round_ == 0:
            runner.release(list(range(rows)))
            live[:] = 0
    times = []
    for _ in range(max(2, settings.max_new_tokens // settings.steps - 1)):
        begun = time.perf_counter()
        chunk = runner.decode(settings.steps)
        assert np.asarray(chunk.active).all()
        times.append((time.perf_counter() - begun) / settings.steps)
    return float(np.median(times[1:])), seconds * len(jobs) / rows


def device_record(call) -> dict:
    """What the device did while `call` ran: the share of time in which it was busy, and its longest operations."""
    wall, by_name = 0.0, collections.Counter()

    def timed() -> None:
        nonlocal wall
        begun = time.perf_counter()
        call()
        wall = time.perf_counter() - begun

    events = recorded(timed)
    for event in events:
        by_name[event.name] += event.end - event.start
    busy = covered((event.start, event.end) for event in events)
    longest = {name: ns / 1e9 for name, ns in by_name.most_common(40)}
    return {"wall_seconds": wall, "busy_seconds": busy / 1e9, "operations": len(events), "longest": longest}


def main(settings: Settings) -> dict:
    phases, begun = {}, time.perf_counter()

    @contextlib.contextmanager
    def phase(name: str):
        start = time.perf_counter()
        yield
        phases[name] = time.perf_counter() - start
        print(f"{name}: {phases[name]:.2f} s", flush=True)

    with phase("load"):
        lm = load(settings)
        jax.block_until_ready(lm.params)
    rng = np.random.default_rng(0)
    prompts = rng.integers(5, lm.config.vocab_size - 5, (settings.prompts, settings.prompt_length)).tolist()
    keys = np.asarray(sampling.sequence_keys(0, len(prompts), 1))
    jobs = [Job(prompt, keys[n : n + 1], settings.max_new_tokens, n) for n, prompt in enumerate(prompts)]
    engine = engine_of(settings, lm, settings.prompt_length + settings.max_new_tokens)
    with phase("first call"):
        whole_job(engine, jobs)
    with phase("timed calls"):
        calls = [whole_job(engine, jobs) for _ in range(settings.rounds)]
    step, prefill = steps_alone(settings, engine, jobs)
    rate = float(np.median([tokens / seconds for seconds, tokens in calls]))
    rows = min(settings.max_num_seqs, len(jobs))
    record = {
        "settings": {**dataclasses.asdict(settings), "out": None},
        "environment": environment(),
        "model_sha256": hashlib.sha256(Path(settings.model).read_bytes()).hexdigest()
        if Path(settings.model).is_file()
        else None,
        "phases": {**phases, "until_first_call": time.perf_counter() - begun},
        "seconds": [seconds for seconds, _ in calls],
        "tokens_per_second": rate,
        "step_seconds": step,
        "step_tokens_per_second": rows / step,
        "prefill_seconds": prefill,
        "job_over_step": rate / (rows / step),
    }
    if settings.profile:
        record["profile"] = device_record(lambda: whole_job(engine, jobs))
    print(json.dumps({k: v for k, v in record.items() if k not in ("environment", "settings")}, indent=1))
    if settings.out:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(settings.out, record)
    return record


if __name__ == "__main__":
    command.run(main, Settings)
