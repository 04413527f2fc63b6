"""Rows of a results table: how an estimate is written, and which rows are Pareto-optimal."""

from collections.abc import Sequence


def percent(estimate: dict, sign: str = "") -> str:
    """`62.1 [55.3, 68.9]`."""
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def pareto(rows: Sequence[dict], cost: str = "kv_reads") -> list[dict]:
    """The rows that no other row matches or beats in accuracy at less `cost`, cheapest first."""
    front: list[dict] = []
    for row in sorted(rows, key=lambda r: (r[cost], -r["accuracy"]["mean"])):
        if not front or row["accuracy"]["mean"] > front[-1]["accuracy"]["mean"]:
            front.append(row)
    return front
