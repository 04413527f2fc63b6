"""The table of bench_offload: keys and values in host memory beside DMS in the GPU's."""

import json

from paper_figures import style
from paper_figures.rows import device, markdown, milliseconds


def label(row: dict) -> str:
    """Where a row keeps its keys and values, and what it reads of them."""
    return {
        "device": "vanilla, GPU memory",
        "dms": f"DMS CR{row['cr']:g}, GPU memory",
        "streamed": "vanilla, streamed",
        "quest": f"Quest, reads 1/{row['cr']:g}",
    }[row["mode"]]


def cells(row: dict) -> list[str]:
    """The numbers of a row; what crosses is of a step."""
    crossing = f"{row['crossing_bytes'] / 1e9:.2f}" if "crossing_bytes" in row else ""
    if "seconds_per_step" not in row:
        return ["failed" if row["fits"] else "does not fit", "", "", ""]
    floor = f"{row['over_floor']:.2f}"
    return [milliseconds(row["seconds_per_step"]), floor, f"{row['tokens_per_second']:,.0f}", crossing]


def offload() -> str:
    """A table for each record, `offload_MODEL.json` in the folder of a device; nothing where none was recorded."""
    header = ["context", "sequences", "cache", "ms a step", "over its floor", "tokens/s", "GB that cross"]
    tables = []
    for path in sorted(style.RESULTS.glob("*/offload_*.json")):
        record = json.loads(path.read_text())
        run, rows = record["runs"][-1], record["rows"]
        lines = [[f"{row['context']:,}", str(row["batch"]), label(row), *cells(row)] for row in rows]
        settings, link = run["settings"], run["link_bytes_per_second"] / 1e9
        note = (
            f"{settings['model']}'s shape, {settings['dtype']}, random weights, pages of {settings['page_size']}; "
            f"medians of {settings['rounds']} calls of {settings['steps']} steps; copies in the same run: from pinned "
            f"memory {link:.0f} GB/s, on the device {run['copy_bytes_per_second'] / 1e12:.2f} TB/s. {device(run)}"
        )
        tables.append(f"{markdown(header, lines)}\n\n{note}")
    return "\n\n".join(tables)
