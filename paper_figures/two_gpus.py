"""The table of bench_tensor: decode steps of sequences whose heads are shared by several GPUs, beside one GPU."""

import json

from paper_figures import style
from paper_figures.rows import device, markdown, milliseconds


def line(row: dict, gpus: int, one: dict) -> list[str]:
    """A row of the table; one: the same cell on one GPU."""
    cache = "vanilla" if row["cr"] == 1 else f"DMS CR{row['cr']:g}"
    about = [f"{row['context']:,}", cache, str(gpus), str(row["batch"])]
    times = [milliseconds(row["seconds_per_step"]), f"{row['over_floor']:.2f}", f"{row['tokens_per_second']:,.0f}"]
    return [*about, *times, f"{row['tokens_per_second'] / one['tokens_per_second']:.2f}x"]


def tensor() -> str:
    """A table for each `tensor_MODEL.json` of a device's folder, beside what `decode_MODEL.json` says of one GPU."""
    header = ["context", "cache", "GPUs", "sequences", "ms a step", "over the floor", "tokens/s", "of one GPU"]
    tables = []
    for path in sorted(style.RESULTS.glob("*/tensor_*.json")):
        record = json.loads(path.read_text())
        single = json.loads(path.with_name(path.name.replace("tensor", "decode")).read_text())
        ones = {row["cell"]: row for row in single["rows"]}
        lines = []
        for row in record["rows"]:
            one = ones[row["cell"]]
            lines += [line(one, 1, one), line(row, row["devices"], one)]
        settings = record["runs"][-1]["settings"]
        note = (
            f"{settings['model']}'s shape, the most sequences that fit, {settings['dtype']}, random weights; medians "
            f"of {settings['rounds']} calls of {settings['steps']} steps. {device(record['runs'][-1])}"
        )
        tables.append(f"{markdown(header, lines)}\n\n{note}")
    return "\n\n".join(tables)
