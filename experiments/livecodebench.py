"""LiveCodeBench: pass@k and pass@all against KV reads on contest problems, run in a sandbox (bubblewrap).

A run's record names the release and the dates of its contests; by default those of the paper.

examples:
  python -m experiments.livecodebench --model org/name --chains 1 4 --max-length 16384
  python -m experiments.livecodebench --model folder --data test6.jsonl --start 2025-01-01 --end 2025-04-30 --limit 20

An interrupted run continues when the same command is given again.
"""

import dataclasses
import sys
from typing import Annotated, Any, Literal

from experiments import job
from experiments.command import metavar
from experiments.tasks import livecodebench
from experiments.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class Options(job.Options):
    data: Annotated[str | None, metavar("DATA")] = None
    """a .jsonl file, a folder with a release's files, or a hub data set; default: the hub's"""
    release: Annotated[Literal[livecodebench.RELEASES], metavar("NAME")] = "release_v5"  # pyright: ignore
    """release_v1 to release_v6, of which each contains the earlier ones; default: release_v5"""
    start: Annotated[str, metavar("DATE")] = "2024-08-01"
    """first day of a contest; default: 2024-08-01"""
    end: Annotated[str, metavar("DATE")] = "2025-01-31"
    """last day of a contest; default: 2025-01-31"""


@dataclasses.dataclass(frozen=True)
class LiveCodeBench(job.Experiment):
    def load(self, options: Any) -> Task:
        return livecodebench.load(options.data, options.release, options.start, options.end)


EXPERIMENT = LiveCodeBench("livecodebench", livecodebench.HUB, livecodebench.load, max_length=16384)


def main(arguments: list[str] | None = None) -> int:
    return job.main(EXPERIMENT, __doc__, arguments, Options)


if __name__ == "__main__":
    sys.exit(main())
