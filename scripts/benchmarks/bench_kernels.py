"""Measures the GPU kernels: bytes per second of paged decode attention, FLOP per second of flash attention.

Rates are given as a share of a device copy and of a matrix product measured in the same run, next to PyTorch's
scaled_dot_product_attention and FlexAttention and jax.nn.dot_product_attention with cuDNN in the same process. Inputs
are random and larger than the L2 cache; the first result of each shape is compared with the jnp reference. Every
result is printed, and written to --out, as soon as it is there; a peer that fails leaves its error in the record.

Without a GPU the comparison runs alone, on small shapes in Triton's interpreter (needs the extra `test`).
"""

import functools
import json
import os
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch needs some of the GPU's memory

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax import kernels
from experiments.run import environment, version_of, write_json
from scripts import command
from scripts.benchmarks import kernel_cases as cases
from scripts.benchmarks import kernel_peers as peers
from scripts.benchmarks.device_events import Span, recorded

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # relative to the largest value of the result
GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # sums over thousands of queries in another order


@dataclass(frozen=True)
class Settings:
    """What to measure.

    kernels: of "decode", "latent" (decoding where a value is a part of its key) and "flash". check: only compare with
    the reference, every shape in float32 and bfloat16. tune: sweep tile sizes, warps and stages, and print the best.
    quick: fewer shapes, repeats and candidates.
    peers: also measure PyTorch and cuDNN. repeats: timings of which the median is taken. out: JSON file of the record.
    """

    kernels: tuple[str, ...] = ("decode", "latent", "flash")
    check: bool = False
    tune: bool = False
    quick: bool = False
    peers: bool = True
    repeats: int = 10
    out: Path | None = None


@dataclass
class Record:
    """Rows as they come; the file is complete after each."""

    out: Path | None
    about: dict
    rows: list[dict] = field(default_factory=list)

    def add(self, **row) -> None:
        self.rows.append(row)
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        if self.out:
            write_json(self.out, {**self.about, "rows": self.rows})

    def guard(self, measure: Callable[[], object], **row) -> None:
        """Calls `measure`; adds a row with the error if it raises one."""
        try:
            measure()
        except Exception as error:  # whatever another library raises must not end the run
            self.add(**row, error=f"{type(error).__name__}: {error}"[:500])

    def attempt(self, measure: Callable[[], dict], **row) -> None:
        """Adds what `measure` returns, or the error that it raised."""
        self.guard(lambda: self.add(**row, **measure()), **row)


def about_this_run() -> dict:
    """Device, driver, versions and commit."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = None
    versions = {name: version_of(name) for name in ("jax", "jaxlib", "triton", "torch", "dms_jax")}
    return environment() | {"device": jax.devices()[0].device_kind, "driver": driver, "versions": versions}


def median_time(fn: Callable, inputs: list[tuple], repeats: int) -> float:
    """Median seconds of one call of `fn` on the device, gaps between its kernels included, as CUDA events would tell.

    One jitted function makes all calls, on inputs that differ, so that none is saved. A run lasts from the start of
    its first kernel to the end of its last, by the profiler's record.
    """
    run = jax.jit(lambda batch: [fn(*arguments) for arguments in batch])
    for _ in range(2):
        jax.block_until_ready(run(inputs))
    events = recorded(lambda: [jax.block_until_ready(run(inputs)) for _ in range(repeats)])
    return run_seconds([(event.start, event.end) for event in events], repeats) / len(inputs)


def run_seconds(events: list[Span], runs: int) -> float:
    """Median seconds from the first start to the last end of a run; every run has as many events, one after the other.

    Raises:
      RuntimeError: no events, or a number of them that the runs cannot have.
    """
    each, rest = divmod(len(events), runs)
    if not each or rest:
        raise RuntimeError(f"the profiler recorded {len(events)} events for {runs} equal runs")
    events = sorted(events)
    parts = [events[n * each : (n + 1) * each] for n in range(runs)]
    return statistics.median(max(end for _, end in part) - part[0][0] for part in parts) / 1e9


def machine_rates(record: Record, settings: Settings) -> tuple[float, float]:
    """Bytes per second of a device copy (the best of two) and FLOP per second of a bfloat16 product."""
    size = 2**28
    big = jax.random.normal(jax.random.key(0), (size,))
    inputs = [(big, jnp.float32(i)) for i in range(6)]
    rate = 2 * 4 * size / median_time(lambda x, i: x + i, inputs, settings.repeats)
    record.add(name="copy", by="XLA, x + i", bytes_per_second=rate)
    rates = [rate]

    def torch_copy():
        rates.append(peers.copy_rate(settings.repeats))
        return {"bytes_per_second": rates[-1]}

    record.attempt(torch_copy, name="copy", by="torch, copy_")
    n = 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    flops = 2 * n**3 / median_time(lambda a, b: a @ b, [(a + i, b) for i in range(6)], settings.repeats)
    record.add(name="matmul", n=n, flop_per_second=flops)
    return max(rates), flops


def error_of(got, want) -> float:
    """Largest difference relative to the largest value; infinite values must be in the same places."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    if (np.isinf(got) != np.isinf(want)).any() or np.isnan(got).any():
        return float("inf")
    got, want = (np.where(np.isinf(x), 0, x) for x in (got, want))
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))


