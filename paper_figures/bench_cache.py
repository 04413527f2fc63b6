"""Time of a decode step against the context length: full cache and DMS at several eviction rates, and what each holds.

usage: python -m paper_figures.bench_cache bench_cache.json [out]

Never runs a model: `python -m scripts.bench_cache` does.
"""

from matplotlib.figure import Figure

from paper_figures import style


def name_of(row: dict) -> str:
    kept = f"DMS, {row['evicted']:.1%} evicted".replace(".0%", "%") if row["evicted"] else "full"
    return f"{kept}, {'one array a layer' if row['storage'] == 'masked' else row['storage']}"


def draw(results: dict) -> Figure:
    """The figure of a benchmark's results."""
    rows, settings = results["rows"], results["settings"]
    series: dict[str, list[dict]] = {}
    for row in rows:
        series.setdefault(name_of(row), []).append(row)
    with style.theme():
        figure = style.new_figure(6.6, 3.4)
        axes = figure.add_subplot()
        for n, (name, group) in enumerate(series.items()):
            group = sorted(group, key=lambda row: row["context"])
            x = [row["context"] / 1024 for row in group]
            y = [1e3 * row["seconds_per_step"] for row in group]
            axes.plot(x, y, label=name, linewidth=1.2, markersize=5.5, **style.look(n)._asdict())
        contexts = sorted({row["context"] / 1024 for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        style.log_tokens(axes.yaxis)
        axes.set_xticks(contexts, [f"{context:g}K" for context in contexts])
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("milliseconds a decode step")
        cores = results["environment"]["cpu_count"]
        axes.set_title(f"SmolLM2-135M's shape, batch {settings['batch']}, {settings['dtype']}, {cores} CPU cores")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


def main(arguments: list[str] | None = None) -> None:
    style.main("bench_cache", draw, __doc__, ("rows",), arguments)


if __name__ == "__main__":
    main()
