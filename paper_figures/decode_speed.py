"""Tokens per second against the number of sequences: vanilla, DMS and transformers at the shapes of real models.

Never runs a model: `python -m scripts.benchmarks.bench_decode` and `python -m scripts.benchmarks.decode_peers` do.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from paper_figures import style


def series_of(row: dict) -> str:
    """What a row is a point of."""
    if row.get("mode", "").startswith("fastdms"):
        return f"FastDMS CR{row['cr']:g}{row['mode'].removeprefix('fastdms').replace('_', ' ')}"
    if "cr" not in row:
        return ", ".join(["transformers", *([row["mode"]] if "mode" in row else [])])
    return "vanilla" if row["cr"] == 1 else f"DMS CR{row['cr']:g}"


def draw(records: dict[str, list[dict]]) -> Figure:
    """The figure of the records of each model: a row of panels a model, a column a context."""
    timed = {
        model: [row for record in of_model for row in record["rows"] if "seconds_per_step" in row]
        for model, of_model in records.items()
    }
    contexts = sorted({row["context"] for rows in timed.values() for row in rows})
    # By ratio, then transformers by mode.
    order = {
        series_of(row): (row.get("cr", float("inf")), row.get("mode", "")) for rows in timed.values() for row in rows
    }
    looks = {name: style.look(n) for n, name in enumerate(sorted(order, key=order.get))}
    with style.theme():
        figure = style.new_figure(8, 2.6 * len(records))
        grid = figure.subplots(len(records), len(contexts), squeeze=False, sharex=True, sharey="row")
        for (model, rows), line in zip(timed.items(), grid, strict=True):
            for context, axes in zip(contexts, line, strict=True):
                for name in looks:
                    points = sorted(
                        (row["batch"], row["tokens_per_second"])
                        for row in rows
                        if row["context"] == context and series_of(row) == name
                    )
                    if points:
                        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, **looks[name]._asdict())
                axes.set_xscale("log", base=4)
                axes.set_yscale("log")
                style.log_tokens(axes.yaxis)
                axes.xaxis.set_major_formatter(style.FuncFormatter(lambda value, _: f"{value:g}"))
                axes.set_title(f"{model}'s shape, context {context:,}")
            line[0].set_ylabel("tokens a second")
        for axes in grid[-1]:
            axes.set_xlabel("sequences")
        handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
        figure.legend([handles[name] for name in looks], looks, loc="outside right upper")
    return figure


def read(folder: Path) -> dict[str, list[dict]]:
    """Model -> the record decode_MODEL.json of a folder, then decode_peers_MODEL.json.

    Raises:
      ValueError: no record, or a file that is none.
    """
    records: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("decode_*.json"), key=lambda path: (path.stem.startswith("decode_peers_"), path)):
        model = path.stem.removeprefix("decode_").removeprefix("peers_")
        records.setdefault(model, []).append(style.read_results(path, "rows"))
    if not records:
        raise ValueError(f"{folder}: has no decode_*.json")
    return dict(sorted(records.items(), reverse=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=style.RESULTS / "h200", help="of the records")
    parser.add_argument("out", type=Path, nargs="?", help="path without suffix; default: in the folder")
    options = parser.parse_args(arguments)
    with style.mistakes(parser, options.folder):
        figure = draw(read(options.folder))
        for path in style.save(figure, options.out or options.folder / "decode_speed"):
            print(path)


if __name__ == "__main__":
    main()
