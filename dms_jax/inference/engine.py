"""Many prompts x many chains through a fixed number of rows, with continuous batching.

A prompt is read once and copied to a row for each of its chains as rows become free; a chain that ends gives its row
and its pages back at the next chunk boundary. A chain's tokens depend on its prompt and its key alone.

When the pool runs out nothing is lost: sequences wait for pages, the pool grows up to its limit, and if all wait the
youngest chain is preempted and starts over later, with the same tokens.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dms_jax.config import CacheConfig
from dms_jax.inference import use_counts
from dms_jax.inference.decode import Chunk, DecodeSpec, Started
from dms_jax.inference.runner import Prefilled, Runner
from dms_jax.inference.scheduler import (
    Chain,
    Copy,
    EngineConfig,
    Job,
    PoolError,
    Progress,
    Prompt,
    Result,
    Scheduler,
    finished,
)
from dms_jax.types import Params


class _Read(NamedTuple):
    """Prompts whose counts are still on the device."""

    rows: list[int]
    prompts: list[Prompt]
    made: Prefilled


class _Begun(NamedTuple):
    """Chains whose first tokens are still on the device."""

    rows: list[int]
    chains: list[Chain]
    made: Started


class _Launched(NamedTuple):
    """A chunk on its way, and the chains that were in the rows; `serial` counts chunks."""

    chunk: Chunk
    chains: list[Chain | None]
    serial: int


@dataclass
class Engine:
    """Runs jobs; see the module's docstring. `expected_cr` sizes the first pool; `mesh` is where `params` lie.

    on_tokens(name, chain, tokens): called with the new tokens of a chain after each chunk. A chain that has to start
    over reports its tokens again only from where it was.
    chain_end(tokens, new): asked after each chunk, with a chain's tokens and how many of them are new, whether they
    end it (a stop string, say): how many of them count, or None.
    """

    spec: DecodeSpec
    params: Params
    cache: CacheConfig
    config: EngineConfig = field(default_factory=EngineConfig)
    expected_cr: float = 1.0
    mesh: Mesh | None = None
    on_tokens: Callable[[Any, int, list[int]], None] | None = None
    on_progress: Callable[[Progress], None] | None = None
    chain_end: Callable[[list[int], int], int | None] | None = None
    runner: Runner | None = field(default=None, init=False)  # of the last run

    def run(self, jobs: Iterable[Job], stop: threading.Event | None = None) -> Iterator[Result]:
        """Results as chains finish, in no fixed order. Once `stop` is set it ends at the next chunk boundary.

        jobs: read as rows become free, so they may come from a generator.

        Raises:
          ConfigError: a job that may become longer than the cache's capacity.
          PoolError: one sequence alone needs more than `max_pages`.
        """
        scheduler = self._scheduler(jobs)
        if not scheduler.idle():
            yield from _Run(self, scheduler).results(stop)

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Compiles what `run` will call, as far as it can be foreseen; parameters may be shapes."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.params)
        scheduler = self._scheduler(jobs)
        if not scheduler.idle():
            _Run(replace(self, params=shapes), scheduler)  # without a state on the device

    def _scheduler(self, jobs: Iterable[Job]) -> Scheduler:
        c, config = self.spec.model.config, self.config.on(jax.default_backend())
        return Scheduler(jobs, config, self.cache.capacity, (c.num_layers, c.num_kv_heads))

    def expected(self, length: int) -> int:
        """Live tokens a head of a sequence, with something to spare: heads and chains differ."""
        policy = self.spec.policy
        each = length if policy.max_budget is None else min(length, policy.max_budget)
        return min(length, round(1.25 * each / self.expected_cr) + policy.window + self.cache.page_size)

    def first_pool(self, scheduler: Scheduler) -> int:
        """Pages of each pool at first: what all rows will need if heads compress as expected."""
        prompt, longest = scheduler.longest()
        tokens = np.full(scheduler.live.shape, self.expected(longest))
        tokens[scheduler.max_num_seqs :] = min(prompt, self.expected(prompt) + self.config.prefill_chunk)
        pages = self.config.pages or int(self.spec.kv_cache.pages_needed(tokens).max())
        return min(pages, self.config.max_pages or pages)


class _Run:
    """One call of `Engine.run`: launches work on the runner as the scheduler decides, and collects what it made."""

    def __init__(self, engine: Engine, scheduler: Scheduler):
        self.engine, self.scheduler, self.config = engine, scheduler, scheduler.config
        options = {key: getattr(self.config, key) for key in ("prefill_chunk", "prefill_tokens", "pad_rows")}
        options |= {"max_pages": self.config.max_pages, "mesh": engine.mesh}
        pages = engine.first_pool(scheduler)
        self.runner = engine.runner = Runner(engine.spec, engine.params, len(scheduler.rows), pages, **options)
        if engine.mesh is None and (self.config.pad_rows or 1) >= scheduler.together:  # so many rows, whatever comes
            self.runner.compile(scheduler.lengths, self.config.steps, scheduler.max_num_seqs)
        scheduler.fits = self.runner.fits
        self.depth = int(self.config.lookahead)
        self.logits: dict[int, tuple[Prefilled, int]] = {}  # of the prompt in each parked row
        self.made: list[_Read | _Begun | _Launched] = []  # launched and not looked at, in order
        self.reported: dict[tuple[int, int], int] = {}
        self.serial, self.room_made_at = 0, -1

    def results(self, stop: threading.Event | None) -> Iterator[Result]:
        while not self.scheduler.idle() and not (stop and stop.is_set()):
            self._admit()
            if self.scheduler.running:
                self._launch()
            while sum(isinstance(x, _Launched) for x in self.made) > (self.depth if self.scheduler.running else 0):
                yield from self._collect()
            if not self.scheduler.running:  # a first token may end a chain
                while self.made:
                    yield from self._collect()

    # Launching

    def _admit(self) -> None:
        """Reads prompts into parked rows and starts chains in free rows, as long as both are to be had."""
        scheduler = self.scheduler
        while True:
            copies = scheduler.next_copies()
            if copies:
                self._start(copies)
            batch = scheduler.next_prompts()
            if not batch:
                return
            if not (self._read(batch) or len(batch) > 1 and self._read(scheduler.next_prompts(most=1))):
                if not any(row is not None for row in scheduler.rows):
                    raise self._too_small(scheduler.first_waiting())
                return

    def _read(self, batch: list[tuple[int, Prompt]]) -> bool:
        """Prefills prompts; False, with all as before but these in the queue again, if pages are wanting."""
        rows, prompts = [row for row, _ in batch], [prompt for _, prompt in batch]
        made = self.runner.prefill(
            rows, [p.job.prompt for p in prompts], [p.job.max_new for p in prompts], self.scheduler.bound()
        )
        if made is None:
            self.runner.release(rows)
            self.scheduler.released(rows)
            self.scheduler.requeue(prompts)
            return False
        for n, (row, prompt) in enumerate(batch):
            self.scheduler.prompt_read(row, prompt)
            self.logits[row] = (made, n)
        self.made.append(_Read(rows, prompts, made))
        return True

    def _start(self, copies: list[Copy]) -> None:
        """Starts chains, those of prompts that were read together in one call, as far as there are not too many."""
        of_one_call: dict[int, list[Copy]] = {}
        for copy in copies:
            of_one_call.setdefault(id(self.logits[copy.source][0]), []).append(copy)
        most = self.scheduler.together
        for group in of_one_call.values():
            for start in range(0, len(group), most):
                self._start_together(group[start : start + most])

    def _start_together(self, copies: list[Copy]) -> None:
        prompts = [self.scheduler.prompt_in(copy.source) for copy in copies]
        made, _ = self.logits[copies[0].source]
        which = [self.logits[copy.source][1] for copy in copies]
        keys = np.stack([p.job.keys[copy.number] for p, copy in zip(prompts, copies, strict=True)])
        started = self.runner.fork(made, copies, which, keys, max(len(p.job.prompt) for p in prompts))
        rows = [copy.target for copy in copies]
        self.made.append(_Begun(rows, self.scheduler.chains_started(copies), started))
        emptied = [copy.source for copy in copies if copy.moved]
        self.runner.release(emptied)
        for row in emptied:
            del self.logits[row]

    def _launch(self) -> None:
        chunk = self.runner.decode(self.config.steps, self.scheduler.max_num_seqs)
        self.made.append(_Launched(chunk, self.scheduler.launched(self.config.steps), self.serial))
        self.serial += 1

    # Collecting

    def _collect(self) -> Iterator[Result]:
        """Waits for the oldest thing launched, and takes in what it made."""
        oldest = self.made.pop(0)
        if isinstance(oldest, _Read):
            self._collect_prompts(oldest)
        elif isinstance(oldest, _Begun):
            yield from self._collect_first_tokens(oldest)
        else:
            yield from self._collect_chunk(oldest)

    def _collect_prompts(self, read: _Read) -> None:
        seen, live = np.asarray(read.made.seen), np.asarray(read.made.live)
        for n, (row, prompt) in enumerate(zip(read.rows, read.prompts, strict=True)):
            prompt.reads, prompt.live = seen[n, : len(prompt.job.prompt)], live[row].astype(np.int64)
            if self.scheduler.rows[row] is prompt:
                self.scheduler.live[row] = prompt.live
        for row, chain in enumerate(self.scheduler.rows):
            if isinstance(chain, Chain) and chain.prompt in read.prompts and not chain.tokens:
                self.scheduler.live[row] = chain.prompt.live

    def _collect_first_tokens(self, begun: _Begun) -> Iterator[Result]:
        tokens, done = np.asarray(begun.made.token), np.asarray(begun.made.done)
        ended = []
        for n, (row, chain) in enumerate(zip(begun.rows, begun.chains, strict=True)):
            if self.scheduler.rows[row] is not chain:  # preempted meanwhile
                continue
            chain.tokens.append(int(tokens[n]))
            self._report(chain)
            if done[n]:
                ended.append((row, chain))
        yield from self._end(ended)

    def _collect_chunk(self, launched: _Launched) -> Iterator[Result]:
        chunk: Chunk = jax.tree.map(np.asarray, launched.chunk)
        made, ended, starved = 0, [], []
        for row, chain in enumerate(launched.chains):
            if chain is None or chain.finished or self.scheduler.rows[row] is not chain:
                continue
            took = chunk.active[:, row]
            steps = int(took.sum())
            if steps:
                chain.tokens += chunk.tokens[took, row].tolist()
                chain.held.append(chunk.held[took, row])
                chain.reads.append(chunk.reads[took, row])
                chain.reads_by_head = chain.reads_by_head + chunk.reads_by_head[row]
            self.scheduler.decoded(row, chunk.live[row])
            made += steps
            if self._ends(chain, steps) or chunk.done[row]:  # asked first: a stop may stand before an EOS
                ended.append((row, chain))
            elif not took[-1]:
                starved.append(row)
            self._report(chain)
        yield from self._end(ended, chunk.live)
        self._report_progress(made)
        if starved:
            self._make_room(starved, stuck=made == 0 and launched.serial > self.room_made_at)

    def _ends(self, chain: Chain, steps: int) -> bool:
        """Whether the caller ends a chain that took so many steps; what came after its end is cut off."""
        ask = self.engine.chain_end
        count = ask(chain.tokens, steps + 1) if ask and steps else None
        if count is not None:
            chain.cut(count)
        return count is not None

    def _end(self, ended: list[tuple[int, Chain]], live: np.ndarray | None = None) -> Iterator[Result]:
        """Results of chains that are done; their rows are emptied."""
        for row, chain in ended:
            chain.finished = True
            self.reported.pop((id(chain.job), chain.number), None)  # the next job may have this one's id
            shares = None
            if self.config.retention:
                seen = len(chain.job.prompt) + len(chain.tokens) - 1
                shares = use_counts.live_by_position(self.runner.stored_positions(row), seen)
            by_head = chain.prompt.live if live is None else live[row].astype(np.int64)
            yield finished(chain, (by_head, shares), self.engine.spec.policy.overhead)
        if ended:
            self.scheduler.resume()
            self._release([row for row, _ in ended])

    # Pages

    def _make_room(self, starved: list[int], stuck: bool) -> None:
        before = self.runner.state.cache
        try:
            victim = self.scheduler.make_room(starved, stuck)
        except PoolError as error:
            raise self._too_small(error.args[0]) from None
        if victim is not None:
            self.logits.pop(victim, None)
            self._release([victim])
        if victim is not None or self.runner.state.cache is not before:
            self.room_made_at = self.serial - 1  # chunks already launched had less room

    def _release(self, rows: list[int]) -> None:
        self.runner.release(rows)
        self.scheduler.released(rows)

    def _too_small(self, tokens: int) -> PoolError:
        most, kv_cache = self.config.max_pages or 0, self.engine.spec.kv_cache
        pages = int(kv_cache.pages_needed(np.full((1, *self.scheduler.heads), tokens)).max())
        pool = kv_cache.pool(self.runner.state.cache)
        size = pool.page_bytes if pool else 0
        return PoolError(
            f"max_pages={most}: one sequence of {tokens} tokens needs up to {pages} pages ({pages * size:,} bytes), "
            f"and the pool may hold {most} ({most * size:,} bytes)"
        )

    # Reports

    def _report(self, chain: Chain) -> None:
        if self.engine.on_tokens:
            key = (id(chain.job), chain.number)
            new = chain.tokens[self.reported.get(key, 0) :]
            self.reported[key] = max(self.reported.get(key, 0), len(chain.tokens))
            if new:
                self.engine.on_tokens(chain.job.name, chain.number, new)

    def _report_progress(self, made: int) -> None:
        if self.engine.on_progress:
            kv_cache = self.engine.spec.kv_cache
            used = int(kv_cache.pages_needed(self.scheduler.live).sum())
            pages = kv_cache.parts * kv_cache.pool_size(self.runner.state.cache)
            live = float(self.scheduler.live.sum()) / (self.scheduler.heads[0] * self.scheduler.heads[1])
            self.engine.on_progress(Progress(made, live, used, pages))
