"""Many prompts x many chains through a fixed number of rows, with continuous batching.

The rows of a DecodeState are `max_num_seqs` rows that decode and a few parked rows behind them. A prompt is read
once, into a parked row, and copied to a row for each of its chains as rows become free; a chain that ends gives its row and its
pages back at the next chunk boundary. A chain's tokens depend on its prompt and its key alone.

When the pool runs out nothing is lost: sequences wait for pages, the pool grows up to its limit, and if all wait the
youngest chain starts over later, with the same tokens.
"""

import collections
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from dms_jax.cache import fitted
from dms_jax.config import CacheConfig, require
from dms_jax.inference import decode
from dms_jax.inference import use_counts as metrics
from dms_jax.inference.decode import DecodeSpec
from dms_jax.inference.jobs import EngineConfig, Job, PoolError, Progress, Result
from dms_jax.types import Params

BUCKET = 64  # prompt lengths and capacities are rounded up to this, so that few shapes are compiled
PARKED = 8  # prompts read in one call, at most


@dataclass
class _Chain:
    """A chain in a row, and what it has done so far."""

    job: Job
    number: int
    age: int  # chains are numbered as they start
    prompt_reads: np.ndarray
    tokens: list[int]
    live: list[np.ndarray]  # [n, L, K] pieces
    reads: list[np.ndarray]
    over: bool = False  # ended by the caller, not by a stop token

    def cut(self, count: int) -> None:
        """Ends the chain with its first `count` tokens; what came after them is not counted."""
        self.tokens = self.tokens[:count]
        self.live = [np.concatenate(self.live)[:count]]
        self.reads = [np.concatenate(self.reads)[: count - 1]]
        self.over = True


@dataclass
class _Prompt:
    """A prompt in a parked row, and the chains that are still to start."""

    job: Job
    waiting: list[int]
    reads: np.ndarray  # [T]
    logits: Array  # [V]
    live: np.ndarray  # [L, K]


