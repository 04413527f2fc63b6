"""Tables of a real model on real problems, from what `experiments.collect` wrote of its runs."""

import json

from paper_figures import style
from paper_figures.rows import markdown, percent

FOLDER = style.RESULTS / "real_model"
TASKS = {"gsm8k_512": "GSM8K", "math500_512": "MATH-500", "humaneval_512": "HumanEval"}
HEADER = ["model", "prompt kept", "chains", "accuracy %", "gain, points", "KV reads", "peak tokens", "achieved CR"]


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def line(row: dict, label: str, kept: str = "") -> list[str]:
    """A row of the table under HEADER."""
    return [
        label,
        kept,
        str(row["chains"]),
        percent(row["accuracy"]),
        percent(row["gain"], "+"),
        f"{row['kv_reads']:,.0f}",
        f"{row['peak_tokens']:,.0f}",
        f"{row['achieved_cr']:.2f}",
    ]


def note(results: dict) -> str:
    """What was run, on what."""
    config, (first, *_) = results["config"], results["runs"].values()
    about, rows = first["environment"], results["rows"]
    scored = "pass@all" if "pass_at" in rows[0] else "majority vote"
    return (
        f"Qwen2.5-Coder-0.5B-Instruct (GGUF, SHA-256 {about['model_sha256'][:12]}), {results['problems']} problems, at "
        f"most {rows[0]['max_length']} new tokens, temperature {config['temperature']:g}, top-p {config['top_p']:g}, "
        f"seed {results['seed']}; {scored}; 95% intervals by {results['interval']}, gains paired with the first row. "
        f"KV reads and peak tokens: mean of layers and KV heads, summed over chains. "
        f"{about['device'].partition(' gpu ')[2]}, jax {about['jax']}."
    )


def family(name: str) -> str:
    """The original and the retrofitted family, by number of chains."""
    results = read(name)
    rows = [row for row in results["rows"] if row["policy"] in ("full", "dms")]
    labels = ["vanilla" if row["policy"] == "full" else f"DMS CR{row['cr']:g}" for row in rows]
    lines = [line(row, label) for row, label in zip(rows, labels, strict=True)]
    header = [column for column in HEADER if column != HEADER[1]]
    return f"{markdown(header, [[cell for n, cell in enumerate(row) if n != 1] for row in lines])}\n\n{note(results)}"


def rivals(name: str) -> str:
    """One chain of every policy at the memory that each member of the family really held."""
    results = read(name)
    single = [row for row in results["rows"] if row["chains"] == 1]
    lines = [line(row, "vanilla") for row in single if row["policy"] == "full"]
    for cr in (2, 4, 8):
        own = [row for row in single if f"_cr{cr}_" in row["run"]]
        lines += [line(row, f"DMS CR{cr}") for row in single if row["policy"] == "dms" and row["cr"] == cr and own]
        order = {policy: n for n, policy in enumerate(style.POLICIES)}
        for row in sorted(own, key=lambda row: order[row["policy"]]):
            protected = results["runs"][row["run"]]["protect_prompt"]
            kept = {True: "yes", False: "no", None: ""}[protected]
            lines.append(line(row, f"{style.LABELS[row['policy']]}, as CR{cr}", kept))
    return f"{markdown(HEADER, lines)}\n\n{note(results)}"


def retrofits() -> str:
    """Gates, ways to train and windows beside each other: one chain."""
    results = read("gsm8k_512_retrofits")
    lines = [
        line(
            row,
            "vanilla"
            if row["policy"] == "full"
            else f"{LABELS[row['run'].removeprefix('gsm8k_512_')]}, CR{row['cr']:g}",
        )
        for row in results["rows"]
        if row["chains"] == 1
    ]
    header = [column for column in HEADER if column != HEADER[1]]
    return f"{markdown(header, [[cell for n, cell in enumerate(row) if n != 1] for row in lines])}\n\n{note(results)}"


# Runs of the retrofits' table -> what was trained.
LABELS = {
    **{f"dms{cr}": "adapter, window 16, o = 1" for cr in (2, 4, 8)},
    "query": "query neuron, all weights, window 16",
    "lora": "adapter and LoRA, window 16",
    **{
        f"w{w}_{mode}": f"adapter, window {w}, {mode}, half the batch"
        for w in (4, 16, 64)
        for mode in ("delayed", "immediate")
    },
}

TABLES = {
    **{f"{name}_family": lambda name=name: family(name) for name in TASKS},
    **{f"{name}_rivals": lambda name=name: rivals(name) for name in TASKS},
    "gsm8k_512_retrofits": retrofits,
}