def check(record: Record, name: str, dtype: str, got: dict, want: dict, **row) -> None:
    errors = {part: error_of(got[part], want[part]) for part in want}
    passed = all(
        e <= (TOLERANCE if part in ("out", "lse") else GRADIENT_TOLERANCE)[dtype] for part, e in errors.items()
    )
    record.add(name=name, dtype=dtype, passed=passed, **row, errors=errors)


def check_decode(record: Record, case: cases.Decode) -> None:
    call = jax.jit(kernels.paged_decode_attention, static_argnames="implementation")
    got, want = (call(*case.inputs(), implementation=how) for how in ("triton", "reference"))
    got, want = ({"out": x.out, "lse": x.lse} for x in (got, want))
    check(record, "check decode", case.dtype, got, want, case=case.name)


def check_flash(record: Record, case: cases.Flash, ours: str | None = None) -> None:
    """Output and gradients; the reference's products are exact, not TF32."""
    arrays, weights = case.inputs()

    def run(how):
        def loss(q, k, v, log_keep_prob, weights):
            out = case.attend(q, k, v, log_keep_prob, implementation=how)
            return (out.astype(jnp.float32) * weights).sum(), out

        with jax.default_matmul_precision("highest"):
            grads, out = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*arrays, weights)
        return dict(zip(("out", "q", "k", "v", "log_keep_prob"), (out, *grads), strict=True))

    check(record, "check flash", case.dtype, run(ours), run("reference"), case=case.name)


def decode_calls(case: cases.Decode, tiles=None) -> tuple[list[tuple], Callable]:
    """Inputs that differ in their queries, and the call."""
    q, pages = case.inputs()
    inputs = [(jax.random.normal(jax.random.key(i), q.shape, q.dtype), pages) for i in range(12)]
    return inputs, functools.partial(case.attend, tiles=tiles)


def bench_decode(record: Record, case: cases.Decode, settings: Settings, copy: float) -> None:
    """The live keys and values are what must be read."""
    inputs, call = decode_calls(case)
    seconds = median_time(call, inputs, settings.repeats)
    rate = case.live_bytes() / seconds
    record.add(name="decode", case=case.name, seconds=seconds, bytes_per_second=rate, of_copy=rate / copy)


def decode_peers(record: Record, case: cases.Decode, settings: Settings, copy: float) -> None:
    """The same number of live tokens, in one block of memory and equal for every head."""
    q, _ = case.inputs()
    keys = case.mean_length

    def rate(seconds):
        achieved = case.live_bytes() / seconds
        return {"seconds": seconds, "bytes_per_second": achieved, "of_copy": achieved / copy}

    def sdpa():
        call = peers.decode_sdpa(np.asarray(q, np.float32), keys, case.K, case.dtype)
        return rate(peers.event_time(call, settings.repeats))

    def cudnn():
        k, v = (jax.random.normal(jax.random.key(i), (case.B, keys, case.K, case.D), q.dtype) for i in range(2))
        inputs = [(q[:, None] + i, k, v) for i in range(12)]
        call = lambda *x: jax.nn.dot_product_attention(*x, implementation="cudnn")  # noqa: E731
        return rate(median_time(call, inputs, settings.repeats))

    record.attempt(sdpa, name="decode", peer="torch SDPA, equal lengths, no pages", case=case.name)
    record.attempt(cudnn, name="decode", peer="jax cuDNN, equal lengths, no pages", case=case.name)


