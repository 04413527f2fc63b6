"""What scripts/benchmarks/bench_kernels.py measures the kernels against: PyTorch on the same GPU, in the same process.

Every peer is a pair of functions without arguments, forward and forward with backward, over inputs made here from
numpy arrays. FlexAttention gets the delayed-eviction mask itself; PyTorch's scaled_dot_product_attention knows no such
mask but the causal one, so it shows what the mask costs.
"""

import statistics
from collections.abc import Callable

import numpy as np

DEVICE = "cuda"


def event_time(call: Callable[[], object], repeats: int, calls: int = 10) -> float:
    """Median seconds of one call between CUDA events, `calls` of them between each pair, after two to warm up."""
    import torch

    call(), call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def copy_rate(repeats: int, size: int = 2**30) -> float:
    """Bytes per second, read and written, of a device-to-device copy of `size` bytes."""
    import torch

    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / event_time(lambda: target.copy_(source), repeats)


def to_device(x: np.ndarray, dtype=None):
    import torch

    tensor = torch.from_numpy(np.array(x)).to(DEVICE)
    return tensor if dtype is None else tensor.to(getattr(torch, dtype))


def heads_first(x: np.ndarray, dtype: str):
    """`[B, T, H, D]` float32 -> `[B, H, T, D]` on the GPU."""
    return to_device(x, dtype).transpose(1, 2).contiguous()


def forward_and_both(attend: Callable, q, k, v, dout) -> tuple[Callable, Callable]:
    import torch

    def forward():
        with torch.no_grad():
            return attend(q, k, v)

    def both():
        leaves = [x.detach().requires_grad_(True) for x in (q, k, v)]
        return torch.autograd.grad(attend(*leaves), leaves, dout)

    return forward, both


def flex(q, k, v, dout, log_keep_prob, window: int, hard: bool, dtype: str) -> tuple[Callable, Callable]:
    """torch FlexAttention, compiled, with the delayed-eviction mask: a mask where hard, a score bias where soft.

    The bias takes no gradient here, which is in this peer's favour.
    """
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, T, H, _ = q.shape
    group = H // k.shape[2]
    logs = to_device(log_keep_prob)
    kept = logs > -1e29

    def causal(b, h, i, j):
        return i >= j

    def delayed(b, h, i, j):
        return (i >= j) & ((i - j <= window) | kept[b, h // group, j])

    def bias(score, b, h, i, j):
        return torch.where(i - j > window, score + logs[b, h // group, j], score)

    per_head = (B, H) if hard else (None, None)
    mask = create_block_mask(delayed if hard else causal, *per_head, T, T, device=DEVICE, _compile=DEVICE != "cpu")
    compiled = torch.compile(flex_attention)

    def attend(q, k, v):
        return compiled(q, k, v, score_mod=None if hard else bias, block_mask=mask, enable_gqa=True)

    return forward_and_both(attend, *(heads_first(x, dtype) for x in (q, k, v, dout)))


def causal_sdpa(q, k, v, dout, dtype: str) -> tuple[Callable, Callable]:
    """torch scaled_dot_product_attention, causal: no eviction."""
    import torch

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return forward_and_both(attend, *(heads_first(x, dtype) for x in (q, k, v, dout)))


def decode_sdpa(q, keys: int, kv_heads: int, dtype: str) -> Callable:
    """One query token over `keys` keys that every head has, in one block of memory: no pages, no unequal lengths."""
    import torch

    B, H, D = q.shape
    queries = to_device(q, dtype)[:, :, None]
    k, v = (torch.randn(B, kv_heads, keys, D, device=DEVICE, dtype=getattr(torch, dtype)) for _ in range(2))

    def call():
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(queries, k, v, enable_gqa=True)

    return call


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that one call allocates beyond what was allocated before."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
