"""Accuracy against KV reads and against peak tokens, with a Pareto front for each policy.

usage: python -m paper_figures.pareto_fronts sweep.json [out]

Every row of a sweep (policy, L, W, CR) is a faint point; the line joins the rows that no other row of its policy
matches or beats at less cost. Never runs a model.
"""

from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.rows import pareto

ENTRIES = 8  # of a line of the legend
COSTS = {"kv_reads": "KV reads per problem (tokens)", "peak_tokens": "peak live tokens per problem"}


def draw(results: dict) -> Figure:
    """The figure of a sweep's results."""
    rows = results["rows"]
    with style.theme():
        figure = style.new_figure(9.6, 4.2)
        for axes, (cost, label) in zip(figure.subplots(1, 2, sharey=True), COSTS.items(), strict=True):
            for policy, group in style.by_policy(rows).items():
                _draw_policy(axes, cost, policy, group)
            axes.set_xscale("log")
            style.log_tokens(axes.xaxis)
            axes.set_xlabel(label)
        left = figure.axes[0]
        left.set_ylabel("passed by any chain (%)" if "pass_at" in rows[0] else "accuracy, majority vote (%)")
        left.set_title(f"{min(row['problems'] for row in rows)} problems; fronts with 95% intervals")
        figure.axes[1].set_title("tokens: mean of layers and KV heads, summed over chains")
        handles, labels = left.get_legend_handles_labels()
        lines = -(-len(labels) // ENTRIES)
        figure.legend(handles, labels, loc="outside lower center", ncols=-(-len(labels) // lines))
    return figure


def _draw_policy(axes, cost: str, policy: str, rows: list[dict]) -> None:
    look = style.policy_look(policy)
    mean = [100 * row["accuracy"]["mean"] for row in rows]
    axes.scatter(
        [row[cost] for row in rows], mean, s=14, color=look.color, marker=look.marker, alpha=0.25, linewidths=0
    )
    front = pareto(rows, cost)
    estimates = [row["accuracy"] for row in front]
    style.draw_points(axes, [row[cost] for row in front], estimates, look, style.LABELS.get(policy, policy))


def main(arguments: list[str] | None = None) -> None:
    style.main("pareto_fronts", draw, __doc__, ("rows",), arguments)


if __name__ == "__main__":
    main()
