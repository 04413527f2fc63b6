"""MATH-500: accuracy against KV reads on 500 problems of the MATH test set, by majority vote.

examples:
  python -m experiments.math500 --model org/name --chains 1 4 8 --max-length 8192
  python -m experiments.math500 --model file.gguf --data math500.jsonl --problems 100 --seed 1

An interrupted run continues when the same command is given again.
"""

import sys

from experiments import job
from experiments.tasks import math500

EXPERIMENT = job.Experiment("math500", math500.HUB, math500.load, max_length=4096)


def main(arguments: list[str] | None = None) -> int:
    return job.main(EXPERIMENT, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
