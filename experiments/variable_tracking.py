"""Variable tracking in RULER's form: chains of assignments in a long text, under an eviction policy.

The mini model can name no variables that share a value: it knows the form of its own task only. So it solves that,
which is tracking variables through a program, and is scored by the share of variables whose value it states right
(experiments/tasks/mini_recall.py).

examples:
  python -m experiments.variable_tracking
  python -m experiments.variable_tracking --model org/name --length 4096 8192 --policy full dms
  python -m experiments.variable_tracking --model file.gguf --policy full streaming --budget 256 512 --length 2048

An interrupted run continues when the same command is given again.
"""

import sys

from experiments import recall
from experiments.tasks import variable_tracking

EXPERIMENT = recall.Experiment("variable_tracking", variable_tracking.TASKS, variable_tracking.form, "mini_chain")


def main(arguments: list[str] | None = None) -> int:
    return recall.main(EXPERIMENT, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
