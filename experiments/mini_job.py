"""The main job on the bundled miniature reasoning model, where it differs from a job on a real one."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from experiments import job
from experiments.command import MINI
from experiments.run import digest
from experiments.tasks import aime
from experiments.tasks.base import Task

SHIPPED = Path(__file__).resolve().parents[1] / "paper_figures" / "results" / "mini"
# CR -> numbers of chains. Two chains vote as the first of them does, so W = 2 would show nothing.
CELLS = {1.0: (1, 4), 4.0: (1, 4), 8.0: (1, 4, 8)}
PROBLEMS = 2048  # at most, when a time budget ends the run
MINUTES = 4.5


def on_mini(options: Any) -> bool:
    """Whether the problems are the mini task's: of the bundled model, or of another one trained on them."""
    return MINI in (options.model, options.data)


@dataclasses.dataclass(frozen=True)
class WithMini(job.Experiment):
    """A task for real models, with the mini model's own problems where that is the model."""

    def defaults(self, options: Any) -> dict[str, Any]:
        import jax

        from dms_jax.config import require

        usual = super().defaults(options)
        if not on_mini(options):
            return usual
        require(options.data in (None, MINI), "data", options.data, "the mini model has its own problems")
        require(not options.problems, "problems", options.problems, "mini's are drawn already: give --limit")
        # The programs of a small model keep only one core busy.
        workers = min(2, os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1
        minutes = MINUTES if options.limit is None else None
        own = {"max_length": 448, "temperature": 1.0, "top_p": 1.0, "minutes": minutes, "workers": workers}
        return {**usual, "data": None, **own}

    def load(self, options: Any) -> Task:
        return aime.mini_task(options.limit or PROBLEMS) if on_mini(options) else super().load(options)

    def data_digest(self, task: Task) -> str:
        if isinstance(task, aime.MiniTask):
            return digest([record[:3] for record in task.records[:1]])  # the stream follows from its beginning
        return super().data_digest(task)

    def cells(self, options: Any) -> dict[float | None, tuple[int, ...]]:
        if not on_mini(options):
            return super().cells(options)
        ratios = options.cr or tuple(CELLS)
        return {cr: tuple(sorted(options.chains or CELLS.get(cr, (1,)))) for cr in ratios}

    def run_name(self, options: Any) -> str:
        return "sweep" if options.sweep else self.name

    def shipped(self, options: Any) -> Path | None:
        return SHIPPED if options.model == MINI and not options.sweep else None
