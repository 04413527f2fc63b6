"""Lets a model write its own chains of thought, to be distilled on: one JSON line a chain, with `messages`.

An interrupted run continues with the batch of prompts at which it was; batches have seeds of their own.

example:
  python -m scripts.sample_traces --model org/name --data problems.jsonl --out traces.jsonl --chains 2
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

import dms_jax
from dms_jax.config import ConfigError, require
from dms_jax.training.config import SourceConfig
from dms_jax.training.documents import open_rows, prompt_of

Write = Callable[[Sequence[list[int]], int], list[list[list[int]]]]


def writer(lm: dms_jax.LM, max_new_tokens: int, temperature: float, top_p: float, chains: int) -> Write:
    """`(prompts, seed) -> new tokens [prompt][chain]`: the one place that knows what generates."""

    def write(prompts: Sequence[list[int]], seed: int) -> list[list[list[int]]]:
        return dms_jax.generate(
            lm, prompts, max_new_tokens, temperature, chains, seed, policy="full", top_p=top_p
        ).tokens

    return write


def encoded(tokenizer: Any, prompt: str) -> list[int]:
    """A user's turn, with what opens the answer."""
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(prompt + "\n")["input_ids"])
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def resume(out: Path, batch: int) -> int:
    """The row to go on from: the first of the batch that was being written, whose lines are removed."""
    if not out.exists():
        return 0
    lines = [line for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    rows = [json.loads(line)["row"] for line in lines]
    first = max(rows, default=0) // batch * batch
    new = out.with_name(out.name + ".new")
    new.write_bytes(b"".join(line for line, row in zip(lines, rows, strict=True) if row < first))
    new.replace(out)
    return first


def main(
    model: str,
    data: str,
    out: Path,
    prompt: str = "",
    limit: int | None = None,
    chains: int = 1,
    batch: int = 8,
    max_new_tokens: int = 2048,
    temperature: float = 0.6,
    top_p: float = 0.95,
    finished_only: bool = True,
    seed: int = 0,
    dtype: str = "bfloat16",
) -> None:
    """Writes OUT, which scripts.retrofit takes as --data.

    Args:
      model: what `dms_jax.load` takes; it runs with the full cache.
      data: JSONL or parquet file, or hub name, with the prompts.
      prompt: the field with the prompt; default: the first of problem, question, prompt and instruction.
      limit: how many rows are used.
      chains: chains a prompt.
      batch: prompts at a time.
      finished_only: leave out chains that were cut off at max_new_tokens.
    """
    require(batch > 0, "batch", batch, "must be positive")
    records = open_rows(SourceConfig(data))
    count = min(len(records), limit or len(records))
    lm = dms_jax.load(model, dtype=dtype)
    require(lm.tokenizer is not None, "model", model, "has no tokenizer")
    write = writer(lm, max_new_tokens, temperature, top_p, chains)
    out.parent.mkdir(parents=True, exist_ok=True)
    first = resume(out, batch)
    with out.open("a") as file, tqdm(total=count, initial=first, unit="prompt") as bar:
        for start in range(first, count, batch):
            rows = range(start, min(start + batch, count))
            prompts = [prompt_of(records[row], prompt, f"{data}, row {row}") for row in rows]
            tokens = write([encoded(lm.tokenizer, text) for text in prompts], seed + start)
            for row, text, own in zip(rows, prompts, tokens, strict=True):
                for chain in own:
                    finished = bool(chain) and chain[-1] in lm.config.eos_ids
                    if finished or not finished_only:
                        answer = lm.tokenizer.decode(chain, skip_special_tokens=True)
                        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
                        line = {"row": row, "tokens": len(chain), "finished": finished, "messages": chat}
                        file.write(json.dumps(line) + "\n")
            file.flush()
            bar.update(len(prompts))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ConfigError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