def round_up(n: int) -> int:
    return -(-n // BUCKET) * BUCKET


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

    def run(self, jobs: Iterable[Job], stop: threading.Event | None = None) -> Iterator[Result]:
        """Results as chains finish, in no fixed order. Once `stop` is set it ends at the next chunk boundary.

        Raises:
          ConfigError: a job that may become longer than the cache's capacity; nothing has run then.
          PoolError: one sequence alone needs more than `max_pages`.
        """
        self._todo = collections.deque((job, list(range(len(job.keys)))) for job in jobs)
        if not self._todo:
            return
        longest = max(len(job.prompt) + job.max_new for job, _ in self._todo)
        require(longest <= self.cache.capacity, "capacity", self.cache.capacity, f"a job may make {longest} tokens")
        chains = sum(len(waiting) for _, waiting in self._todo)
        self._slots = min(self.config.max_num_seqs, chains)
        parked = min(PARKED, self._slots, len(self._todo))
        self._rows: list[_Chain | _Prompt | None] = [None] * (self._slots + parked)
        self._hold, self._age, self._reported = False, 0, collections.Counter()
        dtype = self.params["embed"]["embedding"].dtype
        self._state = self._call(decode.init, self.spec, len(self._rows), dtype, self._first_pool())
        self._live = np.zeros((len(self._rows), *self._heads), np.int64)
        while (self._todo or any(self._rows)) and not (stop and stop.is_set()):
            self._admit()
            yield from self._finished()  # a first token may already end a chain
            if any(self._rows[: self._slots]):
                self._decode()
                yield from self._finished()

    @property
    def _heads(self) -> tuple[int, int]:
        c = self.spec.model.config
        return c.num_layers, c.num_kv_heads

    # The pool

    def _first_pool(self) -> int:
        """Pages of each pool at first: what all rows will need if heads compress as expected."""
        longest = max(len(job.prompt) + job.max_new for job, _ in self._todo)
        prompt = max(len(job.prompt) for job, _ in self._todo)
        tokens = np.full((len(self._rows), *self._heads), self.expected(longest))
        tokens[self._slots :] = min(prompt, self.expected(prompt) + self.config.prefill_chunk)
        pages = self.config.pages or int(self.spec.storage.pages(tokens).max())
        return min(pages, self.config.max_pages or pages)

    def expected(self, length: int) -> int:
        """Live tokens a head of a sequence, with something to spare: heads and chains differ."""
        policy = self.spec.policy
        each = length if policy.budget is None else min(length, policy.budget)
        return min(length, round(1.25 * each / self.expected_cr) + policy.window + self.cache.page_size)

    def _after(self, rows, more: int | np.ndarray) -> np.ndarray:
        """Live tokens of all rows once these have `more` in every head, if every one stays."""
        live = self._live.copy()
        live[rows] += more
        return live

    def _ensure(self, live: np.ndarray) -> bool:
        """Whether the pools hold so many tokens `[rows, L, K]`, after growing if they may grow."""
        cache = self._call(fitted, self.spec.storage, self._state.cache, live, self.config.max_pages)
        if cache is None:
            return False
        self._state = self._state._replace(cache=cache)
        return True

    def _too_small(self, tokens: int) -> PoolError:
        most, storage = self.config.max_pages, self.spec.storage
        pages = int(storage.pages(np.full((1, *self._heads), tokens)).max())
        size = storage.pool(self._state.cache).page_bytes
        return PoolError(
            f"max_pages={most}: one sequence of {tokens} tokens needs up to {pages} pages ({pages * size:,} bytes), "
            f"and the pool may hold {most} ({most * size:,} bytes)"
        )

    # Prompts come in

    def _admit(self) -> None:
        """Reads prompts into parked rows and starts chains in free rows, as long as both are to be had."""
        while True:
            self._start_chains()
            parked = [r for r in range(self._slots, len(self._rows)) if self._rows[r] is None]
            running = sum(row is not None for row in self._rows[: self._slots])
            if not self._todo or not parked or running == self._slots or self._hold and running:
                return
            if not (self._read_prompts(parked) or self._read_prompts(parked[:1])):
                if not any(self._rows):
                    raise self._too_small(len(self._todo[0][0].prompt) + self._todo[0][0].max_new)
                return

    def _read_prompts(self, rows: list[int]) -> bool:
        """Prefills the next prompts of one bucket of lengths; False, with all as before, if pages are wanting."""
        length = round_up(len(self._todo[0][0].prompt))
        batch = []
        while self._todo and len(batch) < len(rows) and round_up(len(self._todo[0][0].prompt)) == length:
            batch.append(self._todo.popleft())
        A = 1 << (len(batch) - 1).bit_length()  # few batch sizes, so that few programs are compiled
        rows = rows[: len(batch)]
        padded = np.array(rows + [len(self._rows)] * (A - len(batch)))
        tokens = np.zeros((A, length), np.int32)
        counts = np.zeros(A, np.int32)
        max_new = np.ones(A, np.int32)
        for n, (job, _) in enumerate(batch):
            counts[n], max_new[n] = len(job.prompt), job.max_new
            tokens[n, : counts[n]] = job.prompt
        read = self._prefill(padded, tokens, counts, max_new)
        if read is None:
            self._release(rows)
            self._todo.extendleft(reversed(batch))
            return False
        logits, seen = read
        for n, (row, (job, waiting)) in enumerate(zip(rows, batch, strict=True)):
            self._rows[row] = _Prompt(job, waiting, seen[n, : counts[n]], logits[n], self._live[row].copy())
        return True

    def _prefill(self, rows, tokens, counts, max_new):
        """Chunk by chunk; logits `[A, V]` and what each token saw `[A, T]`, or None if the pool is too small."""
        C, real = self.config.prefill_chunk, rows[rows < len(self._rows)]
        keys = np.zeros((len(rows), 2), np.uint32)  # what is drawn here is not used: every chain draws for itself
        logits, seen = None, []
        for start in range(0, tokens.shape[1], C):
            part = tokens[:, start : start + C]
            count = np.clip(counts - start, 0, part.shape[1])
            if not self._ensure(self._after(real, count[: len(real), None, None])):
                return None
            width = min(round_up(int(self._live[real].max())), self.spec.storage.slots)
            self._state, new, saw = self._call(
                decode.prefill, self.spec, self.params, self._state, rows, part, count, max_new, keys, width
            )
            logits = new if logits is None else np.where(count[:, None] > 0, new, logits)
            seen.append(saw)
            self._look_at_live()
        return logits, np.concatenate(seen, axis=1)

    def _start_chains(self) -> None:
        """Copies parked prompts into free rows; the last chain of a prompt takes over what its row holds."""
        free = [r for r in range(self._slots) if self._rows[r] is None]
        moves: list[tuple[int, int, int]] = []  # parked row, row, chain
        for source in range(self._slots, len(self._rows)):
            prompt = self._rows[source]
            while prompt and prompt.waiting and len(moves) < len(free):
                if not self._room_for_copy(moves, source):
                    if moves or len(free) < self._slots:
                        break
                    # No room for a copy although nothing runs: one chain goes on alone, the others read again later.
                    self._todo.appendleft((prompt.job, prompt.waiting[1:]))
                    del prompt.waiting[1:]
                moves.append((source, free[len(moves)], prompt.waiting.pop(0)))
        if moves:
            self._fork(moves)

    def _room_for_copy(self, moves, source: int) -> bool:
        """Whether the pool has pages for the copies planned and one of `source`, which may be a move."""
        rows = [parked for n, (parked, _, _) in enumerate(moves) if not self._moves(moves, n)]
        rows += [source] * (len(self._rows[source].waiting) > 1)
        return self._ensure(np.concatenate([self._live, self._live[rows]]))

    def _moves(self, moves, n: int) -> bool:
        """Whether the n-th of the moves planned is its prompt's last chain."""
        parked = moves[n][0]
        return not self._rows[parked].waiting and all(later[0] != parked for later in moves[n + 1 :])

    def _fork(self, moves) -> None:
        A, rows = self._slots, len(self._rows)  # one shape: padding costs nothing
        source, target = np.full(A, rows), np.full(A, rows)
        moved, keys = np.zeros(A, bool), np.zeros((A, 2), np.uint32)
        logits = np.zeros((A, self.spec.model.config.vocab_size), np.float32)
        for n, (parked, row, chain) in enumerate(moves):
            source[n], target[n], moved[n] = parked, row, self._moves(moves, n)
            logits[n] = self._rows[parked].logits
            keys[n] = self._rows[parked].job.keys[chain]
        width = round_up(int(max(self._rows[parked].live.max() for parked, _, _ in moves)))
        width = min(width, self.spec.storage.slots)
        self._state = self._call(decode.fork, self.spec, self._state, logits, source, target, moved, keys, width)
        first = np.asarray(self._state.token)
        for parked, row, number in moves:
            prompt: _Prompt = self._rows[parked]
            self._age += 1
            chain = _Chain(prompt.job, number, self._age, prompt.reads, [int(first[row])], [prompt.live[None]], [])
            self._rows[row], self._live[row] = chain, prompt.live
            self._report(chain)
        self._release([r for r in range(self._slots, rows) if self._rows[r] and not self._rows[r].waiting])

    # Chunks

    def _decode(self) -> None:
        """One chunk of steps for all rows that decode."""
        self._state, chunk = self._call(
            decode.decode_chunk, self.spec, self.params, self._state, self.config.steps, self._slots
        )
        chunk = jax.tree.map(np.asarray, chunk)
        self._look_at_live()
        made = 0
        for row, chain in enumerate(self._rows[: self._slots]):
            if chain is None:
                continue
            took = chunk.active[:, row]
            live = chunk.live[took, row]
            chain.tokens += chunk.tokens[took, row].tolist()
            chain.live.append(live)
            chain.reads.append(live if chunk.reads is None else chunk.reads[took, row])
            made += int(took.sum())
            if self.chain_end and (count := self.chain_end(chain.tokens, int(took.sum()) + 1)) is not None:
                chain.cut(count)
            self._report(chain)
        self._report_progress(made)
        over = np.array([bool(chain and chain.over) for chain in self._rows[: self._slots]])
        starved = ~np.asarray(self._state.done)[: self._slots] & ~chunk.active[-1] & ~over
        if starved.any():
            self._find_room(np.flatnonzero(starved), stuck=made == 0)

    def _find_room(self, rows: np.ndarray, stuck: bool) -> None:
        """Grows the pool for rows that could not step; where it cannot grow and nothing moves, one starts over."""
        if any(self._ensure(self._after(rows, more)) for more in (self.config.steps, 1)):
            return
        if not stuck:
            return
        parked = [r for r in range(self._slots, len(self._rows)) if self._rows[r]]
        running = [r for r in range(self._slots) if self._rows[r]]
        if parked:  # a prompt is the cheapest to read again
            victim = parked[-1]
            self._todo.appendleft((self._rows[victim].job, self._rows[victim].waiting))
        elif len(running) > 1:
            victim = max(running, key=lambda r: self._rows[r].age)
            self._todo.appendleft((self._rows[victim].job, [self._rows[victim].number]))
        else:
            chain = self._rows[running[0]]
            raise self._too_small(len(chain.job.prompt) + chain.job.max_new)
        self._hold = True
        self._release([victim])

    def _finished(self) -> Iterator[Result]:
        """Results of the chains that are done; their rows are emptied."""
        done = np.asarray(self._state.done)
        rows = [r for r in range(self._slots) if self._rows[r] and (done[r] or self._rows[r].over)]
        results = [self._result(row) for row in rows]
        if rows:
            self._hold = False
            self._release(rows)
        yield from results

    def _result(self, row: int) -> Result:
        chain: _Chain = self._rows[row]
        live = np.concatenate(chain.live)
        reads = np.concatenate([*chain.reads, np.zeros((0, *self._heads), live.dtype)])
        seen = len(chain.prompt_reads) + len(live) - 1
        shares = None
        if self.config.retention:
            pos = np.asarray(self._call(decode.stored_positions, self.spec, self._state, np.int32(row)))
            shares = metrics.live_by_position(pos, seen)
        by_head = metrics.HeadUse(reads.sum(axis=0, dtype=np.int64), live[-1], seen, shares)
        use = metrics.cache_use(chain.prompt_reads, live, reads)
        return Result(chain.job.name, chain.number, chain.tokens, use, by_head)

    # Small things

    def _call(self, function, *arguments):
        """Everything that runs on the devices goes through here: under the mesh, where there is one."""
        if self.mesh is None:
            return function(*arguments)
        with jax.set_mesh(self.mesh):
            return function(*arguments)

    def _release(self, rows: list[int]) -> None:
        if not rows:
            return
        flags = np.zeros(len(self._rows), bool)
        flags[rows] = True
        self._state = self._call(decode.release, self.spec, self._state, flags)
        self._live[rows] = 0
        for row in rows:
            self._rows[row] = None

    def _look_at_live(self) -> None:
        self._live = np.asarray(self._call(decode.live_tokens, self.spec, self._state)).astype(np.int64)

    def _report(self, chain: _Chain) -> None:
        if self.on_tokens:
            key = (id(chain.job), chain.number)
            new = chain.tokens[self._reported[key] :]
            self._reported[key] = max(self._reported[key], len(chain.tokens))
            if new:
                self.on_tokens(chain.job.name, chain.number, new)

    def _report_progress(self, made: int) -> None:
        if self.on_progress:
            used = pages = 0
            if self.spec.storage.pool:
                pool = self.spec.storage.pool(self._state.cache)
                pages = len(pool.free) * pool.size
                used = pages - int(pool.free.sum())
            live = float(self._live.sum()) / (self._heads[0] * self._heads[1])
            self.on_progress(Progress(made, live, used, pages))
