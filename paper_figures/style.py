"""What the figures share: colours, markers and lines that also tell the series apart in grey print, and files."""

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

# Okabe and Ito's palette, then colours of Tol's, told apart by colour-blind readers; markers and line styles say the
# same again.
COLOURS = (
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#8C6D31",
    "#882255", "#332288", "#44AA99", "#999933", "#CC6677", "#AA4499",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "8", "H")
LINES = (
    "-", "--", "-.", (0, (3, 1, 1, 1)), (0, (7, 2)), ":", (0, (6, 1, 1, 1, 1, 1)), (0, (2, 2)), (0, (10, 1)),
    (0, (4, 1)), (0, (4, 2, 1, 2)), (0, (1, 2)), (0, (5, 3)), (0, (8, 1, 2, 1)), (0, (3, 3, 1, 1)),
)  # fmt: skip
FRONT = "#999999"
SEQUENTIAL = "cividis"  # dark to light for colour-blind readers and in grey alike
RESULTS = Path(__file__).parent / "results"
# A policy looks the same in every figure.
POLICIES = (
    "full", "dms", "tova", "h2o", "streaming", "quest", "knorm", "random",
    "keydiff", "random_attention", "snapkv", "rkv", "vase_attnv", "vase_dkv",
)  # fmt: skip
LABELS = {
    "full": "vanilla",
    "dms": "DMS",
    "tova": "TOVA",
    "h2o": "H2O",
    "streaming": "StreamingLLM",
    "quest": "Quest",
    "knorm": "KNorm",
    "random": "random",
    "keydiff": "KeyDiff",
    "random_attention": "Random Attention",
    "snapkv": "SnapKV",
    "rkv": "R-KV",
    "vase_attnv": "VaSE-AttnV",
    "vase_dkv": "VaSE-DKV",
}


class Look(NamedTuple):
    """How one series is drawn."""

    color: str
    marker: str
    linestyle: str | tuple


def look(n: int) -> Look:
    """The look of series n; they come again after the fifteenth."""
    return Look(*(styles[n % len(styles)] for styles in (COLOURS, MARKERS, LINES)))


def policy_look(policy: str) -> Look:
    """The look of a policy; one that is not in the list gets the last."""
    return look(POLICIES.index(policy) if policy in POLICIES else len(POLICIES))


def by_policy(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """policy -> its rows, in the order of POLICIES."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["policy"], []).append(row)
    order = {policy: n for n, policy in enumerate(POLICIES)}
    return dict(sorted(groups.items(), key=lambda item: order.get(item[0], len(order))))


@contextlib.contextmanager
def theme() -> Iterator[None]:
    """The font and the axes of every figure."""
    settings = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "legend.handlelength": 3,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    return Figure(figsize=(width, height), layout="constrained")


def percent_bars(estimates: Sequence[dict]) -> tuple[list[float], list[list[float]]]:
    """Means and the lengths of their error bars below and above, in percent."""
    mean = [100 * e["mean"] for e in estimates]
    below = [100 * (e["mean"] - e["low"]) for e in estimates]
    above = [100 * (e["high"] - e["mean"]) for e in estimates]
    return mean, [below, above]


def draw_points(axes, x: Sequence[float], estimates: Sequence[dict], style: Look, label: str, **options) -> None:
    """Means in percent with their intervals, joined by a line."""
    mean, bars = percent_bars(estimates)
    drawn = {"linewidth": 1.2, "markersize": 5.5, "elinewidth": 0.8, "capsize": 2, "zorder": 2, **style._asdict()}
    axes.errorbar(x, mean, yerr=bars, label=label, **{**drawn, **options})


def short(value: float, _=None) -> str:
    """20000 -> "20K"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def log_tokens(axis) -> None:
    """A log axis of token counts: 20K, 50K, 100K."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(short))
    axis.set_minor_formatter(NullFormatter())


TICK_RATIO = 1.21  # ticks of a log axis that are nearer to each other would overlap


def ratio_ticks(axis, values: Sequence[float]) -> None:
    """Ticks at compression ratios, on a log axis; of those too near to each other the first."""
    ticks: list[float] = []
    for value in sorted({*values}):
        if not ticks or value >= TICK_RATIO * ticks[-1]:
            ticks.append(value)
    axis.set_ticks(ticks)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def read_results(path: Path, *keys: str) -> dict:
    """A results file that must have `keys`, not empty; "rows" are objects.

    Raises:
      ValueError: one that is no JSON object or lacks a key, with the file and the key.
    """
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    for key in keys:
        if not isinstance(results, dict) or not results.get(key):
            raise ValueError(f"{path}: has no {key!r}")
    rows = results.get("rows", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: its 'rows' are no list of objects")
    return results


@contextlib.contextmanager
def mistakes(parser: argparse.ArgumentParser, source: Path) -> Iterator[None]:
    """Ends a script with one line where `source` is missing or not what its figure is drawn from."""
    try:
        yield
    except KeyError as error:
        parser.error(f"{source}: a part of it has no {error}")
    except (ValueError, OSError) as error:
        parser.error(str(error))


def save(figure: Figure, base: Path) -> list[Path]:
    """Writes base.png and base.pdf, without a date, so that equal results give equal files."""
    base = base.with_name(base.name.removesuffix(".png").removesuffix(".pdf"))
    paths = [base.with_name(base.name + suffix) for suffix in (".png", ".pdf")]
    figure.savefig(paths[0], dpi=200)
    figure.savefig(paths[1], metadata={"CreationDate": None})
    return paths


def main(name: str, draw, description: str, keys: Sequence[str], arguments: list[str] | None = None) -> None:
    """A figure script: reads a results file, writes the figure `name` beside it or where it is told."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("results", type=Path, help="results file")
    parser.add_argument("out", type=Path, nargs="?", help="path without suffix; default: beside the results")
    options = parser.parse_args(arguments)
    with mistakes(parser, options.results):
        figure = draw(read_results(options.results, *keys))
        for path in save(figure, options.out or options.results.parent / name):
            print(path)
