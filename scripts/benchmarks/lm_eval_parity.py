"""The scores of `experiments.lm_eval_adapter` beside those of lm-evaluation-harness's own HF backend, request by
request.

The model is saved as a Hugging Face folder, which the harness loads with torch; both score the endings of HellaSwag's
contexts in float32. Needs the extras `experiments` and `test`.

example:
  python -m scripts.benchmarks.lm_eval_parity --model file.gguf --data hellaswag_val.jsonl --out record.json
"""

import dataclasses
import tempfile
import types
from pathlib import Path

import numpy as np

from dms_jax.config import require
from experiments.run import environment, file_digest, write_json
from experiments.tasks.data import rows
from scripts import command


@dataclasses.dataclass(frozen=True)
class Config:
    model: str
    """a hub name, a folder in Hugging Face's format, or a .gguf file"""
    data: str
    """HellaSwag's rows: ctx, endings, label"""
    out: Path
    """JSON file for the record"""
    requests: int = 200
    """continuations to score, four of each row"""
    batch_size: int = 8
    max_length: int = 512


def questions(config: Config) -> tuple[list, list[int]]:
    """Requests as the harness makes them, four of each row, and the right ending of each row."""
    require(config.requests % 4 == 0, "requests", config.requests, "a row has four endings")
    chosen = [row.fields for row, _ in zip(rows(config.data), range(config.requests // 4), strict=False)]
    require(4 * len(chosen) == config.requests, "requests", config.requests, f"the data has only {len(chosen)} rows")
    pairs = [(row["ctx"], f" {ending}") for row in chosen for ending in row["endings"]]
    return [types.SimpleNamespace(args=pair) for pair in pairs], [int(row["label"]) for row in chosen]


def compare(config: Config) -> dict:
    """The record: differences of the scores, and what each backend would report as accuracy."""
    from lm_eval.models.huggingface import HFLM

    import dms_jax
    from experiments.lm_eval_adapter import DmsLM

    requests, labels = questions(config)
    options = {"dtype": "float32", "batch_size": config.batch_size, "max_length": config.max_length}
    ours = DmsLM(model=config.model, **options)
    with tempfile.TemporaryDirectory() as folder:
        dms_jax.save(ours.loaded.lm, folder)
        theirs = HFLM(folder, device="cpu", **options)
    found, wanted = (np.array(model.loglikelihood(requests)) for model in (ours, theirs))
    choices = [scores[:, 0].reshape(-1, 4).argmax(axis=1) for scores in (found, wanted)]
    return {
        "requests": len(requests),
        "largest_difference": float(np.abs(found - wanted)[:, 0].max()),
        "smallest_and_largest_score": [float(wanted[:, 0].min()), float(wanted[:, 0].max())],
        "greedy_flags_equal": int((found[:, 1] == wanted[:, 1]).sum()),
        "choices_equal": int((choices[0] == choices[1]).sum()),
        "questions": len(labels),
        "accuracy": {name: float(np.mean(c == labels)) for name, c in zip(("dms_jax", "hf"), choices, strict=True)},
    }


def main(config: Config) -> None:
    record = {"benchmark": "lm_eval_parity", "model_sha256": file_digest(config.model), **compare(config)}
    write_json(
        config.out, {**record, "max_length": config.max_length, "dtype": "float32", "environment": environment()}
    )
    print(record)


if __name__ == "__main__":
    command.run(main, Config)
