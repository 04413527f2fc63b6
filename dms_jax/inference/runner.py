"""The device's side of an engine: a DecodeState of some rows, and every call that changes it.

Nothing here waits for the device, except to grow the pool and to read prompts longer than a chunk: results are device
arrays that the caller fetches when it needs them.
"""

import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dms_jax.inference import decode
from dms_jax.inference.decode import Chunk, Copies, DecodeSpec, DecodeState, Started
from dms_jax.inference.prefill import PromptChunk
from dms_jax.inference.scheduler import Copy, padded_count, padded_length
from dms_jax.models.transformer import mean_key_bias
from dms_jax.types import Params


class Prefilled(NamedTuple):
    """Prompts that were read: logits of the next token, keys that each token attended to, live tokens of all rows."""

    logits: Float[Array, "A V"]
    seen: Int[Array, "A T"]
    live: Int[Array, "rows L K"]


@functools.partial(jax.jit, static_argnames=("spec", "rows", "pages"))
def empty_state(spec: DecodeSpec, params: Params, rows: int, pages: int) -> DecodeState:
    """`decode.init` for these parameters, as one program: each of its arrays alone would be one to compile."""
    state = decode.init(spec, rows, params["embed"]["embedding"].dtype, pages)
    offset = mean_key_bias(params, spec.model.config, spec.kv_cache.slots)
    return state if offset is None else state._replace(cache=spec.kv_cache.center(state.cache, offset))


