"""Shapes, inputs and tile sizes for scripts/benchmarks/bench_kernels.py."""

import dataclasses
import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax import kernels
from dms_jax.types import MASK_VALUE


@dataclass(frozen=True)
class Decode:
    """One decode step: B sequences, K KV heads of G query heads; spread: longest over shortest head, equal total.

    U: in latent attention values are the first U numbers of the keys; 0: they have a pool of their own.
    """

    B: int = 16
    K: int = 8
    G: int = 4
    D: int = 128
    U: int = 0
    mean_length: int = 8192
    spread: int = 1
    page: int = 64
    dtype: str = "bfloat16"
    pages: str | None = None  # None: as dtype

    @property
    def name(self) -> str:
        pages = f" {self.pages}" if self.pages else ""
        pages = f" U{self.U}{pages}" if self.U else pages
        return f"B{self.B} K{self.K} G{self.G} D{self.D} S{self.mean_length} spread{self.spread} page{self.page}{pages}"

    def of(self, dtype: str) -> "Decode":
        return dataclasses.replace(self, dtype=dtype)

    def lengths(self) -> np.ndarray:
        """`[B, K]`, evenly spaced from the shortest to the longest, heads in random order; the sum does not change."""
        heads = self.B * self.K
        share = np.linspace(1, self.spread, heads)
        lengths = np.floor(share / share.mean() * self.mean_length).astype(np.int32)
        lengths[-1] += heads * self.mean_length - lengths.sum()
        return np.random.default_rng(0).permutation(lengths).reshape(self.B, self.K)

    def live_bytes(self) -> int:
        """Of the keys and values that one step must read, with their scales."""
        size = jnp.dtype(self.pages or self.dtype).itemsize
        return int(self.lengths().sum()) * ((1 if self.U else 2) * self.D * size + (8 if size == 1 else 0))

    @functools.lru_cache(maxsize=1)  # noqa: B019 (one, on purpose: a sweep uses it again and again)
    def inputs(self) -> tuple[jax.Array, kernels.Pages]:
        """Queries, and pages in random order."""
        rng = np.random.default_rng(2)
        lengths = self.lengths()
        P = -(-int(lengths.max()) // self.page)
        used = np.arange(P) < -(-lengths // self.page)[..., None]
        N = int(used.sum())
        table = np.full(used.shape, N, np.int32)
        table[used] = rng.permutation(N)
        pages = jnp.dtype(self.pages or self.dtype)

        def pool(seed):
            shape, key = (N, self.page, self.D), jax.random.key(seed)
            if pages == jnp.int8:
                return jax.random.randint(key, shape, -127, 128, jnp.int8)
            return jax.random.normal(key, shape).astype(pages)

        q = jnp.asarray(rng.normal(size=(self.B, self.K * self.G, self.D)), self.dtype)
        scales = ()
        if pages.itemsize == 1:
            scales = jnp.asarray(rng.uniform(0.5, 1, (2, N, self.page)) / 60, jnp.float32)
        k = pool(0)
        v = k[:, :0, : self.U] if self.U else pool(1)
        return q, kernels.Pages(k, v, jnp.asarray(table), jnp.asarray(lengths), *scales)

    def attend(self, q, pages: kernels.Pages, tiles=None):
        if tiles is None:
            return kernels.paged_decode_attention(q, pages, implementation="triton").out
        from dms_jax.kernels import triton_decode

        return triton_decode.decode(q, pages, tiles=tiles)[0].out


@dataclass(frozen=True)
class Flash:
    """One training or prefill pass over T tokens, of which 1 - 1 / cr are evicted, each by itself or in runs."""

    T: int = 8192
    H: int = 32
    K: int = 8
    D: int = 128
    window: int = 256
    cr: int = 4
    hard: bool = False
    runs: int = 1
    B: int = 1
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        kind = "hard" if self.hard else "soft"
        return f"T{self.T} H{self.H} K{self.K} D{self.D} w{self.window} {kind} CR{self.cr} runs of {self.runs}"

    def of(self, dtype: str) -> "Flash":
        return dataclasses.replace(self, dtype=dtype)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def inputs(self) -> tuple[tuple, jnp.ndarray]:
        """`(q, k, v, log_keep_prob)`, and what the output is multiplied by in the loss."""
        rng = np.random.default_rng(3)

        def normal(seed, heads):
            return jax.random.normal(jax.random.key(seed), (self.B, self.T, heads, self.D)).astype(self.dtype)

        evicted = rng.random((self.B, self.K, -(-self.T // self.runs))) < 1 - 1 / self.cr
        evicted = np.repeat(evicted, self.runs, axis=-1)[..., : self.T]
        soft = np.log1p(-np.clip(np.where(evicted, 1, 0) + rng.normal(size=evicted.shape) * 0.1, 0.001, 0.999))
        log_keep_prob = np.where(evicted, MASK_VALUE, 0.0) if self.hard else soft
        arrays = (normal(0, self.H), normal(1, self.K), normal(2, self.K), jnp.asarray(log_keep_prob, jnp.float32))
        return arrays, normal(3, self.H).astype(jnp.float32)

    def attend(self, q, k, v, log_keep_prob, implementation=None, tiles=None):
        position = jnp.broadcast_to(jnp.arange(self.T, dtype=jnp.int32)[None], (self.B, self.T))
        mask = kernels.EvictionMask(position, position, log_keep_prob, self.window)
        if tiles is None:
            return kernels.flash_attention(q, k, v, mask, hard=self.hard, implementation=implementation)
        from dms_jax.kernels import triton_flash

        return triton_flash.flash(q, k, v, mask.per_head(), hard=self.hard, tiles=tiles)


def decode(quick: bool) -> list[Decode]:
    """The first two are the targets: equal lengths, and 8 to 1."""
    found = [Decode(), Decode(spread=8)]
    if not quick:
        found += [Decode(page=16), Decode(page=16, spread=8), Decode(page=256)]
        found += [Decode(pages="int8"), Decode(pages="float8_e4m3fn"), Decode(D=64), Decode(B=1, mean_length=32768)]
    return found


def latent(quick: bool) -> list[Decode]:
    """Latent attention. The first is the target: 16 query heads on 576 numbers a token, as in Youtu-LLM."""
    youtu = {"B": 64, "K": 1, "G": 16, "D": 576, "U": 512}
    found = [Decode(**youtu)]
    if not quick:
        found += [Decode(**youtu, spread=8), Decode(**youtu, pages="int8"), Decode(**{**youtu, "G": 128})]
        found += [Decode(**{**youtu, "B": 1}, mean_length=32768), Decode(**{**youtu, "G": 40, "D": 288, "U": 256})]
    return found


def flash(quick: bool) -> list[Flash]:
    """Soft, as in training; hard, with evicted tokens alone (no tile can be skipped) and in runs."""
    found = [Flash(), Flash(hard=True, cr=4)]
    if not quick:
        found += [Flash(hard=True, cr=cr, runs=512) for cr in (1, 2, 4, 8)] + [Flash(D=64), Flash(window=8192, cr=1)]
    return found


def tiny_decode() -> list[Decode]:
    few = {"B": 2, "K": 2, "G": 3, "D": 10, "mean_length": 40, "page": 16}
    return [Decode(**few), Decode(**few, spread=8), Decode(**few, pages="int8"), Decode(**few, pages="float8_e4m3fn")]


def tiny_latent() -> list[Decode]:
    few = {"B": 2, "K": 1, "G": 20, "D": 26, "U": 16, "mean_length": 40, "page": 16}
    return [Decode(**few), Decode(**few, pages="int8")]


def tiny_flash() -> list[Flash]:
    few = {"T": 150, "H": 6, "K": 2, "D": 10, "window": 20}
    return [Flash(**few), Flash(**few, hard=True), Flash(**few, hard=True, runs=16)]


def decode_tilings(quick: bool) -> list:
    from dms_jax.kernels.launch import multiprocessors
    from dms_jax.kernels.triton_decode import Tiling

    small, large = ((32, 64, 128), (4,), (2, 3), (2, 3, 4)), ((32, 64, 128), (4, 8), (2, 3, 4), (2, 3, 4, 6))
    grid = itertools.product(*(small if quick else large))
    return [Tiling(block, warps, stages, n * multiprocessors()) for block, warps, stages, n in grid]


def latent_tilings(quick: bool) -> list:
    """Tiles of 18 to 72 KB; with fewer programs there are fewer splits to merge."""
    from dms_jax.kernels.launch import multiprocessors
    from dms_jax.kernels.triton_decode import Tiling

    few = [(64, 4, 2, 2), (32, 4, 3, 2), (32, 4, 2, 2), (16, 4, 4, 3), (64, 8, 2, 2), (64, 8, 3, 1), (64, 4, 3, 1)]
    few += [(64, 4, 2, 4), (32, 8, 3, 2)]
    grid = few if quick else [*itertools.product((16, 32, 64), (4, 8), (2, 3, 4), (1, 2, 3))]
    return [Tiling(block, warps, stages, n * multiprocessors()) for block, warps, stages, n in grid]


def flash_tilings(part: str, quick: bool) -> list:
    """Tilings that differ from the default in one kernel."""
    from dms_jax.kernels.triton_flash import Tile, tiling

    sizes = {
        "forward": [(128, 64), (128, 128), (64, 64), (64, 128)],
        "dkv": [(64, 128), (64, 64), (32, 128), (128, 64)],
        "dq": [(128, 64), (64, 64), (64, 128), (128, 32)],
    }[part]
    found = itertools.product(sizes[:2] if quick else sizes, (8,) if quick else (4, 8), (2, 3))
    default = tiling(128, 2)
    return [default._replace(**{part: Tile(*size, warps, stages)}) for size, warps, stages in found]
