"""The host's side of an engine, without JAX: which prompts are read, which chains run in which rows, what is preempted.

Rows `0 .. max_num_seqs - 1` decode; the parked rows behind them hold prompts that were read and whose chains are still
to start. A prompt is read once, into a parked row, and copied to a row for each of its chains as rows become free.
Pages are counted in numbers of live tokens `[rows, L, K]`; whether so many fit, and growing the pool, is a function
that the scheduler is given.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt32

from dms_jax.config import Size, check, require
from dms_jax.inference import use_counts

TOGETHER = 64  # prompts are read, and chains started, in one call at most (more where they are padded to more)
BUCKET = 64  # capacities and widths are rounded up to this, so that few shapes are compiled


def round_up(n: int) -> int:
    return -(-n // BUCKET) * BUCKET


def padded_length(tokens: int, chunk: int) -> int:
    """The length to which a prompt is padded: whole chunks, and a rest that is a power of two (from 64)."""
    whole, rest = tokens // chunk * chunk, tokens % chunk
    return whole + (min(chunk, max(BUCKET, 1 << (rest - 1).bit_length())) if rest else 0)


def padded_count(count: int, most: int, smallest: int = 1) -> int:
    """The number of rows to which `count` are padded: `smallest` times a power of four, or `most`.

    Where compiling a program costs more than empty rows, as on an accelerator, `smallest` is large.
    """
    size = smallest
    while size < count:
        size *= 4
    return min(size, most)


class PoolError(RuntimeError):
    """A single sequence does not fit into the largest pool allowed; the message says what it needed."""


class Job(NamedTuple):
    """A prompt and the chains that continue it."""

    prompt: list[int]
    keys: UInt32[np.ndarray, "W 2"]  # a raw random key for each chain
    max_new: int
    name: Any = None  # whatever the caller knows it by


class Result(NamedTuple):
    """A finished chain: which it was, its new tokens (the stop token included) and what it cost."""

    name: Any
    chain: int
    tokens: list[int]
    use: use_counts.CacheUse
    by_head: use_counts.HeadUse


class Progress(NamedTuple):
    """After each chunk: tokens made in it, and what the cache holds now."""

    new_tokens: int
    live_tokens: float  # of all rows, averaged over layers and KV heads
    pages_used: int
    pages: int


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs; none of it changes a chain's tokens.

    max_num_seqs: sequences decoded at the same time.
    steps: decode steps of a chunk, between two looks from the host.
    prefill_chunk: prompt tokens of a sequence that are read at once; prefill_tokens: of all sequences together, None
      for 8,192 on accelerators and 512 on a CPU.
    pad_rows: prompts and chains that start together are padded to so many rows, or to four times as many and so on,
      None for 64 on accelerators and 1 on a CPU: every number of rows is a program to compile. Long prompts, of which
      prefill_tokens lets fewer together, are padded to no more.
    lookahead: whether the next chunk is launched before the last one's results are looked at, so that the device
      never waits for the host; a chain that has ended then idles for one more chunk. None: on accelerators.
    pages: pages of the pool (of each device's) at first, None for an estimate from the compression expected.
    max_pages: how far it may grow, None for no limit.
    retention: also record which positions live at a chain's end.
    """

    max_num_seqs: Size = 16
    steps: Size = 16
    prefill_chunk: Size = 512
    prefill_tokens: Size | None = None
    pad_rows: Size | None = None
    lookahead: bool | None = None
    pages: Size | None = None
    max_pages: Size | None = None
    retention: bool = False

    def __post_init__(self):
        check(self)

    def on(self, backend: str) -> "EngineConfig":
        """The config with what None means on a kind of device."""
        usual = {"prefill_tokens": 512, "pad_rows": 1, "lookahead": False}
        if backend != "cpu":
            usual = {"prefill_tokens": 8192, "pad_rows": 64, "lookahead": True}
        return replace(self, **{key: value for key, value in usual.items() if getattr(self, key) is None})


@dataclass(eq=False)
class Chain:
    """A chain in a row, and what it has done so far."""

    job: Job
    number: int
    age: int  # chains are numbered as they start
    prompt: "Prompt"
    tokens: list[int] = field(default_factory=list)
    held: list[np.ndarray] = field(default_factory=list)  # live tokens after each step, summed over heads
    reads: list[np.ndarray] = field(default_factory=list)
    reads_by_head: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))  # [L, K] from the first chunk on
    ahead: int = 0  # steps launched of which it is not known yet what they made
    finished: bool = False

    def cut(self, count: int) -> None:
        """Ends the chain with its first `count` tokens; what came after them is not counted (but by head)."""
        self.tokens = self.tokens[:count]
        self.held, self.reads = ([np.concatenate(x)[: count - 1]] for x in (self.held, self.reads))


@dataclass(eq=False)
class Prompt:
    """A prompt in a parked row, and the chains that are still to start."""

    job: Job
    waiting: list[int]
    # Known once it was read:
    reads: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # keys each token attended to, [T]
    live: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))  # [L, K]


class Copy(NamedTuple):
    """A chain to start: a parked row, the row to copy it to, and whether it is the prompt's last chain (a move)."""

    source: int
    target: int
    number: int
    moved: bool


