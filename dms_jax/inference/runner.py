"""The device's side of an engine: a DecodeState of some rows, and every call that changes it.

Nothing here waits for the device, except to grow the pool and to read prompts longer than a chunk: results are device
arrays that the caller fetches when it needs them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dms_jax.inference import decode
from dms_jax.inference.decode import Chunk, Copies, DecodeSpec, PromptChunk
from dms_jax.inference.scheduler import Copy, padded_count, padded_length, round_up
from dms_jax.models.transformer import mean_key_bias
from dms_jax.types import Params


class Prefilled(NamedTuple):
    """Prompts that were read: logits of the next token, keys that each token attended to, live tokens."""

    logits: Float[Array, "A V"]
    seen: Int[Array, "A T"]
    live: Int[Array, "A L K"]


class Started(NamedTuple):
    """Rows that were copied: the first token of each, and whether it ends the chain."""

    token: Int[Array, "A"]
    done: Bool[Array, "A"]


@jax.jit
def pick(arrays, rows: Int[Array, "A"]):
    """These rows of every array; indexing outside of a compiled function costs milliseconds of tracing."""
    return jax.tree.map(lambda x: x[rows], arrays)


class Runner:
    """`rows` rows of one DecodeSpec, with a pool of `pages` pages on each device of `mesh`.

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
        dtype = params["embed"]["embedding"].dtype
        self.state = self._call(decode.init, spec, rows, dtype, pages)
        offset = mean_key_bias(params, spec.model.config, spec.kv_cache.slots)
        if offset is not None:
            self.state = self.state._replace(cache=spec.kv_cache.center(self.state.cache, offset))

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
        A, C = len(padded), self.prefill_chunk
        limits = np.ones(A, np.int32)
        limits[: len(rows)] = max_new
        keys = np.zeros((A, 2), np.uint32) if keys is None else keys
        logits, seen = None, []
        for start in range(0, tokens.shape[1], C):
            part = tokens[:, start : start + C]
            count = np.clip(counts - start, 0, part.shape[1])
            remaining = np.maximum(counts - start - part.shape[1], 0)
            wanted = live.copy()
            wanted[rows] += count[: len(rows), None, None]
            if not self.fits(wanted):
                return None
            width = min(round_up(int(live[rows].max())), self.spec.kv_cache.slots)
            chunk = PromptChunk(padded, part, count, remaining, limits, keys)
            self.state, new, saw = self._call(decode.prefill, self.spec, self.params, self.state, chunk, width)
            logits = new if logits is None else jnp.where(count[:, None] > 0, new, logits)
            seen.append(saw)
            live[rows] = wanted[rows]
            if start + C < tokens.shape[1]:
                live[rows] = self.live()[rows]
        live_now = self._call(decode.live_tokens, self.spec, self.state)
        after = self._call(pick, live_now, np.minimum(padded, self.rows - 1))
        return Prefilled(logits, seen[0] if len(seen) == 1 else jnp.concatenate(seen, axis=1), after)

    def _batch(self, rows: list[int], prompts: list[list[int]]):
        """Right-padded tokens `[A, T]`, counts `[A]` and rows `[A]`; few sizes, so that few programs are compiled."""
        length = padded_length(max(map(len, prompts)), self.prefill_chunk)
        # Long prompts are few at a time: as many empty rows as for short ones would be most of the work.
        together = max(1, self.prefill_tokens // min(length, self.prefill_chunk))
        A = padded_count(len(rows), self.rows, min(self.pad_rows, together))
        tokens, counts = np.zeros((A, length), np.int32), np.zeros(A, np.int32)
        padded = np.full(A, self.rows, np.int32)
        padded[: len(rows)] = rows
        for n, prompt in enumerate(prompts):
            counts[n] = len(prompt)
            tokens[n, : len(prompt)] = prompt
        return tokens, counts, padded

    def fork(self, read: tuple[Prefilled, np.ndarray], copies: list[Copy], keys: np.ndarray, width: int) -> Started:
        """Copies parked rows; read: what was prefilled, and which of its logits are each copy's, padded to A."""
        made, index = read
        logits, A = self._call(pick, made.logits, index), len(index)
        source, target, moved = np.full(A, self.rows), np.full(A, self.rows), np.zeros(A, bool)
        all_keys = np.zeros((A, 2), np.uint32)
        all_keys[: len(copies)] = keys
        for n, copy in enumerate(copies):
            source[n], target[n], moved[n] = copy.source, copy.target, copy.moved
        width = min(padded_length(width, self.prefill_chunk), self.spec.kv_cache.slots)
        rows = Copies(source, target, moved, all_keys)
        self.state = self._call(decode.fork, self.spec, self.state, logits, rows, width)
        at = np.minimum(target, self.rows - 1)
        return Started(*self._call(pick, (self.state.token, self.state.done), at))

    def decode(self, steps: int, batch: int | None = None) -> Chunk:
        """One chunk of steps for the first `batch` rows."""
        self.state, chunk = self._call(decode.decode_chunk, self.spec, self.params, self.state, steps, batch)
        return chunk

    def release(self, rows: list[int]) -> None:
        """Empties rows; their pages go back to the pool."""
        if rows:
            flags = np.isin(np.arange(self.rows), rows)
            self.state = self._call(decode.release, self.spec, self.state, flags)

    def stored_positions(self, row: int) -> Int[np.ndarray, "L K S"]:
        return np.asarray(self._call(decode.stored_positions, self.spec, self.state, np.int32(row)))
