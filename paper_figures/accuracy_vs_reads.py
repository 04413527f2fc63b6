"""Accuracy against KV reads of L-W-CR configurations, with the Pareto front (the paper's main figure).

usage: python -m paper_figures.accuracy_vs_reads results.json [out]

Reads the results.json of `experiments.aime` and writes out.png and out.pdf. Never runs a model.
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from paper_figures import style
from paper_figures.rows import pareto


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
    with style.theme():
        figure = style.new_figure(6.4, 4.2)
        axes = figure.add_subplot()
        front = pareto(rows)
        x, y = [row["kv_reads"] for row in front], [100 * row["accuracy"]["mean"] for row in front]
        axes.step(x, y, where="post", color=style.FRONT, linewidth=5, alpha=0.35, zorder=1, label="Pareto front")
        for n, (name, group) in enumerate(series(rows).items()):
            reads = [row["kv_reads"] for row in group]
            style.draw_points(axes, reads, [row["accuracy"] for row in group], style.look(n), name)
        _draw_labels(axes, rows)
        _set_axes(axes, rows)
    return figure


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
                color=style.look(n).color,
                path_effects=[withStroke(linewidth=2, foreground="white")],  # legible over lines
                zorder=3,
            )


def _set_axes(axes, rows: list[dict]) -> None:
    axes.set_xscale("log")
    reads = [row["kv_reads"] for row in rows]
    axes.set_xlim(min(reads) / 1.15, max(reads) * 1.35)  # room for the last label
    style.log_tokens(axes.xaxis)
    axes.set_xlabel("KV reads per problem (tokens, mean of layers and KV heads)")
    axes.set_ylabel("accuracy, majority vote (%)")
    axes.set_title(f"{rows[0]['problems']} problems, 95% intervals")
    axes.legend(loc="best")


def plot(results: list[dict], path_png: str | Path) -> None:
    """Writes the figure of a results.json's rows as PNG."""
    draw(results).savefig(path_png, dpi=200)


def main(arguments: list[str] | None = None) -> None:
    style.main("accuracy_vs_reads", lambda results: draw(results["rows"]), __doc__, ("rows",), arguments)


if __name__ == "__main__":
    main()
