"""Accuracy against the compression ratio, a line for each policy.

usage: python -m paper_figures.accuracy_vs_cr sweep.json [out]

Of a sweep, the rows with the fewest chains and the longest maximum length: what compression alone costs. Never runs
a model.
"""

from matplotlib.figure import Figure

from paper_figures import style


def slice_of(rows: list[dict]) -> list[dict]:
    """The rows with the fewest chains and, among these, the longest maximum length."""
    chains = min(row["chains"] for row in rows)
    longest = max(row["max_length"] for row in rows if row["chains"] == chains)
    return [row for row in rows if (row["chains"], row["max_length"]) == (chains, longest)]


def draw(results: dict) -> Figure:
    """The figure of a sweep's results."""
    rows = slice_of(results["rows"])
    with style.theme():
        figure = style.new_figure(6.4, 4.2)
        axes = figure.add_subplot()
        for policy, group in style.by_policy(rows).items():
            group = sorted((row for row in group if row["cr"] is not None), key=lambda row: row["cr"])
            look, label = style.policy_look(policy), style.LABELS.get(policy, policy)
            if policy == "full" and group:
                accuracy = group[0]["accuracy"]
                axes.axhline(100 * accuracy["mean"], color=look.color, linewidth=1.2, label=label, zorder=1)
                axes.axhspan(100 * accuracy["low"], 100 * accuracy["high"], color=look.color, alpha=0.08, linewidth=0)
            elif group:
                style.draw_points(axes, [row["cr"] for row in group], [row["accuracy"] for row in group], look, label)
        axes.set_xscale("log", base=2)
        style.ratio_ticks(axes.xaxis, [row["cr"] for row in rows if row["cr"] is not None and row["policy"] != "full"])
        axes.set_xlabel("compression ratio (target of DMS, length over budget of the others)")
        axes.set_ylabel("accuracy (%)")
        votes = "one chain" if rows[0]["chains"] == 1 else f"majority of {rows[0]['chains']} chains"
        problems = min(row["problems"] for row in rows)
        axes.set_title(f"{problems} problems, {votes}, at most {rows[0]['max_length']:,} tokens, 95% intervals")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


def main(arguments: list[str] | None = None) -> None:
    style.main("accuracy_vs_cr", draw, __doc__, ("rows",), arguments)


if __name__ == "__main__":
    main()
