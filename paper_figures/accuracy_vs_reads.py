"""Accuracy against KV reads of L-W-CR configurations, with the Pareto front (the paper's main figure).

usage: python -m paper_figures.accuracy_vs_reads results.json [out]

Reads the results.json of `experiments.aime` and writes out.png and out.pdf. Never runs a model.
"""

import argparse
import itertools
import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.stats import pareto

# Okabe and Ito's palette, told apart by colour-blind readers; markers and line styles say the same again.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", (0, (3, 1, 1, 1)), (0, (5, 1)), ":", (0, (1, 1)))
FRONT = "#999999"


def series(rows: list[dict]) -> dict[str, list[dict]]:
    """Legend label -> rows of one policy and compression ratio, by KV reads."""

    def label(row):
        if row["policy"] == "full":
            return "vanilla"
        return row["policy"].upper() + ("" if row["cr"] is None else f" CR{row['cr']:g}")

    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    return {name: sorted(group, key=lambda row: row["kv_reads"]) for name, group in groups.items()}


def draw(rows: list[dict]) -> Figure:
    """The figure; rows are those of a results.json."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        front = pareto(rows)
        x, y = [row["kv_reads"] for row in front], [100 * row["accuracy"]["mean"] for row in front]
        axes.step(x, y, where="post", color=FRONT, linewidth=5, alpha=0.35, zorder=1, label="Pareto front")
        for (name, group), n in zip(series(rows).items(), itertools.cycle(range(len(COLOURS)))):
            _draw_series(axes, name, group, COLOURS[n], MARKERS[n], LINES[n])
        _draw_labels(axes, rows)
        _set_axes(axes, rows)
    return figure


def _draw_series(axes, name: str, group: list[dict], colour: str, marker: str, line) -> None:
    mean = [100 * row["accuracy"]["mean"] for row in group]
    below = [m - 100 * row["accuracy"]["low"] for m, row in zip(mean, group, strict=True)]
    above = [100 * row["accuracy"]["high"] - m for m, row in zip(mean, group, strict=True)]
    axes.errorbar(
        [row["kv_reads"] for row in group],
        mean,
        yerr=[below, above],
        label=name,
        color=colour,
        marker=marker,
        linestyle=line,
        linewidth=1.2,
        markersize=6,
        elinewidth=0.8,
        capsize=2,
        zorder=2,
    )


def _draw_labels(axes, rows: list[dict]) -> None:
    """L-W-CR at each point: above it for vanilla, below for the others, beside the interval's bar."""
    for n, group in enumerate(series(rows).values()):
        for row in group:
            axes.annotate(
                row["config"],
                (row["kv_reads"], 100 * row["accuracy"]["mean"]),
                xytext=(4, 5) if n % 2 == 0 else (4, -10),
                textcoords="offset points",
                fontsize=7,
                color=COLOURS[n % len(COLOURS)],
                path_effects=[withStroke(linewidth=2, foreground="white")],  # legible over lines
                zorder=3,
            )


def _set_axes(axes, rows: list[dict]) -> None:
    axes.set_xscale("log")
    reads = [row["kv_reads"] for row in rows]
    axes.set_xlim(min(reads) / 1.15, max(reads) * 1.35)  # room for the last label
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("KV reads per problem (tokens, mean of layers and KV heads)")
    axes.set_ylabel("accuracy, majority vote (%)")
    axes.set_title(f"{rows[0]['problems']} problems, 95% intervals", loc="left", fontsize=9)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="best")


def _short(value: float, _=None) -> str:
    """20000 -> "20K"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def plot(results: list[dict], path_png: str | Path) -> None:
    """Writes the figure of a results.json's rows as PNG."""
    draw(results).savefig(path_png, dpi=200)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="results.json of a run, or a recorded one")
    parser.add_argument("out", type=Path, nargs="?", help="path without suffix; default: beside the results")
    options = parser.parse_args(arguments)
    rows = json.loads(options.results.read_text())["rows"]
    if not rows:
        parser.error(f"{options.results}: has no rows")
    base = options.out or options.results.parent / "accuracy_vs_reads"
    figure = draw(rows)
    for suffix in (".png", ".pdf"):
        path = base.with_name(base.name.removesuffix(".png").removesuffix(".pdf") + suffix)
        figure.savefig(path, dpi=200)
        print(path)


if __name__ == "__main__":
    main()
