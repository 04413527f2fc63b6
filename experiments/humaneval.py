"""HumanEval: pass@k and pass@all against KV reads on 164 Python functions, run in a sandbox (bubblewrap).

examples:
  python -m experiments.humaneval --model org/name --chains 1 8
  python -m experiments.humaneval --model file.gguf --data human_eval.jsonl --temperature 0 --limit 20

An interrupted run continues when the same command is given again.
"""

import sys

from experiments import job
from experiments.tasks import humaneval

EXPERIMENT = job.Experiment("humaneval", humaneval.HUB, humaneval.load, max_length=1024)


def main(arguments: list[str] | None = None) -> int:
    return job.main(EXPERIMENT, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
