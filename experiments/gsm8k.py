"""GSM8K: accuracy against KV reads on 1,319 problems of school arithmetic, by majority vote.

examples:
  python -m experiments.gsm8k --model org/name --chains 1 4 --problems 200
  python -m experiments.gsm8k --model file.gguf --data gsm8k_test.jsonl --policy full tova --budget 0.25 --limit 50
  python -m experiments.gsm8k --model org/name --gate gate.safetensors --cr 1 4 8 --chains 1 4

An interrupted run continues when the same command is given again.
"""

import sys

from experiments import job
from experiments.tasks import gsm8k

EXPERIMENT = job.Experiment("gsm8k", gsm8k.HUB, gsm8k.load, max_length=1024)


def main(arguments: list[str] | None = None) -> int:
    return job.main(EXPERIMENT, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