class Scheduler:
    """Decides; it is told what happened by `prompt_read`, `chains_started`, `launched`, `decoded` and `released`.

    live: live tokens of each row `[rows, L, K]`, as far as is known.
    fits: whether the pool holds so many live tokens, after growing if it may grow.
    """

    def __init__(self, jobs: Iterable[Job], config: EngineConfig, capacity: int, heads: tuple[int, int]):
        self.config, self.capacity, self.heads = config, capacity, heads
        self.prefill_tokens = config.prefill_tokens or 8192
        self._jobs = iter(jobs)
        first = list(itertools.islice(self._jobs, config.max_num_seqs))
        # Of the prompts known by now.
        self.lengths = {len(job.prompt) for job in (jobs if isinstance(jobs, Sequence) else first)}
        self._waiting = collections.deque((self._checked(job), list(range(len(job.keys)))) for job in first)
        chains = sum(len(numbers) for _, numbers in self._waiting)
        self.max_num_seqs = min(config.max_num_seqs, max(chains, 1))
        longest = max((len(job.prompt) for job in first), default=1)
        parked = min(self.prompts_at_once(longest), self.max_num_seqs, max(len(first), 1))
        self.rows: list[Chain | Prompt | None] = [None] * (self.max_num_seqs + parked)
        self.live = np.zeros((len(self.rows), *heads), np.int64)
        self.fits: Callable[[np.ndarray], bool] = lambda live: True
        self._age, self._hold = 0, False

    def _checked(self, job: Job) -> Job:
        length = len(job.prompt) + job.max_new
        require(length <= self.capacity, "capacity", self.capacity, f"a job may make {length} tokens")
        return job

    def prompts_at_once(self, length: int) -> int:
        """How many prompts of a length are read in one call."""
        chunk = self.config.prefill_chunk
        count = max(1, self.prefill_tokens // min(padded_length(length, chunk), chunk))
        return min(count, self.together)

    @property
    def together(self) -> int:
        """How many prompts are read, or chains started, in one call at most."""
        return max(self.config.pad_rows or 1, TOGETHER)

    # What there is to do

    @property
    def running(self) -> list[int]:
        """Rows of chains that have not ended."""
        decoding = enumerate(self.rows[: self.max_num_seqs])
        return [r for r, row in decoding if isinstance(row, Chain) and not row.finished]

    @property
    def parked(self) -> list[int]:
        return [r for r in range(self.max_num_seqs, len(self.rows)) if self.rows[r] is not None]

    def prompt_in(self, row: int) -> Prompt:
        prompt = self.rows[row]
        assert isinstance(prompt, Prompt)
        return prompt

    def chain_in(self, row: int) -> Chain:
        chain = self.rows[row]
        assert isinstance(chain, Chain)
        return chain

    def free_rows(self) -> list[int]:
        return [r for r in range(self.max_num_seqs) if self.rows[r] is None]

    def idle(self) -> bool:
        """Nothing is left to read or to run."""
        return not self._next() and not any(row is not None for row in self.rows)

    def longest(self) -> tuple[int, int]:
        """The longest prompt of the jobs known by now, and the longest sequence."""
        jobs = [job for job, _ in self._waiting]
        return max(len(job.prompt) for job in jobs), max(len(job.prompt) + job.max_new for job in jobs)

    def _next(self) -> tuple[Job, list[int]] | None:
        if not self._waiting:
            job = next(self._jobs, None)
            if job is not None:
                self._waiting.append((self._checked(job), list(range(len(job.keys)))))
        return self._waiting[0] if self._waiting else None

    # Prompts

    def next_prompts(self, most: int | None = None) -> list[tuple[int, Prompt]]:
        """The prompts to read now and their parked rows: of one bucket of lengths, at most `prefill_tokens` together.

        They leave the queue; `requeue` puts them back. None while a chain that was preempted waits for others to end.
        most: how many, at most.
        """
        places = [r for r in range(self.max_num_seqs, len(self.rows)) if self.rows[r] is None]
        wanted = len(self.free_rows()) - sum(len(self.prompt_in(r).waiting) for r in self.parked)
        first = self._next()
        if not places or wanted <= 0 or self._hold and self.running or not first:
            return []
        chunk = self.config.prefill_chunk
        length = padded_length(len(first[0].prompt), chunk)
        most = most or self.prompts_at_once(length)
        batch = []
        while (following := self._next()) and padded_length(len(following[0].prompt), chunk) == length:
            if len(batch) == min(most, len(places)) or wanted <= 0:
                break
            job, numbers = self._waiting.popleft()
            wanted -= len(numbers)
            batch.append((places[len(batch)], Prompt(job, numbers)))
        return batch

    def requeue(self, prompts: list[Prompt]) -> None:
        """Puts prompts that could not be read, or that were preempted, at the head of the queue."""
        self._waiting.extendleft((prompt.job, prompt.waiting) for prompt in reversed(prompts) if prompt.waiting)

    def prompt_read(self, row: int, prompt: Prompt) -> None:
        """A prompt is in its row; until its live tokens are known they are taken for all of its tokens."""
        self.rows[row] = prompt
        self.live[row] = len(prompt.job.prompt)

    # Chains

    def next_copies(self) -> list[Copy]:
        """Chains to start in free rows: as many as the pool has pages for."""
        free, copies, bound = self.free_rows(), [], self.bound()
        for source in self.parked:
            prompt = self.prompt_in(source)
            while prompt.waiting and len(copies) < len(free):
                last = len(prompt.waiting) == 1
                copied = [copy.source for copy in copies if not copy.moved] + [source]
                if not last and not self.fits(np.concatenate([bound, self.live[copied]])):
                    if copies or len(free) < self.max_num_seqs:
                        return copies
                    # Nothing runs and there is no room for a copy: one chain goes on alone, the others read again.
                    self._waiting.appendleft((prompt.job, prompt.waiting[1:]))
                    del prompt.waiting[1:]
                    last = True
                copies.append(Copy(source, free[len(copies)], prompt.waiting.pop(0), last))
        return copies

    def chains_started(self, copies: list[Copy]) -> list[Chain]:
        """The chains of some copies, in their rows; rows of prompts without chains to start are empty again."""
        started = []
        for copy in copies:
            prompt = self.prompt_in(copy.source)
            self._age += 1
            chain = Chain(prompt.job, copy.number, self._age, prompt)
            self.rows[copy.target], self.live[copy.target] = chain, self.live[copy.source]
            started.append(chain)
        for copy in copies:
            if copy.moved:
                self.released([copy.source])
        return started

    def released(self, rows: Iterable[int]) -> None:
        """These rows are empty."""
        for row in rows:
            self.rows[row] = None
            self.live[row] = 0

    def launched(self, steps: int) -> list[Chain | None]:
        """The chains in the rows that decode, of which those that run are on their way to take `steps` steps."""
        for row in self.running:
            self.chain_in(row).ahead += steps
        return [row if isinstance(row, Chain) else None for row in self.rows[: self.max_num_seqs]]

    def decoded(self, row: int, live: Int[np.ndarray, "L K"]) -> None:
        """It is known what the oldest chunk launched made of a row that was in it: so many tokens lived after it."""
        self.live[row] = live
        self.chain_in(row).ahead -= self.config.steps

    # Pages

    def bound(self) -> Int[np.ndarray, "rows L K"]:
        """Live tokens of every row once all steps launched are taken, at most: pages for others are to be had beside.

        Steps themselves need no bound, as a row without room waits; what is read or copied takes its pages unasked.
        """
        live, rows = self.live.copy(), list(self.running)
        chains = [self.chain_in(row) for row in rows]
        ahead = np.array([chain.ahead for chain in chains], np.int64)[:, None, None]
        longest = np.array([len(chain.job.prompt) + chain.job.max_new for chain in chains], np.int64)[:, None, None]
        live[rows] = np.minimum(live[rows] + ahead, longest)
        return live

    def make_room(self, starved: Iterable[int], stuck: bool) -> int | None:
        """Grows the pool for rows that could not take a step; the row to preempt where that fails and nothing moves.

        The youngest is preempted: it starts over later, with the same tokens. Raises PoolError with the number of
        tokens where a single sequence is left.
        """
        starved = list(starved)
        for more in (self.config.steps, 1):
            live = self.live.copy()
            live[starved] += more
            if self.fits(live):
                return None
        if not stuck:
            return None
        parked, running = self.parked, self.running
        if parked:  # a prompt is the cheapest to read again
            victim = parked[-1]
            self.requeue([self.prompt_in(victim)])
        elif len(running) > 1:
            victim = max(running, key=lambda r: self.chain_in(r).age)
            chain = self.chain_in(victim)
            self._waiting.appendleft((chain.job, [chain.number]))
        else:
            job = self.chain_in(running[0]).job
            raise PoolError(len(job.prompt) + job.max_new)
        self._hold = True
        return victim

    def resume(self) -> None:
        """A chain has ended: what was preempted may start again."""
        self._hold = False

    def first_waiting(self) -> int:
        """Tokens that the next job in the queue may make."""
        job = self._waiting[0][0]
        return len(job.prompt) + job.max_new


def finished(
    chain: Chain, by_head: tuple[Int[np.ndarray, "L K"], np.ndarray | None], overhead: Callable[[float], float]
) -> Result:
    """The result of a chain that has ended; by_head: live tokens at its end, and the shares of positions or None.

    overhead: of a policy.
    """
    live, shares = by_head
    heads, prompt = live.size, chain.prompt
    held = np.concatenate([[prompt.live.sum()], *chain.held])
    reads = np.concatenate([np.zeros(0, np.int64), *chain.reads])
    seen = len(prompt.job.prompt) + len(held) - 1
    reads_by_head = np.broadcast_to(chain.reads_by_head, live.shape)
    use = use_counts.cache_use(prompt.reads, held, reads, heads)
    use = use._replace(peak_tokens=use.peak_tokens + overhead(use.peak_tokens))
    of_heads = use_counts.HeadUse(reads_by_head, live, seen, shares)
    return Result(chain.job.name, chain.number, chain.tokens, use, of_heads)