class Runner:
    """`rows` rows of one DecodeSpec, with a pool of `pages` pages on each device of `mesh`.

    params: or their shapes; then the state is one of shapes, too, and the runner can only `compile`.
    prefill_chunk, prefill_tokens, pad_rows: see EngineConfig. max_pages: how far the pool may grow.
    """

    def __init__(
        self,
        spec: DecodeSpec,
        params: Params,
        rows: int,
        pages: int,
        *,
        prefill_chunk: int = 512,
        prefill_tokens: int = 8192,
        pad_rows: int = 1,
        max_pages: int | None = None,
        mesh: Mesh | None = None,
    ):
        self.spec, self.params, self.rows, self.mesh = spec, params, rows, mesh
        self.prefill_chunk, self.prefill_tokens = prefill_chunk, prefill_tokens
        self.pad_rows, self.max_pages = pad_rows, max_pages
        self.fresh = spec, params, rows, pages
        shapes = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
        self.state: DecodeState = self._call(empty_state.eval_shape if shapes else empty_state, *self.fresh)

    def _call(self, function, *arguments):
        """Everything that runs on the devices goes through here: under the mesh, where there is one."""
        if self.mesh is None:
            return function(*arguments)
        with jax.set_mesh(self.mesh):
            return function(*arguments)

    def fits(self, live: Int[np.ndarray, "rows L K"]) -> bool:
        """Whether the pools hold so many live tokens, after growing if they may grow."""
        kv_cache = self.spec.kv_cache
        cache = self._call(kv_cache.fitted, self.state.cache, live, self.max_pages)
        if cache is None:
            return False
        self.state = self.state._replace(cache=cache)
        return True

    def live(self) -> Int[np.ndarray, "rows L K"]:
        """Live tokens of every row; waits for the device."""
        return np.asarray(self._call(decode.live_tokens, self.spec, self.state)).astype(np.int64)

    def prefill(
        self,
        rows: list[int],
        prompts: list[list[int]],
        max_new: list[int],
        live: Int[np.ndarray, "rows L K"],
        keys: np.ndarray | None = None,
    ) -> Prefilled | None:
        """Reads prompts into rows, chunk by chunk; None if the pool is too small, and the rows are to be released.

        live: live tokens of all rows now, or a bound; updated. keys: `[A, 2]` random keys for the token drawn.
        """
        tokens, counts, padded = self._batch(rows, prompts)
        A = len(padded)
        limits = np.ones(A, np.int32)
        limits[: len(rows)] = max_new
        keys = np.zeros((A, 2), np.uint32) if keys is None else keys
        logits, seen = None, []
        for start, size in self._parts(tokens.shape[1]):
            part = tokens[:, start : start + size]
            count, remaining = np.clip(counts - start, 0, size), np.maximum(counts - start - size, 0)
            wanted = live.copy()
            wanted[rows] += count[: len(rows), None, None]
            if not self.fits(wanted):
                return None
            width = self._width(int(live[rows].max()))
            chunk = PromptChunk(padded, part, count, remaining, limits, keys)
            self.state, new, saw = self._call(decode.prefill, self.spec, self.params, self.state, chunk, width)
            logits = new if logits is None else jnp.where(count[:, None] > 0, new, logits)
            seen.append(saw)
            live[rows] = wanted[rows]
            if start + size < tokens.shape[1]:
                live[rows] = self.live()[rows]
        after = self._call(decode.live_tokens, self.spec, self.state)
        return Prefilled(logits, seen[0] if len(seen) == 1 else jnp.concatenate(seen, axis=1), after)

    def _batch(self, rows: list[int], prompts: list[list[int]]):
        """Right-padded tokens `[A, T]`, counts `[A]` and rows `[A]`; few sizes, so that few programs are compiled."""
        A, length = self._padded(len(rows), max(map(len, prompts)))
        tokens, counts = np.zeros((A, length), np.int32), np.zeros(A, np.int32)
        padded = np.full(A, self.rows, np.int32)
        padded[: len(rows)] = rows
        for n, prompt in enumerate(prompts):
            counts[n] = len(prompt)
            tokens[n, : len(prompt)] = prompt
        return tokens, counts, padded

    def _padded(self, count: int, tokens: int) -> tuple[int, int]:
        """The shape to which `count` prompts of up to `tokens` tokens are padded."""
        length = padded_length(tokens, self.prefill_chunk)
        # Long prompts are few at a time: as many empty rows as for short ones would be most of the work.
        together = max(1, self.prefill_tokens // min(length, self.prefill_chunk))
        return padded_count(count, self.rows, min(self.pad_rows, together)), length

    def _parts(self, length: int) -> list[tuple[int, int]]:
        """Where each chunk of prompts padded to `length` begins, and how many tokens it has."""
        C = self.prefill_chunk
        return [(start, min(C, length - start)) for start in range(0, length, C)]

    def _width(self, live: int) -> int:
        """Slots to read of rows that hold `live` tokens: whole chunks, so that few programs are compiled."""
        return min(-(-live // self.prefill_chunk) * self.prefill_chunk, self.spec.kv_cache.slots)

    def fork(self, made: Prefilled, copies: list[Copy], prompts: list[int], keys: np.ndarray, width: int) -> Started:
        """Copies parked rows; prompts: which of those read in one call each is, width: the longest of these."""
        rows, count = self._copies(len(copies)), len(copies)
        for n, copy in enumerate(copies):
            rows.source[n], rows.target[n], rows.moved[n] = copy.source, copy.target, copy.moved
        rows.prompt[:count], rows.keys[:count] = prompts, keys
        self.state, started = self._call(decode.fork, self.spec, self.state, made.logits, rows, self._slots(width))
        return started

    def _copies(self, count: int) -> Copies:
        """Padding, for `count` rows to copy."""
        A = padded_count(count, self.rows, self.pad_rows)
        source, target = np.full((2, A), self.rows, np.int32)
        return Copies(source, target, np.zeros(A, np.int32), np.zeros(A, bool), np.zeros((A, 2), np.uint32))

    def _slots(self, tokens: int) -> int:
        """The slots of which prompts of up to `tokens` tokens are copied."""
        return min(padded_length(tokens, self.prefill_chunk), self.spec.kv_cache.slots)

    def decode(self, steps: int, batch: int | None = None) -> Chunk:
        """One chunk of steps for the first `batch` rows."""
        self.state, chunk = self._call(decode.decode_chunk, self.spec, self.params, self.state, steps, batch)
        return chunk

    def compile(self, lengths: Iterable[int], steps: int, batch: int) -> None:
        """Compiles what prompts of these lengths and their chains will call.

        A prompt's rest is read as if nothing had been evicted, to the chunk; few rows are read at once. Programs are
        traced one after another, as threads would only wait for each other's turn at Python's lock; XLA leaves that
        alone and compiles them side by side. A call with the same arguments finds what was compiled.
        """
        spec, params, state, flags = self.spec, self.params, self.state, np.zeros(self.rows, bool)
        programs = [(decode.chunk_program(state, batch), spec, params, state, steps, batch)]
        sizes = sorted({padded_length(n, self.prefill_chunk) for n in lengths})
        parts = {(self._padded(1, size)[0], *part) for size in sizes for part in self._parts(size)}
        for A, start, tokens in sorted(parts):
            counts, keys = np.zeros(A, np.int32), np.zeros((A, 2), np.uint32)
            chunk = PromptChunk(counts, np.zeros((A, tokens), np.int32), counts, counts, counts, keys)
            programs.insert(0, (decode.prefill, spec, params, state, chunk, self._width(start)))  # they take longest
        for size in sizes:
            logits = jax.ShapeDtypeStruct((self._padded(1, size)[0], spec.model.config.vocab_size), jnp.float32)
            programs.append((decode.fork, spec, state, logits, self._copies(1), self._slots(size)))
        small = [(empty_state, *self.fresh), (decode.release, spec, state, flags), (decode.live_tokens, spec, state)]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            lowered = (self._call(function.lower, *given) for function, *given in programs + small)
            compiling = [threads.submit(program.compile) for program in lowered]
            for program in compiling:
                program.result()

    def release(self, rows: list[int]) -> None:
        """Empties rows; their pages go back to the pool."""
        if rows:
            flags = np.isin(np.arange(self.rows), rows)
            self.state = self._call(decode.release, self.spec, self.state, flags)

    def stored_positions(self, row: int) -> Int[np.ndarray, "L K S"]:
        return np.asarray(self._call(decode.stored_positions, self.spec, self.state, np.int32(row)))
