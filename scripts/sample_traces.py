"""Lets a model write its own chains of thought, to be distilled on: one JSON line a chain, with `messages`.

A chain depends on the seed, its row and its number alone; an interrupted run goes on with the rows of which
chains are missing, those included that were cut off and left out.

example:
  python -m scripts.sample_traces --model org/name --data problems.jsonl --out traces.jsonl --chains 2
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import dms_jax
from dms_jax.config import Count, in_file, require, take
from dms_jax.files import write_atomically
from dms_jax.inference import generation, sampling
from dms_jax.inference.generation import GenerationConfig
from dms_jax.inference.scheduler import Job
from dms_jax.training.config import SourceConfig
from dms_jax.training.documents import open_rows, prompt_of
from dms_jax.weights.json_files import parse_json
from dms_jax.weights.text import encode_turn, has_chat
from scripts import command


@dataclass(frozen=True)
class Settings:
    """How chains are sampled.

    Attributes:
      model: what `dms_jax.load` takes; it runs with the full cache.
      data: JSONL or parquet file, or hub name, with the prompts.
      prompt: the field with the prompt; default: the first of problem, question, prompt and instruction.
      instruction: what stands on a line of its own after each prompt, such as the one of the task to come.
      limit: how many rows are used.
      chains: chains a prompt.
      max_num_seqs: chains that are decoded at the same time.
      finished_only: leave out chains that were cut off at max_new_tokens.
    """

    model: str
    data: str
    out: Path
    prompt: str = ""
    instruction: str = ""
    limit: int | None = None
    chains: int = 1
    max_num_seqs: int = 64
    max_new_tokens: int = 2048
    temperature: float = 0.6
    top_p: float = 0.95
    finished_only: bool = True
    seed: int = 0
    dtype: str = "bfloat16"

    def generation(self) -> GenerationConfig:
        return GenerationConfig(
            *(self.max_new_tokens, self.temperature, self.chains, self.seed, "full"),
            top_p=self.top_p,
            max_num_seqs=self.max_num_seqs,
        )


def encoded(tokenizer: Any, prompt: str) -> list[int]:
    """A user's turn, with what opens the answer."""
    return encode_turn(tokenizer, prompt if has_chat(tokenizer) else prompt + "\n")


def resume(out: Path) -> set[tuple[int, int]]:
    """The rows and chain numbers that are there; a line that was cut off is removed.

    Raises:
      ConfigError: another line that is no chain; names it.
    """
    if not out.exists():
        return set()
    lines = [line for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    done = set()
    for number, line in enumerate(lines, 1):
        with in_file(f"{out}, line {number}"):
            chain = parse_json(line, "line")
            done.add((take(chain, "row", Count), take(chain, "chain", Count)))
    write_atomically(out, b"".join(lines))
    return done


def results(lm: dms_jax.LM, prompts: dict[int, list[int]], config: GenerationConfig):
    """Finished chains as they come; `name` is the row."""
    chains = config.chains
    rows = np.repeat(list(prompts), chains)
    keys = np.asarray(sampling.chain_keys(config.seed, rows, np.tile(np.arange(chains), len(prompts))))
    keys = keys.reshape(len(prompts), chains, 2)
    jobs = [Job(ids, keys[n], config.max_new_tokens, row) for n, (row, ids) in enumerate(prompts.items())]
    jobs.sort(key=lambda job: len(job.prompt))
    return generation.build(lm, max(map(len, prompts.values())) + config.max_new_tokens, config).run(jobs)


def main(settings: Settings) -> None:
    """Writes OUT, which scripts.retrofit takes as --data."""
    chains, config = settings.chains, settings.generation()
    require(settings.limit is None or settings.limit > 0, "limit", settings.limit, "must be positive")
    records = open_rows(SourceConfig(settings.data))
    count = min(len(records), settings.limit or len(records))
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    done = resume(settings.out)
    rows = [row for row in range(count) if not all((row, chain) in done for chain in range(chains))]
    texts = {row: prompt_of(records[row], settings.prompt, f"{settings.data}, row {row}") for row in rows}
    if settings.instruction:
        texts = {row: f"{text.strip()}\n{settings.instruction}" for row, text in texts.items()}
    if not texts:
        return
    lm = dms_jax.load(settings.model, dtype=settings.dtype)
    require(lm.tokenizer is not None, "model", settings.model, "has no tokenizer")
    prompts = {row: encoded(lm.tokenizer, text) for row, text in texts.items()}
    total = count * chains
    with settings.out.open("a") as file, tqdm(total=total, initial=total - len(rows) * chains, unit="chain") as bar:
        for result in results(lm, prompts, config):
            finished = result.tokens[-1] in lm.config.eos_ids
            if (finished or not settings.finished_only) and (result.name, result.chain) not in done:
                answer = lm.tokenizer.decode(result.tokens, skip_special_tokens=True)
                chat = [{"role": "user", "content": texts[result.name]}, {"role": "assistant", "content": answer}]
                about = {"row": result.name, "chain": result.chain, "tokens": len(result.tokens), "finished": finished}
                file.write(json.dumps({**about, "messages": chat}) + "\n")
                file.flush()
            bar.update()


if __name__ == "__main__":
    command.run(main, Settings)
