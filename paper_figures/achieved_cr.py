"""Achieved against target compression ratio, for each policy; on the diagonal a policy keeps what it promises.

usage: python -m paper_figures.achieved_cr sweep.json [out]

Achieved CR is tokens seen over tokens live at the end of a chain; short chains achieve less, since the window of
DMS is never evicted and a budget that is not yet full evicts nothing. Never runs a model.
"""

from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.accuracy_vs_cr import slice_of


def draw(results: dict) -> Figure:
    """The figure of a sweep's results."""
    rows = [row for row in slice_of(results["rows"]) if row["cr"] is not None]
    if not rows:
        raise ValueError("no row has a compression ratio")
    ratios = [row["cr"] for row in rows]
    with style.theme():
        figure = style.new_figure(5.6, 4.2)
        axes = figure.add_subplot()
        ends = (min(ratios) / 1.15, max(ratios) * 1.15)
        axes.plot(ends, ends, color=style.FRONT, linewidth=3, alpha=0.5, zorder=1, label="achieved = target")
        for policy, group in style.by_policy(rows).items():
            group = sorted(group, key=lambda row: row["cr"])
            look = style.policy_look(policy)._asdict()
            x, y = [row["cr"] for row in group], [row["achieved_cr"] for row in group]
            axes.plot(x, y, label=style.LABELS.get(policy, policy), linewidth=1.2, markersize=5.5, **look)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            style.ratio_ticks(axis, ratios)
        axes.set_xlabel("target CR (length over budget for policies with a budget)")
        axes.set_ylabel("achieved CR")
        axes.set_title(f"{min(row['problems'] for row in rows)} problems, mean of chains")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


def main(arguments: list[str] | None = None) -> None:
    style.main("achieved_cr", draw, __doc__, ("rows",), arguments)


if __name__ == "__main__":
    main()
