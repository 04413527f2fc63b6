"""Batches of token sequences: packed rows, in an order that depends on the seed alone, resumable anywhere.

A stream is called with a cursor (any JSON value; None is the start) and gives an iterator of batches, each with the
cursor from which the stream would go on behind it.
"""

import functools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dms_jax.config import require
from dms_jax.training.documents import Documents

Cursor = Any
Stream = Callable[[Cursor], Iterator[tuple[Any, Cursor]]]
AHEAD = 64  # documents tokenised in one call


class Batch(NamedTuple):
    """Right-padded sequences. Tokens `[B, T]`; of `lengths` `[B]` real tokens the first `prompt_lengths` are given."""

    tokens: Int[np.ndarray, "B T"]
    prompt_lengths: Int[np.ndarray, "B"]
    lengths: Int[np.ndarray, "B"]


class Packed(NamedTuple):
    """Rows of several documents each. segments: which document of the row, from 1, a token is of, 0 for padding;
    positions: from 0 in each document (and in the padding)."""

    tokens: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T"]
    segments: Int[np.ndarray, "B T"]


def one_document(batch: Batch) -> Packed:
    """Rows that are one document each."""
    B, T = batch.tokens.shape
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    return Packed(batch.tokens, positions, (positions < batch.lengths[:, None]).astype(np.int32))


def batch_at(pool: Batch, step: int, batch_size: int, seed: int) -> Batch:
    """Batch number `step` of an endless shuffled pass over `pool`: a pure function of its arguments.

    Every epoch has its own permutation; a remainder smaller than a batch is left out of that epoch.
    """
    per_epoch = len(pool.tokens) // batch_size
    require(per_epoch > 0, "batch_size", batch_size, f"the pool holds only {len(pool.tokens)} sequences")
    epoch, index = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(len(pool.tokens))
    rows = order[index * batch_size : (index + 1) * batch_size]
    return Batch(*(np.asarray(field[rows], np.int32) for field in pool))


@dataclass(frozen=True, eq=False)
class PoolStream:
    """`batch_at` as a stream; its cursor is the step."""

    pool: Batch
    batch_size: int
    seed: int

    def __call__(self, cursor: int | None) -> Iterator[tuple[Batch, int]]:
        step = cursor or 0
        while True:
            yield batch_at(self.pool, step, self.batch_size, self.seed), step + 1
            step += 1

    def packed(self, cursor: int | None) -> Iterator[tuple[Packed, int]]:
        """The same stream with every sequence as a row of one document."""
        return ((one_document(batch), after) for batch, after in self(cursor))


def blend(taken: Sequence[int], weights: Sequence[float]) -> int:
    """The source of the next document: the one furthest behind its share. After n documents each source has given
    `n * weight / sum(weights)` of them, to within the number of sources."""
    share = np.asarray(weights) / np.sum(weights)
    return int(np.argmax(share * (sum(taken) + 1) - np.asarray(taken)))


@dataclass(frozen=True, eq=False)
class PackedStream:
    """A stream of rows of `context` tokens, filled with whole documents in the order in which they come.

    Every pass over a source has its own permutation. A document longer than a row is cut off at its end; a row's
    remainder is padding. The cursor is how many documents of each source have been used.

    weights: the shares of the sources in the documents.
    """

    sources: Sequence[Documents]
    weights: Sequence[float]
    context: int
    batch_size: int
    seed: int

    def __post_init__(self):
        require(len(self.sources) > 0, "data", list(self.sources), "no source is given")

    def __call__(self, cursor: Sequence[int] | None) -> Iterator[tuple[Packed, list[int]]]:
        coming = self._documents(cursor)
        document, at = next(coming)
        while True:
            batch = Packed(*(np.zeros((self.batch_size, self.context), np.int32) for _ in Packed._fields))
            for row in range(self.batch_size):
                start, segment = 0, 0
                while start + len(document) <= self.context:
                    segment += 1
                    stop = start + len(document)
                    batch.tokens[row, start:stop] = document
                    batch.positions[row, start:stop] = np.arange(len(document))
                    batch.segments[row, start:stop] = segment
                    start = stop
                    document, at = next(coming)
                batch.positions[row, start:] = np.arange(self.context - start)
            yield batch, at

    def _documents(self, cursor: Sequence[int] | None) -> Iterator[tuple[np.ndarray, list[int]]]:
        """Tokens of one document after another, each with the cursor from which it would be the next."""
        taken = list(cursor or [0] * len(self.sources))
        while True:
            before, wanted = [], [[] for _ in self.sources]
            for _ in range(AHEAD):
                n = blend(taken, self.weights)
                before.append((n, list(taken)))
                epoch, index = divmod(taken[n], len(self.sources[n]))
                wanted[n].append(int(_order(self.seed, n, epoch, len(self.sources[n]))[index]))
                taken[n] += 1
            encoded = [iter(source.encode(rows)) for source, rows in zip(self.sources, wanted, strict=True)]
            for n, at in before:
                yield next(encoded[n])[: self.context], at


@functools.lru_cache(maxsize=32)
def _order(seed: int, source: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, source, epoch)).permutation(count)


def prefetch(items: Iterator, depth: int = 2) -> Iterator:
    """`items`, made in a thread up to `depth` ahead; an exception comes out where its item would have."""
    waiting: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def fill():
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:  # goes to the consumer, whatever it is
            put((None, error))

    worker = threading.Thread(target=fill, daemon=True)
    worker.start()
    try:
        while True:
            item, error = waiting.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
        worker.join()
