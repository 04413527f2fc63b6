"""Tables of several GPUs beside one: decode steps of bench_tensor, train steps of bench_retrofit."""

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


def retrofit() -> str:
    """Train steps of Qwen3-1.7B's shape: one GPU, and what was recorded of more."""
    header = [
        "along",
        "ms a step",
        "tokens/s",
        "of one GPU",
        "MFU",
        "busy",
        "exchanging",
        "nothing but that",
        "s to compile",
    ]
    paths = sorted((style.RESULTS / "h100").glob("retrofit_qwen3_1.7b*.json"), key=lambda path: len(path.stem))
    records = [json.loads(path.read_text()) for path in paths]
    one, lines = records[0], []
    for record in records:
        axes = [f"{axis}, {size} GPUs" for axis, size in record["mesh"].items() if size > 1]
        parts, rate = record["profile_ms"], record["tokens_per_second"]
        alone = record.get("one_gpu_tokens_per_second", one["tokens_per_second"])  # on the same machine
        lines.append(
            [
                ", ".join([*(axes or ["one GPU"]), *([record["variant"]] if "variant" in record else [])]),
                f"{1000 * record['seconds_per_step']:.0f}",
                f"{rate:,.0f}",
                f"{rate / alone:.2f}x",
                f"{record['mfu']:.0%}",
                *(f"{parts[part]:.0f}" for part in ("busy", "collectives", "collectives_alone")),
                f"{record['compile_seconds']:.0f}",
            ]
        )
    note = (
        f"{one['model']}'s shape, adapter gate, {one['rows']} rows of {one['context']:,} tokens, {one['compute']}, "
        f"random weights; medians of 10 steps, and milliseconds of a step by the profiler; of one GPU: "
        f"of the same machine's. "
        f"{one['device'].removeprefix('1 x ')}, jax {one['jax']}."
    )
    return f"{markdown(header, lines)}\n\n{note}"
