"""Needle in a haystack in RULER's form: is what was hidden in a long text still found under an eviction policy?

The mini model knows no English; it is asked to copy a value that its own chain of arithmetic set long ago
(experiments/tasks/mini_recall.py).

examples:
  python -m experiments.niah
  python -m experiments.niah --model org/name --length 4096 --data essays.txt
  python -m experiments.niah --model file.gguf --task niah_single_1 --policy full tova --budget 0.25 --length 1024 2048

An interrupted run continues when the same command is given again.
"""

import sys

from experiments import recall
from experiments.tasks import niah

EXPERIMENT = recall.Experiment(
    "niah", niah.TASKS, lambda name, length, encode, essay: niah.form(name, length, essay), "mini_copy"
)


def main(arguments: list[str] | None = None) -> int:
    return recall.main(EXPERIMENT, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
