"""Delayed against immediate eviction by window, a panel for each compression ratio.

usage: python -m paper_figures.window_ablation ablate_window.json [out]

Reads the results of `experiments.ablate_window`. Never runs a model.
"""

from matplotlib.figure import Figure

from paper_figures import style

MODES = ("delayed", "immediate")


def draw(results: dict) -> Figure:
    """The figure of an ablation's results."""
    rows = results["rows"]
    ratios, windows = sorted({row["cr"] for row in rows}), sorted({row["window"] for row in rows})
    with style.theme():
        figure = style.new_figure(2.0 + 2.5 * len(ratios), 3.4)
        panels = figure.subplots(1, len(ratios), sharey=True, squeeze=False)[0]
        for axes, cr in zip(panels, ratios, strict=True):
            here = [row for row in rows if row["cr"] == cr]
            _draw_base(axes, here)
            for n, mode in enumerate(MODES, 1):
                own = sorted((row for row in here if row["mode"] == mode), key=lambda row: row["window"])
                if own:
                    places = [windows.index(row["window"]) for row in own]
                    style.draw_points(axes, places, [row["accuracy"] for row in own], style.look(n), mode)
            axes.set_xticks(range(len(windows)), [f"{window:g}" for window in windows])
            axes.set_xlim(-0.4, len(windows) - 0.6)
            axes.set_xlabel("window (tokens)")
            axes.set_title(f"CR {cr:g}, {min(row['problems'] for row in here)} problems")
        panels[0].set_ylabel("accuracy (%)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _draw_base(axes, rows: list[dict]) -> None:
    """The accuracy of the model before the retrofit, where it was recorded."""
    bases = [row["base_accuracy"] for row in rows if row.get("base_accuracy")]
    if bases:
        axes.axhline(100 * bases[0]["mean"], color=style.COLOURS[0], linewidth=1.2, label="vanilla", zorder=1)
        axes.axhspan(100 * bases[0]["low"], 100 * bases[0]["high"], color=style.COLOURS[0], alpha=0.08, linewidth=0)


def main(arguments: list[str] | None = None) -> None:
    style.main("window_ablation", draw, __doc__, ("rows",), arguments)


if __name__ == "__main__":
    main()
