"""GPQA Diamond: accuracy against KV reads on 198 questions with four options, by majority vote.

The order of a question's options is fixed; the answer is the letter of the last line 'Answer: X'.

examples:
  python -m experiments.gpqa --model org/name --chains 1 4 --max-length 8192
  python -m experiments.gpqa --model folder --data gpqa_diamond.csv --problems 50

An interrupted run continues when the same command is given again.
"""

import sys

from experiments import job
from experiments.tasks import gpqa

EXPERIMENT = job.Experiment("gpqa", gpqa.HUB, gpqa.load)


def main(arguments: list[str] | None = None) -> int:
    return job.main(EXPERIMENT, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