def flash_calls(case: cases.Flash, **options) -> tuple[list[tuple], Callable, Callable]:
    """Inputs, the forward pass, and the gradients (which take a forward pass); options: of `Flash.attend`."""
    (q, *arrays), weights = case.inputs()
    weights = weights.astype(q.dtype)
    inputs = [(jax.random.normal(jax.random.key(i), q.shape, q.dtype), *arrays, weights) for i in range(6)]

    def forward(q, k, v, log_keep_prob, weights):
        return case.attend(q, k, v, log_keep_prob, **options)

    def loss(q, k, v, log_keep_prob, weights):
        return (forward(q, k, v, log_keep_prob, weights) * weights).sum(dtype=jnp.float32)

    return inputs, forward, jax.grad(loss, (0, 1, 2, 3))


def bench_flash(record: Record, case: cases.Flash, settings: Settings, matmul: float) -> None:
    inputs, forward, gradient = flash_calls(case)
    seconds, both = (median_time(call, inputs, settings.repeats) for call in (forward, gradient))
    memory = jax.jit(gradient).lower(*inputs[0]).compile().memory_analysis()
    peak = memory.temp_size_in_bytes + memory.output_size_in_bytes
    record.add(name="flash", case=case.name, **flash_rates(case, seconds, both, matmul), peak_bytes=peak)


def flash_rates(case: cases.Flash, forward: float, both: float, matmul: float) -> dict:
    """FLOP are those of causal attention, 2 products of the half forward and 5 backward, whatever is skipped."""
    product = case.B * case.H * case.T**2 * case.D
    return {
        "forward_seconds": forward,
        "backward_seconds": both - forward,
        "forward_of_matmul": 2 * product / forward / matmul,
        "backward_of_matmul": 5 * product / (both - forward) / matmul,
    }


def flash_peers(record: Record, case: cases.Flash, settings: Settings, matmul: float) -> None:
    (q, k, v, log_keep_prob), weights = case.inputs()
    ours = np.asarray(case.attend(q, k, v, log_keep_prob), np.float32)
    arrays = [np.asarray(x, np.float32) for x in (q, k, v, weights)]

    def torch_peer(make, compare):
        forward, both = make()
        result = {"error_to_ours": error_of(forward().transpose(1, 2).float().cpu().numpy(), ours)} if compare else {}
        times = [peers.event_time(call, settings.repeats) for call in (forward, both)]
        return result | flash_rates(case, *times, matmul) | {"peak_bytes": peers.peak_bytes(both)}

    def triton():
        inputs, forward, gradient = flash_calls(case, implementation="triton")
        return flash_rates(case, *(median_time(f, inputs, settings.repeats) for f in (forward, gradient)), matmul)

    def flex():
        return peers.flex(*arrays, np.asarray(log_keep_prob), case.window, case.hard, case.dtype)

    def cudnn():
        def attend(q, k, v, weights):
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

        gradient = jax.grad(lambda *x: (attend(*x) * x[-1]).sum(dtype=jnp.float32), (0, 1, 2))
        inputs = [(q + i, k, v, weights.astype(q.dtype)) for i in range(6)]
        return flash_rates(case, *(median_time(f, inputs, settings.repeats) for f in (attend, gradient)), matmul)

    record.attempt(triton, name="flash", peer="ours in Triton", case=case.name)
    record.attempt(lambda: torch_peer(flex, True), name="flash", peer="torch FlexAttention", case=case.name)
    sdpa = lambda: peers.causal_sdpa(*arrays, case.dtype)  # noqa: E731
    record.attempt(lambda: torch_peer(sdpa, False), name="flash", peer="torch SDPA, causal only", case=case.name)
    record.attempt(cudnn, name="flash", peer="jax cuDNN, causal only", case=case.name)


