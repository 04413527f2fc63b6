"""What an experiment shows on the terminal: progress, the table, and the shipped results beside it."""

import json
import threading
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dms_jax.inference.scheduler import Progress as EngineProgress
from experiments import stats
from paper_figures.rows import percent

SOLVED = {
    "vote": "Accuracy: majority vote of the W chains",
    "pass": "Accuracy: any of the W programs passes all tests (pass@all); pass@1: the share of the W that do",
}


def caption(metric: str = "vote") -> str:
    """What the columns of the table mean."""
    return (
        f"Configuration: L-W-CR, L in units of 1,024 new tokens. {SOLVED[metric]}, with its "
        f"95% interval ({stats.METHOD}); one without width says that every problem came out alike. Gain: in points "
        f"over the first row, problem by problem. KV reads (decoding only), peak live tokens and tokens made: averaged "
        f"over layers, KV heads and problems, summed over a problem's chains. Achieved CR: tokens seen over tokens "
        f"live at the end, mean of chains. Rows of one model share chains: W=3 is the first three of a larger W's."
    )


def print_results(console: Console, rows: list[dict], title: str, columns: tuple | None = None) -> None:
    """Rows under `columns`, those of `stats.table` by default; a narrow terminal goes without some of them."""
    columns, wide = columns or COLUMNS, console.width >= WIDE
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    for name, justify, narrow, _ in columns:
        if wide or narrow:
            table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for _, _, narrow, cell in columns if wide or narrow))
    console.print(table)


def print_shipped(console: Console, folder: Path) -> None:
    """The recorded runs of a folder, each labelled with its size and the command that made it."""
    for path in sorted(folder.glob("*.json")):
        shipped = json.loads(path.read_text())
        title = f"shipped: {shipped['problems']} problems, made by `{shipped['command']}`"
        print_results(console, shipped["rows"], title)


# Name, justification, shown on a narrow terminal too, text of a row. A narrow one goes without what the L-W-CR
# and the title say, and the gain.
COLUMNS = (
    ("L-W-CR", "left", True, lambda row: row["config"]),
    ("policy", "left", True, lambda row: row["policy"]),
    ("CR", "right", False, lambda row: "?" if row["cr"] is None else f"{row['cr']:g}"),
    ("chains", "right", False, lambda row: str(row["chains"])),
    ("accuracy %", "right", True, lambda row: percent(row["accuracy"])),
    ("gain", "right", False, lambda row: percent(row["gain"], "+")),
    ("KV reads", "right", True, lambda row: f"{row['kv_reads']:,.0f}"),
    ("peak", "right", True, lambda row: f"{row['peak_tokens']:,.0f}"),
    ("achieved CR", "right", True, lambda row: f"{row['achieved_cr']:.2f}"),
    ("tokens", "right", True, lambda row: f"{row['tokens']:,.0f}"),
    ("problems", "right", False, lambda row: str(row["problems"])),
)
PASS_COLUMNS = (*COLUMNS[:6], ("pass@1", "right", True, lambda row: percent(row["pass_at"]["1"])), *COLUMNS[6:])
WIDE = 132
SECONDS_SILENT = 30.0


class ProgressBar:
    """A bar over sequences, or over seconds where there is a time budget, with tokens per second and an ETA."""

    def __init__(self, console: Console, sequences: int, seconds: float | None, start: float):
        self.console, self.sequences, self.seconds, self.start = console, sequences, seconds, start
        self.tokens = self.chains = self.problems = 0
        self.cache = ""
        self._lock = threading.Lock()  # workers report tokens at the same time
        self.first_token = self.said = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}, {task.fields[speed]:,.0f} tokens/s{task.fields[cache]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task("loading", total=seconds or sequences, done=self._done(), speed=0, cache="")

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def on_progress(self, progress: EngineProgress) -> None:
        """An engine made more tokens; what it holds is shown for the engine that reported last."""
        pages = f", {progress.pages_used}/{progress.pages} pages" if progress.pages else ""
        self.cache = f", {progress.live_tokens:,.0f} live tokens{pages}"
        self.on_tokens(progress.new_tokens)

    def on_tokens(self, made: int) -> None:
        """So many more tokens were made."""
        with self._lock:
            self.tokens += made
        self._update()

    def on_saved(self, chains: int) -> None:
        """So many chains are done. A log file gets a line now and then."""
        self.chains = chains
        self._update()
        if time.monotonic() - self.said > SECONDS_SILENT:
            self._say()

    def on_block(self, problems: int, chains: int) -> None:
        """A block is done; the totals so far. A log file gets a line where a terminal has the bar."""
        self.problems, self.chains = problems, chains
        self._update()
        self._say()

    def _done(self) -> str:
        """Problems are counted at the end of a block, chains as they end."""
        return (f"{self.problems} problems, " if self.problems else "") + f"{self.chains} chains"

    def _say(self) -> None:
        self.said = time.monotonic()
        if not self.console.is_terminal:
            total = f"{self.seconds:.0f} s" if self.seconds else f"{self.sequences} chains"
            said = f"{self._elapsed():.0f} s, {self._done()} (of {total}), {self._speed():,.0f} tokens/s"
            self.console.print(said, soft_wrap=True)

    def describe(self, text: str) -> None:
        """What is running now."""
        self.bar.update(self.task, description=text)

    def _elapsed(self) -> float:
        return time.monotonic() - self.start

    def _speed(self) -> float:
        return self.tokens / max(time.monotonic() - self.first_token, 1e-9)

    def _update(self) -> None:
        completed = min(self._elapsed(), self.seconds) if self.seconds else self.chains
        self.bar.update(
            self.task,
            completed=completed,
            done=self._done(),
            speed=self._speed(),
            cache=self.cache,
        )
