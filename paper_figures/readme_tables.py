"""Writes the README's tables from the recorded results, so that no number is typed by hand.

usage: python -m paper_figures.readme_tables
"""

import json
import re
from pathlib import Path

from experiments.report import percent

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table with its first column to the left and the others to the right."""
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def mini() -> str:
    """Accuracy and cost of the mini model's configurations."""
    results = json.loads((RESULTS / "mini" / "aime.json").read_text())
    rows = [
        [
            row["config"],
            "vanilla" if row["policy"] == "full" else f"{row['policy'].upper()} CR{row['cr']:g}",
            percent(row["accuracy"]),
            percent(row["gain"], "+"),
            f"{row['kv_reads']:,.0f}",
            f"{row['peak_tokens']:,.0f}",
            f"{row['achieved_cr']:.2f}",
        ]
        for row in results["rows"]
    ]
    config = results["config"]
    note = (
        f"{results['problems']} held-out problems, seed {results['seed']}, temperature "
        f"{config['temperature']:g}, 95% intervals by bootstrap over problems; made by `{results['command']}`."
    )
    header = ["L-W-CR", "model", "accuracy %", "gain, points", "KV reads", "peak tokens", "achieved CR"]
    return f"{markdown(header, rows)}\n\n{note}"


def speed() -> str:
    """Tokens per second beside transformers."""
    results = json.loads((RESULTS / "bench_generate.json").read_text())
    rows = [
        [str(row["batch"]), f"{row['dms_jax']:.1f}", f"{row['transformers']:.1f}", f"{row['ratio']:.2f}x"]
        for row in results["rows"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    note = f"SmolLM2-135M, {results['setting']}; medians of {results['rounds']} rounds; {versions}."
    return f"{markdown(['batch', 'dms_jax', 'transformers', 'ratio'], rows)}\n\n{note}"


TABLES = {"mini": mini, "speed": speed}


def render(text: str) -> str:
    """`text` with what stands between `<!-- table NAME -->` and `<!-- end -->` made anew."""

    def fill(match: re.Match) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
    print(readme)


if __name__ == "__main__":
    main()
