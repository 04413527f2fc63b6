"""Tables of a real model on real problems, from what `experiments.collect` wrote of its runs."""

import functools
import json

from paper_figures import style
from paper_figures.rows import markdown, percent

FOLDER = style.RESULTS / "real_model"
# The models by their files' hashes.
MODELS = {"1d9614638d18": "Qwen2.5-Coder-0.5B-Instruct", "cc324af070c2": "Qwen2.5-Coder-1.5B-Instruct"}
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
    every = results["all_problems"]
    of = "" if results["problems"] == every else f" of {every} (those that all runs, some cut short, finished)"
    return (
        f"{MODELS[about['model_sha256'][:12]]} (GGUF, SHA-256 {about['model_sha256'][:12]}), "
        f"{results['problems']} problems{of}, at most {rows[0]['max_length']} new tokens, temperature "
        f"{config['temperature']:g}, top-p {config['top_p']:g}, "
        f"seed {results['seed']}; {scored}; 95% intervals by {results['interval']}, gains paired with the first row. "
        f"KV reads and peak tokens: mean of layers and KV heads, summed over chains. "
        f"{about['device'].partition(' gpu ')[2]}, jax {about['jax']}."
    )


def label(row: dict, results: dict) -> str:
    """`vanilla`, `DMS CR4`; an adapter without LoRA, and a length that is not the first row's, are named."""
    name = "vanilla" if row["policy"] == "full" else f"DMS CR{row['cr']:g}"
    if row["policy"] == "dms" and "_dms" in row["run"]:
        name += ", adapter alone"
    longest = results["rows"][0]["max_length"]
    return name if row["max_length"] == longest else f"{name}, at most {row['max_length']} tokens"


def table(lines: list[list[str]], results: dict) -> str:
    """The lines under HEADER, without a column that is empty in all, and the note."""
    shown = [n for n in range(len(HEADER)) if any(line[n] for line in lines)]
    body = [[line[n] for n in shown] for line in lines]
    return f"{markdown([HEADER[n] for n in shown], body)}\n\n{note(results)}"


def family(name: str) -> str:
    """The original and the retrofitted family, by number of chains."""
    results = read(name)
    rows = [row for row in results["rows"] if row["policy"] in ("full", "dms")]
    return table([line(row, label(row, results)) for row in rows], results)


def rivals(name: str) -> str:
    """One chain of every policy at the memory that each member of the family really held."""
    results = read(name)
    longest = results["rows"][0]["max_length"]
    single = [row for row in results["rows"] if row["chains"] == 1 and row["max_length"] == longest]
    lines = [line(single[0], "vanilla")]
    order = {policy: n for n, policy in enumerate(style.POLICIES)}
    for cr in (2, 4, 8):
        own = [row for row in single if f"_cr{cr}_" in row["run"]]
        family = [row for row in single if row["policy"] == "dms" and row["cr"] == cr and own]
        lines += [line(row, label(row, results)) for row in family]
        protected = {row["run"]: results["runs"][row["run"]]["protect_prompt"] for row in own}
        for row in sorted(own, key=lambda row: (order[row["policy"]], protected[row["run"]] is False)):
            kept = {True: "yes", False: "no", None: ""}[protected[row["run"]]]
            lines.append(line(row, f"{style.LABELS[row['policy']]}, as CR{cr}", kept))
    return table(lines, results)


def headline() -> str:
    """One chain of the family, and of the policies that hold no less than its member for CR 4."""
    results = read("gsm8k_512")
    longest = results["rows"][0]["max_length"]
    single = [row for row in results["rows"] if row["chains"] == 1 and row["max_length"] == longest]
    own = [row for row in single if row["policy"] in ("full", "dms")]
    others = [
        row for row in single if "_cr4_" in row["run"] and results["runs"][row["run"]]["protect_prompt"] is not False
    ]
    rows = [*own, *sorted(others, key=lambda row: -row["accuracy"]["mean"])]
    lines = [
        [
            label(row, results) if row in own else style.LABELS[row["policy"]],
            percent(row["accuracy"]),
            f"{row['kv_reads']:,.0f}",
            f"{row['peak_tokens']:,.0f}",
        ]
        for row in rows
    ]
    return f"{markdown(['one chain', 'accuracy %', 'KV reads', 'tokens held at most'], lines)}\n\n{note(results)}"


def retrofits() -> str:
    """Gates, ways to train and windows beside each other: one chain."""
    results = read("gsm8k_512_retrofits")
    lines = []
    for row in results["rows"]:
        if row["chains"] == 1:
            trained = RETROFITS.get(row["run"].removeprefix("gsm8k_512_"), "")
            lines.append(line(row, f"CR{row['cr']:g}: {trained}" if trained else "vanilla"))
    return table(lines, results)


def draws(name: str) -> str:
    """Two retrofits by one recipe, each on chains of its own: one chain and four."""
    results = read(f"{name}_two_draws")
    lines = []
    for row in results["rows"]:
        if row["chains"] in (1, 4):
            which = "first" if "_first_" in row["run"] else "second"
            lines.append(line(row, label(row, results) + (f", {which} retrofit" if row["policy"] == "dms" else "")))
    return table(lines, results)


# Runs of the retrofits' table -> what was trained; o is the decision offset.
RETROFITS = {
    **{f"dms{cr}": "adapter, window 16, o = 1" for cr in (2, 4, 8)},
    "lora": "adapter and LoRA, window 16, o = 1",
    **{f"lora0_cr{cr}": "adapter and LoRA, window 16, o = 0" for cr in (2, 4, 8)},
    **{f"full0_cr{cr}": "query neuron and all weights, window 16, o = 0" for cr in (4, 8)},
    **{f"w{w}_delayed": f"adapter, window {w}, o = 0, batch 8" for w in (4, 16, 64)},
    **{f"w{w}_immediate": f"adapter, window {w}, o = {w}, batch 8" for w in (4, 16, 64)},
}

TABLES = {
    "headline": headline,
    "gsm8k": functools.partial(family, "gsm8k_512"),
    "gsm8k_rivals": functools.partial(rivals, "gsm8k_512"),
    "gsm8k_retrofits": retrofits,
    "gsm8k_draws": functools.partial(draws, "gsm8k_512"),
    "math500": functools.partial(family, "math500_512"),
    "math500_rivals": functools.partial(rivals, "math500_512"),
    "math500_draws": functools.partial(draws, "math500_512"),
    "humaneval": functools.partial(family, "humaneval_512"),
    "humaneval_rivals": functools.partial(rivals, "humaneval_512"),
    "gsm8k_15b": functools.partial(family, "gsm8k_512_1.5b"),
    "gsm8k_15b_draws": functools.partial(draws, "gsm8k_512_1.5b"),
    "gsm8k_15b_rivals": functools.partial(rivals, "gsm8k_512_1.5b"),
    "math500_15b": functools.partial(family, "math500_512_1.5b"),
    "math500_15b_draws": functools.partial(draws, "math500_512_1.5b"),
    "math500_15b_rivals": functools.partial(rivals, "math500_512_1.5b"),
    "humaneval_15b": functools.partial(family, "humaneval_512_1.5b"),
    "humaneval_15b_draws": functools.partial(draws, "humaneval_512_1.5b"),
    "humaneval_15b_rivals": functools.partial(rivals, "humaneval_512_1.5b"),
}
