"""The main job: accuracy against KV reads of L-W-CR configurations, vanilla and DMS.

Without arguments it runs the bundled miniature reasoning model on held-out problems for a few minutes: 1, 4 and 8
chains of up to 448 tokens at CR 1, 4 and 8, temperature 1, for 4.5 minutes without --limit. With `--model` and `--data`
it runs a real model on AIME 2024 or 2025, or on data of their form.

examples:
  python -m experiments.aime
  python -m experiments.aime --limit 512
  python -m experiments.aime --model org/name --data aime25 --max-length 8192 --chains 1 4
  python -m experiments.aime --model folder --data problems.jsonl --policy full --limit 5 --max-length 256
  python -m experiments.aime --sweep --batch-size 512 --workers 8

--sweep compares every policy at several compression ratios, as configs/aime_sweep.yaml says.
An interrupted run continues when the same command is given again.
"""

import dataclasses
import sys
from typing import Annotated

from experiments import job, mini_job
from experiments.command import MINI, metavar
from experiments.tasks import aime


@dataclasses.dataclass(frozen=True)
class Options(job.Options):
    model: Annotated[str, metavar("MODEL")] = MINI
    """mini (the default, bundled), a hub name, a folder in Hugging Face's format, or a .gguf file"""
    data: Annotated[str | None, metavar("DATA")] = None
    """aime24 (the default), aime25, a .jsonl, .json, .csv or .parquet file, or a hub data set
    (org/name[/subset][:split]), with problem, answer, id; mini for the problems of the bundled model, which has no
    others"""


EXPERIMENT = mini_job.WithMini("aime", aime.HUB["aime24"], aime.load)


def main(arguments: list[str] | None = None) -> int:
    return job.main(EXPERIMENT, __doc__, arguments, Options)


if __name__ == "__main__":
    sys.exit(main())
