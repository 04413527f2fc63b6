"""Sampling the chains of a table: which sequences run together, and what is written down of each.

Chains are nested: a model samples its largest number of chains for a problem once, and smaller numbers are the
first of them. Problems are taken in blocks, every model on one block before the next, so that a run that stops
between blocks has the same problems in every cell.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from dms_jax import decode, sampling
from dms_jax.config import DMSConfig
from experiments.run import Run
from experiments.tasks.base import Task, judge

PROBLEMS_PER_BLOCK = 16
FINGERPRINTED = 2**20  # parameters with more elements are left out of the fingerprint
COUNTS = ("kv_reads", "prefill_reads", "peak_tokens", "achieved_cr")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How chains are drawn.

    max_length: new tokens a chain may have. batch_size: sequences in one call. workers: calls at the same time;
    the programs of a small model keep only one core busy, so on a CPU two calls take the time of one.
    """

    max_length: int
    temperature: float
    top_p: float
    batch_size: int
    seed: int
    workers: int = 1


class Model(NamedTuple):
    """A loaded model under one policy, and how many chains it samples for each problem."""

    source: str  # the name that its samples carry
    config: str  # L-W-CR of those samples
    lm: Any
    policy: str
    dms: DMSConfig | None
    chains: int


class Job(NamedTuple):
    """One sequence to sample: the number of a problem in its task, and the chain's."""

    problem: int
    chain: int


def fingerprint(lm) -> str:
    """A short hash of the configuration and all but the largest parameters: another training gives another."""
    hashed = hashlib.sha256(repr((lm.config, lm.dms)).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(lm.params):
        if leaf.size <= FINGERPRINTED:
            hashed.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return hashed.hexdigest()[:8]


def blocks(problems: int, models: Sequence[Model], batch_size: int) -> Iterator[range]:
    """Ranges of problem numbers, each large enough that no model's batch stays part empty."""
    size = max(PROBLEMS_PER_BLOCK, -(-batch_size // min(model.chains for model in models)))
    for start in range(0, problems, size):
        yield range(start, min(start + size, problems))


class Sampler:
    """Samples what is missing from a run, block by block."""

    def __init__(self, run: Run, task: Task, settings: Sampling, on_tokens: Callable[[int], None]):
        self.run = run
        self.task = task
        self.settings = settings
        self.on_tokens = on_tokens  # called with numbers of new tokens while they are made, by any worker
        self.done = {(s["source"], s["id"], s["chain"]) for s in run.samples}
        self._prompts: dict[tuple[str, int], list[int]] = {}

    def sample_block(self, models: Sequence[Model], problems: Sequence[int]) -> None:
        """Every chain of every model on these problems; each group of sequences is saved as it ends.

        Of a group with chains missing, all run again: so a chain sees the same batch as in a run in one go.
        """
        groups = [
            (model, group)
            for model in models
            for group in self._groups(model, problems)
            if any(self._key(model, job) not in self.done for job in group)
        ]
        for (model, group), out in zip(groups, self._generated(groups), strict=True):
            # Judged here, not by a worker: math-verify's time limit works in the main thread only.
            rows = [self._row(model, job, n, out) for n, job in enumerate(group)]
            keys = [self._key(model, job) for job in group]
            self.run.append([row for key, row in zip(keys, rows, strict=True) if key not in self.done])
            self.done.update(keys)

    def _generated(self, groups: list[tuple[Model, list[Job]]]) -> Iterator[decode.Output]:
        """The output of each group, in order."""
        if self.settings.workers == 1 or not groups:
            yield from itertools.starmap(self._generate, groups)
            return
        executor = ThreadPoolExecutor(self.settings.workers)
        try:
            yield from executor.map(self._generate, *zip(*groups, strict=True))
        finally:
            executor.shutdown(cancel_futures=True)

    def _key(self, model: Model, job: Job) -> tuple[str, str, int]:
        return model.source, self.task.records[job.problem].id, job.chain

    def _groups(self, model: Model, problems: Sequence[int]) -> Iterator[list[Job]]:
        """Batches of jobs with prompts of like lengths together: they pad little and end at like times."""
        jobs = [Job(problem, chain) for problem in problems for chain in range(model.chains)]
        jobs.sort(key=lambda job: (len(self._prompt(model, job.problem)), job))
        for start in range(0, len(jobs), self.settings.batch_size):
            yield jobs[start : start + self.settings.batch_size]

    def _prompt(self, model: Model, problem: int) -> list[int]:
        key = (model.source, problem)
        if key not in self._prompts:
            text = self.task.prompt(self.task.records[problem], model.lm.tokenizer)
            (self._prompts[key],) = decode.encode(model.lm, [text])
        return self._prompts[key]

    def _generate(self, model: Model, group: list[Job]) -> decode.Output:
        s = self.settings
        # The last group is filled up with copies, whose results are not used: one batch size compiles once.
        padded = group + [group[-1]] * (s.batch_size - len(group))
        return decode.generate(
            model.lm,
            [self._prompt(model, job.problem) for job in padded],
            max_new_tokens=s.max_length,
            temperature=s.temperature,
            top_p=s.top_p,
            policy=model.policy,
            dms=model.dms,
            keys=sampling.chain_keys(s.seed, *np.array(padded).T),
            on_chunk=lambda tokens, active: self.on_tokens(int(active[:, : len(group)].sum())),
        )

    def _row(self, model: Model, job: Job, n: int, out: decode.Output) -> dict:
        record = self.task.records[job.problem]
        text, tokens = out.text[n][0], out.tokens[n][0]
        verdict = judge(text, record.answer)
        return {
            "id": record.id,
            "chain": job.chain,
            "source": model.source,
            "config": model.config,
            "policy": model.policy,
            "text": text,
            "prompt_tokens": len(self._prompt(model, job.problem)),
            "tokens": len(tokens),
            "finished": tokens[-1] in model.lm.config.eos_ids,
            "answer": verdict.answer,
            "gold": record.answer,
            "correct": verdict.correct,
            **{field: float(getattr(out, field)[n, 0]) for field in COUNTS},
        }
