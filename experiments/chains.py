"""Sampling the chains of a table: which sequences run together, how they are judged, what is written down of each.

Chains are nested: a model samples its largest number of chains for a problem once, and smaller numbers are the
first of them. Problems are taken in blocks, every model on one block before the next, so that a run that stops
between blocks has the same problems in every cell. Chains are judged and saved by threads of their own, so that
decoding never waits for a verdict.
"""

import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from dms_jax.config import DMSConfig
from dms_jax.inference import generation, sampling
from dms_jax.inference.engine import Engine
from dms_jax.inference.generation import GenerationConfig
from dms_jax.inference.parallel import run_together
from dms_jax.inference.scheduler import Job, Progress, Result
from experiments.run import Run
from experiments.stops import StopStrings
from experiments.tasks.base import Task
from experiments.tasks.data import Record

PROBLEMS_PER_BLOCK = 32
FINGERPRINTED = 2**20  # parameters with more elements are left out of the fingerprint
JUDGES = max(2, (os.cpu_count() or 2) // 2)  # verdicts at the same time


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How chains are drawn.

    batch_size: sequences decoded together. workers: engines at the same
    time; the programs of a small model keep only one core busy, so on a CPU two take the time of one.
    cache, page_size, quant: how keys and values are stored (`dms_jax.CacheConfig`). stop: strings that end a chain,
    besides the task's own.
    """

    temperature: float
    top_p: float
    batch_size: int
    seed: int
    workers: int = 1
    cache: str = "paged"
    page_size: int = 64
    quant: str = "none"
    stop: tuple[str, ...] = ()


class Model(NamedTuple):
    """A loaded model under one policy, and how many chains it samples for each problem."""

    source: str  # the name that its samples carry
    config: str  # L-W-CR of those samples
    lm: Any
    policy: str
    dms: DMSConfig | None
    chains: int
    max_length: int  # new tokens a chain may have
    eviction: Mapping[str, Any] = MappingProxyType({})  # budget, protect_prompt and evict_every, where it has them


def fingerprint(lm) -> str:
    """A short hash of the configuration and all but the largest parameters: another training gives another."""
    hashed = hashlib.sha256(repr((lm.config, lm.dms, lm.cr)).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(lm.params):
        if leaf.size <= FINGERPRINTED:
            hashed.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return hashed.hexdigest()[:8]


def blocks(problems: int, models: Sequence[Model], batch_size: int) -> Iterator[range]:
    """Ranges of problem numbers, each large enough that no model's batch stays part empty."""
    size = max(PROBLEMS_PER_BLOCK, -(-batch_size // min(model.chains for model in models)))
    for start in range(0, problems, size):
        yield range(start, min(start + size, problems))


class Engines:
    """The engines of models on a task, and the jobs for them; prompts and engines are made once."""

    def __init__(self, task: Task, settings: Sampling):
        self.task, self.settings = task, settings
        self._prompts: dict[int, list[list[int]]] = {}
        self._engines: dict[str, Engine] = {}

    def jobs(self, model: Model, problems: Sequence[int], done: Collection[tuple[str, str, int]] = ()) -> list[Job]:
        """What is missing; prompts of like lengths together, so that several are read in one call."""
        ids = {problem: self.task.records[problem].id for problem in problems}
        chains = {p: [c for c in range(model.chains) if (model.source, ids[p], c) not in done] for p in problems}
        missing = {problem: numbers for problem, numbers in chains.items() if numbers}
        if not missing:
            return []
        pairs = np.array([(problem, chain) for problem, numbers in missing.items() for chain in numbers])
        keys = np.asarray(sampling.chain_keys(self.settings.seed, pairs[:, 0], pairs[:, 1]))  # in one call: it is slow
        prompts = self.prompts(model)
        jobs = [
            Job(prompts[problem], keys[pairs[:, 0] == problem], model.max_length, (problem, numbers))
            for problem, numbers in missing.items()
        ]
        return sorted(jobs, key=lambda job: (len(job.prompt), job.name))

    def prompts(self, model: Model) -> list[list[int]]:
        """The prompts of all problems for this model's tokenizer; models under several policies share them."""
        key = id(model.lm.tokenizer)
        if key not in self._prompts:
            texts = [self.task.prompt(record, model.lm.tokenizer) for record in self.task.records]
            self._prompts[key] = generation.encode(model.lm, texts)
        return self._prompts[key]

    def stops(self, model: Model) -> StopStrings:
        tokenizer = model.lm.tokenizer
        return StopStrings(tokenizer, (*self.task.stops(tokenizer), *self.settings.stop))

    def engine(self, model: Model, on_progress: Callable[[Progress], None] | None = None) -> Engine:
        if model.source not in self._engines:
            self._engines[model.source] = self._build(model, on_progress)
        return self._engines[model.source]

    def prepare(self, model: Model, problems: Sequence[int]) -> None:
        """Compiles what sampling will call; the model's parameters may be shapes."""
        self._build(model, None).prepare(self.jobs(model, problems))

    def _build(self, model: Model, on_progress: Callable[[Progress], None] | None) -> Engine:
        s = self.settings
        longest = max(len(prompt) for prompt in self.prompts(model))
        stops = self.stops(model)
        config = GenerationConfig(
            policy=model.policy,
            dms=model.dms,
            **model.eviction,
            temperature=s.temperature,
            top_p=s.top_p,
            cache=s.cache,
            page_size=s.page_size,
            quant=s.quant,
            max_num_seqs=s.batch_size,
        )
        ends = {"chain_end": stops.chain_end} if stops.strings else {}
        return generation.build(model.lm, longest + model.max_length, config, on_progress=on_progress, **ends)


class Sampler:
    """Samples what is missing from a run, block by block; leaving its context waits for the last verdicts."""

    def __init__(
        self,
        run: Run,
        engines: Engines,
        on_progress: Callable[[Progress], None],
        on_saved: Callable[[int], None],
    ):
        self.run = run
        self.engines = engines
        self.on_progress = on_progress  # called by any worker
        self.on_saved = on_saved  # with the number of chains in the run, by any judge
        self.done = {(s["source"], s["id"], s["chain"]) for s in run.samples}
        self._judges = ThreadPoolExecutor(JUDGES, "judge")
        self._lock = threading.Lock()
        self._verdicts: list[Future] = []

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # After an error or Ctrl-C the chains that are being judged are still saved, those that wait are not.
        self._judges.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._raise_errors()

    def sample_block(self, models: Sequence[Model], problems: Sequence[int]) -> None:
        """Every chain of every model on these problems; each is judged and saved as it ends."""
        work = [(model, jobs) for model in models if (jobs := self.engines.jobs(model, problems, self.done))]
        for model, result in self._results(work):
            row, record = self._row(model, result), self.engines.task.records[result.name[0]]
            self.done.add((row["source"], row["id"], row["chain"]))
            self._verdicts.append(self._judges.submit(self._save, row, record))
            self._raise_errors()

    def _save(self, row: dict, record: Record) -> None:
        """Judges a chain and writes it down; runs in a thread of the judges."""
        verdict = self.engines.task.verdict(record, row["text"])
        with self._lock:
            self.run.append([{**row, "answer": verdict.answer, "correct": verdict.correct}])
            self.on_saved(len(self.run.samples))

    def _raise_errors(self) -> None:
        for verdict in [future for future in self._verdicts if future.done()]:
            self._verdicts.remove(verdict)
            verdict.result()

    def _results(self, work: list[tuple[Model, list[Job]]]) -> Iterator[tuple[Model, Result]]:
        """Results as they come; the models with most chains start first."""
        work = sorted(work, key=lambda item: -item[0].chains)
        engines = [(self.engines.engine(model, self.on_progress), jobs) for model, jobs in work]
        if engines:
            yield from ((work[n][0], result) for n, result in run_together(engines, self.engines.settings.workers))

    def _row(self, model: Model, result: Result) -> dict:
        """A line of samples.jsonl, but for the verdict."""
        problem, missing = result.name
        record, tokens = self.engines.task.records[problem], result.tokens
        stops = self.engines.stops(model)
        text = stops.cut(model.lm.tokenizer.decode(tokens, skip_special_tokens=True))
        return {
            "id": record.id,
            "chain": missing[result.chain],
            "source": model.source,
            "config": model.config,
            "policy": model.policy,
            "text": text,
            "prompt_tokens": len(self.engines.prompts(model)[problem]),
            "tokens": len(tokens),
            "finished": tokens[-1] in model.lm.config.eos_ids or stops.ended(tokens),
            "answer": None,
            "gold": record.answer,
            "correct": False,
            **result.use._asdict(),
            "live_by_head": result.by_head.live.tolist(),
            "reads_by_head": result.by_head.kv_reads.tolist(),
        }
