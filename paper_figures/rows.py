"""Rows of a results table: how they are written, and which of them are Pareto-optimal."""

from collections.abc import Sequence


def percent(estimate: dict, sign: str = "") -> str:
    """`62.1 [55.3, 68.9]`."""
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def interval(value: dict, scale: float = 1.0) -> str:
    """`0.024 [0.0227, 0.0254]`."""
    return f"{scale * value['mean']:.3g} [{scale * value['low']:.3g}, {scale * value['high']:.3g}]"


def milliseconds(seconds: float) -> str:
    """`1.38` or `59.2`."""
    return f"{1e3 * seconds:.2f}" if seconds < 0.01 else f"{1e3 * seconds:,.1f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table with its first column to the left and the others to the right."""
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def device(results: dict) -> str:
    """What a run ran on: `NVIDIA H200, jax 0.11.2.`"""
    about = results["environment"]
    gpu = about["device"].partition(" gpu ")[2]
    return f"{gpu or str(about['cpu_count']) + ' CPU cores'}, jax {about['jax']}."


def pareto(rows: Sequence[dict], cost: str = "kv_reads") -> list[dict]:
    """The rows that no other row matches or beats in accuracy at less `cost`, cheapest first."""
    front: list[dict] = []
    for row in sorted(rows, key=lambda r: (r[cost], -r["accuracy"]["mean"])):
        if not front or row["accuracy"]["mean"] > front[-1]["accuracy"]["mean"]:
            front.append(row)
    return front
