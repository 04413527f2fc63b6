"""Which tokens DMS keeps to the end: by layer and KV head, and by position.

Decisions are those of one forward pass over windows of a text under the hard mask, which is what decoding does step
by step. The mini model's windows are its own held-out problems with their right chains.

examples:
  python -m experiments.retention
  python -m experiments.retention --cr 8 --limit 512
  python -m experiments.retention --model folder --data text.txt --length 8192 --limit 16

`python -m paper_figures.retention RUN/results.json` draws the result.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from dms_jax import dms
from dms_jax.config import require
from dms_jax.models.transformer import Decoder, arange_positions, hard_eviction
from experiments import command, fidelity
from experiments import variants as variants_module
from experiments.chains import fingerprint
from experiments.command import MINI, metavar
from experiments.fidelity import Window
from experiments.run import digest, open_run
from experiments.variants import Loaded, batches

MEANING = "shares of the tokens seen that are live at the end of a window, those inside the eviction window included"


@dataclasses.dataclass(frozen=True)
class Config(command.ModelOptions):
    data: Annotated[Path | None, metavar("FILE")] = None
    """text file; mini has its own problems"""
    cr: Annotated[float | None, metavar("CR")] = None
    """the member of a retrofitted family; default: the model as it is; for mini, 4"""
    length: Annotated[int, metavar("TOKENS")] = 1024
    """tokens of a window; default: 1024; mini's problems have a length of their own"""
    bins: Annotated[int, metavar("N")] = 16
    """ranges of positions; default: 16"""
    limit: Annotated[int, metavar("N")] = 128
    """windows, from the beginning of the text; default: 128"""
    batch_size: Annotated[int, metavar("N")] = 16
    """windows at once; default: 16"""


@functools.partial(jax.jit, static_argnames=("model_config", "config"))
def live_at_end(params, tokens, lengths, model_config, config):
    """`[L, B, K, T]` bool: the tokens that are still live once a sequence's last token has come in."""
    positions = arange_positions(tokens)
    attend = hard_eviction(config, lengths)
    _, alphas = Decoder(model_config, config).apply({"params": params}, tokens, positions, attend)
    last = lengths[:, None] - 1
    seen = jnp.where(positions <= last, positions, -1)  # padding is an empty slot

    def live(alpha):
        B, K, T = alpha.shape
        return dms.visible(last, jnp.broadcast_to(seen[:, None], (B, K, T)), alpha, config.window)[:, :, 0]

    return jnp.stack([live(alpha) for alpha in alphas])


def measure(loaded: Loaded, windows: Sequence[Window], batch_size: int, bins: int) -> dict:
    """`by_layer_head` [L][K] and `by_position`: edges [bins + 1] and live_share [L][bins], mean of KV heads."""
    lm, longest = loaded.lm, max(len(window.tokens) for window in windows)
    edges = np.linspace(0, longest, bins + 1).round().astype(int)
    L, K = lm.config.num_layers, lm.config.num_kv_heads
    live, counts = np.zeros((L, K, longest), np.int64), np.zeros(longest, np.int64)
    for group, padded in track(list(batches(windows, batch_size)), "measuring"):
        lengths = np.array([len(window.tokens) for window in padded], np.int32)
        tokens = np.zeros((len(padded), longest), np.int32)
        for row, window in zip(tokens, padded, strict=True):
            row[: len(window.tokens)] = window.tokens
        kept = np.asarray(live_at_end(lm.params, tokens, lengths, lm.config, loaded.dms))[:, : len(group)]
        live += kept.sum(axis=1)
        counts += (np.arange(longest) < lengths[: len(group), None]).sum(axis=0)
    by_bin = np.add.reduceat(live.mean(axis=1), edges[:-1], axis=1) / np.add.reduceat(counts, edges[:-1])
    return {
        "by_layer_head": (live.sum(axis=2) / counts.sum()).tolist(),
        "by_position": {"edges": edges.tolist(), "live_share": by_bin.tolist()},
        "achieved_cr": float(counts.sum() * L * K / live.sum()),
    }


def execute(config: Config, console: Console, start: float) -> int:
    """The whole job; returns the exit status."""
    mini = config.model == MINI
    for key in ("limit", "batch_size", "bins"):
        require(getattr(config, key) > 0, key, getattr(config, key), "must be positive")
    require(mini == (config.data is None), "data", config.data, "is needed, but for the mini model, with its problems")
    ratio = 4.0 if mini and config.cr is None else config.cr
    config = dataclasses.replace(config, cr=ratio, dtype=config.dtype or command.default_dtype())
    eviction = config.budget, config.protect_prompt, config.evict_every  # errors: DMS has none of them
    chosen = variants_module.variants(("dms",), () if ratio is None else (ratio,), *eviction)
    (loaded,) = variants_module.load(config.model, chosen, config.dtype, config.gate, config.window)
    windows = fidelity.load_windows(config, loaded.lm.tokenizer, 1)
    longest = max(len(window.tokens) for window in windows)
    require(config.bins <= longest, "bins", config.bins, f"more than the {longest} positions")
    saved = {**command.identity(config), "limit": config.limit, "weights": fingerprint(loaded.lm)}
    run = open_run(config.runs, "retention", {**saved, "text": digest(windows[0])}, config.run_dir, config.fresh)
    try:
        entry = run.started()
        measured = measure(loaded, windows, config.batch_size, config.bins)
        head = {"experiment": "retention", "command": entry["command"], "policy": "dms", "cr": loaded.lm.cr}
        about = {"meaning": MEANING, "problems": len(windows), "config": run.config, "environment": entry}
        run.finish({**head, **measured, **about})
    finally:
        run.close()
    console.print(f"{len(windows)} windows, achieved CR {measured['achieved_cr']:.2f}; live at the end, in percent:")
    for layer, heads in enumerate(measured["by_layer_head"]):
        console.print(f"layer {layer:3}  " + "  ".join(f"{100 * share:5.1f}" for share in heads), highlight=False)
    console.print(f"run folder: {run.path}", soft_wrap=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return command.main(Config, execute, __doc__, "experiments.retention", arguments)


if __name__ == "__main__":
    sys.exit(main())