def tune(record: Record, settings: Settings) -> None:
    """The time of each candidate that compiles (forward and backward together for parts of the backward pass)."""
    copy, _ = machine_rates(record, settings)

    def best_of(part, case, candidates, call_with):
        times = {}

        def measure(tiles, label):
            inputs, call = call_with(tiles)
            times[label] = seconds = median_time(call, inputs, settings.repeats)
            share = {"of_copy": case.live_bytes() / seconds / copy} if part == "decode" else {}
            record.add(name=f"tune {part}", case=case.name, tiles=label, seconds=seconds, **share)

        for tiles in candidates:
            label = str(getattr(tiles, part, tiles))
            record.guard(lambda tiles=tiles, label=label: measure(tiles, label), name=f"tune {part}", tiles=label)
        if times:
            best = min(times, key=times.get)
            record.add(name=f"best {part}", case=case.name, tiles=best, seconds=times[best])

    for case in decode_cases(settings, quick=True):
        tilings = (cases.latent_tilings if case.U else cases.decode_tilings)(settings.quick)
        best_of("decode", case, tilings, lambda tiles, case=case: decode_calls(case, tiles))
    if "flash" in settings.kernels:
        case = cases.flash(True)[0]
        for part in ("forward", "dkv", "dq"):
            side = 1 if part == "forward" else 2
            best_of(part, case, cases.flash_tilings(part, settings.quick), lambda tiles, side=side: (
                lambda calls: (calls[0], calls[side]))(flash_calls(case, tiles=tiles)))  # fmt: skip


def decode_cases(settings: Settings, quick: bool) -> list[cases.Decode]:
    kinds = {"decode": cases.decode, "latent": cases.latent}
    return [case for kind, found in kinds.items() if kind in settings.kernels for case in found(quick)]


def on_gpu(record: Record, settings: Settings) -> None:
    decoding = decode_cases(settings, settings.quick)
    flash_cases = cases.flash(settings.quick) if "flash" in settings.kernels else []
    if settings.tune:
        return tune(record, settings)
    for dtype in ("float32", "bfloat16") if settings.check else ("bfloat16",):
        for compare, found in ((check_decode, decoding), (check_flash, flash_cases)):
            for case in (case.of(dtype) for case in found):
                run = lambda case=case, compare=compare: compare(record, case)  # noqa: E731
                record.guard(run, name="check", case=case.name, dtype=dtype, passed=False)
    if settings.check:
        return
    copy, matmul = machine_rates(record, settings)
    for case in decoding:
        record.guard(lambda case=case: bench_decode(record, case, settings, copy), name="decode", case=case.name)
    for case in flash_cases:
        record.guard(lambda case=case: bench_flash(record, case, settings, matmul), name="flash", case=case.name)
    if settings.peers:
        for case in [case for case in decoding if not case.U][:1]:
            decode_peers(record, case, settings, copy)
        for case in flash_cases:
            flash_peers(record, case, settings, matmul)


def in_the_interpreter(record: Record, settings: Settings) -> None:
    """The comparisons of --check on shapes that the interpreter can do."""
    os.environ["TRITON_INTERPRET"] = "1"
    from scripts.benchmarks import interpreted_triton

    interpreted_triton.install()
    for dtype in ("float32", "bfloat16"):
        for kind, found in (("decode", cases.tiny_decode), ("latent", cases.tiny_latent)):
            for case in found() if kind in settings.kernels else []:
                check_decode(record, case.of(dtype))
        for case in cases.tiny_flash() if "flash" in settings.kernels else []:
            check_flash(record, case.of(dtype), "triton")


def main(settings: Settings) -> None:
    record = Record(settings.out, about_this_run())
    print(json.dumps(record.about), flush=True)
    if jax.default_backend() == "gpu":
        on_gpu(record, settings)
    else:
        print("no GPU: comparing with the reference in Triton's interpreter, measuring nothing")
        in_the_interpreter(record, settings)
    failed = [row for row in record.rows if row.get("passed") is False]
    if failed:
        raise SystemExit(f"{len(failed)} results differ from the reference")


if __name__ == "__main__":
    command.run(main, Settings)
