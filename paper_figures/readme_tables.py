"""Writes the tables of the README and of docs/ from the recorded results, so that no number is typed by hand.

usage: python -m paper_figures.readme_tables
"""

import json
import re
from pathlib import Path

from paper_figures import baseline_tables, decode_speed, job_tables, offload_table, real_model_tables, style, two_gpus
from paper_figures.decode_speed import series_of
from paper_figures.rows import device, interval, markdown, milliseconds, percent

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
TARGET = 1.35  # of the time of a decode step over its floor, from 8 sequences on
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("results", "speed")))


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


def decode_row(row: dict) -> list[str]:
    """A row of bench_decode or, where it has no ratio, of decode_peers."""
    sequences = f"{row['batch']}" + (
        " (the most that fit)" if row.get("largest_batch") and row.get("fits", True) else ""
    )
    if "seconds_per_step" in row:
        floor = f"{row['over_floor']:.2f}" if "over_floor" in row else ""
        numbers = [milliseconds(row["seconds_per_step"]), floor, f"{row['tokens_per_second']:,.0f}"]
    else:
        numbers = ["failed" if row.get("fits", True) else "does not fit", "", ""]
    needs = f"{row['bytes_needed'] / 1e9:,.1f}" if "bytes_needed" in row else ""
    return [f"{row['context']:,}", series_of(row), sequences, needs, *numbers]


def decode_note(results: dict) -> str:
    """How the rows of one record were made; its runs differ in their cells and in the copy rates they measured."""
    runs = results["runs"]
    about, settings = runs[-1]["environment"], runs[-1]["settings"]
    device = about["device"].split(" gpu ")[1]
    made = f"{settings['dtype']}, random weights; medians of {settings['rounds']} calls of {settings['steps']} steps"
    if "copy_bytes_per_second" not in runs[-1]:
        return f"transformers {about['transformers']} (torch {about['torch']}): {device}, {made}."
    rates = " and ".join(f"{run['copy_bytes_per_second'] / 1e12:.2f}" for run in runs)
    rate = f"copy rate {rates} TB/s in the same run" + ("s" if len(runs) > 1 else "")
    over = sorted(
        (row["over_floor"], row["cell"])
        for row in results["rows"]
        if row["batch"] >= 8 and row.get("over_floor", 0) > TARGET
    )
    missed = ", ".join(f"{cell} ({ratio:.3f})" for ratio, cell in over) or "none"
    return (
        f"{settings['model']}'s shape: {device}, {made}; jax {about['jax']}; {rate}. "
        f"Over {TARGET} times the floor from 8 sequences on: {missed}."
    )


def decode_table(records: list[dict]) -> str:
    """What was recorded on one machine for one model's shape: ours, then transformers."""
    rows = [row for results in records for row in results["rows"]]
    rows.sort(key=lambda row: (row["context"], row["batch"], row.get("cr", float("inf"))))
    header = ["context", "cache", "sequences", "GB", "ms a step", "over the floor", "tokens/s"]
    notes = " ".join(decode_note(results) for results in records)
    return f"{markdown(header, [decode_row(row) for row in rows])}\n\n{notes}"


def gpu_decode() -> str:
    """Whole decode steps against the floor: a table for each folder and model."""
    folders = sorted({path.parent for path in RESULTS.glob("*/decode_*.json")})
    return "\n\n".join(decode_table(records) for folder in folders for records in decode_speed.read(folder).values())


def gpu_headline() -> str:
    """The most sequences that fit on an H200: tokens per second beside vanilla."""
    lines, made = [], set()
    for model, records in decode_speed.read(RESULTS / "h200").items():
        rows = [
            row for record in records for row in record["rows"] if row["largest_batch"] and "tokens_per_second" in row
        ]
        vanilla = {row["context"]: row["tokens_per_second"] for row in rows if row.get("cr") == 1}
        rows = [row for row in rows if row["context"] in vanilla]
        for row in sorted(rows, key=lambda row: (row["context"], row["tokens_per_second"])):
            context, cache, sequences, *_, tokens = decode_row(row)
            ratio = f"{row['tokens_per_second'] / vanilla[row['context']]:.2f}x"
            lines.append([model, context, cache, sequences.split(" ")[0], tokens, ratio])
            made |= {(run["environment"]["device"], run["settings"]["dtype"]) for r in records for run in r["runs"]}
    header = ["shape", "context", "cache", "sequences", "tokens/s", "of vanilla"]
    note = "; ".join(f"{device.split(' gpu ')[1]}, {dtype}, random weights" for device, dtype in sorted(made))
    return f"{markdown(header, lines)}\n\n{note}."


FLASH_HEADER = ["case", "by", "ms (forward / backward)", "rate", "MB at peak"]


def flash_cells(row: dict, same: float = 1.0) -> list[str]:
    """Times, shares of a matrix product (multiplied by `same`), and memory."""
    shares = (f"{same * row[f'{part}_of_matmul']:.0%}" for part in ("forward", "backward"))
    times = f"{1e3 * row['forward_seconds']:.2f} / {1e3 * row['backward_seconds']:.2f}"
    peak = f"{row['peak_bytes'] / 1e6:,.0f}" if row.get("peak_bytes") else ""
    return [times, f"{' / '.join(shares)} of a product", peak]


def gpu_flash() -> str:
    """Flash attention in Pallas and its peers, in one run."""
    (path,) = RESULTS.glob("*/kernels_flash_pallas.json")
    results = json.loads(path.read_text())
    timed = [row for row in results["rows"] if row["name"] == "flash"]
    rows = [[row["case"], row.get("peer", "ours in Pallas"), *flash_cells(row)] for row in timed]
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items() if v)
    note = f"{results['device']}, driver {results['driver']}, {versions}; bfloat16, medians."
    return f"{markdown(FLASH_HEADER, rows)}\n\n{note}"


def gpu_kernels() -> str:
    """The kernels beside their peers: decode, and flash attention and its peers, were measured in runs of their own."""
    paths = {name: RESULTS / "h200" / f"kernels_{name}.json" for name in ("decode", "flash", "flash_peers")}
    records = {name: json.loads(path.read_text()) for name, path in paths.items()}
    results = records["decode"]
    product = {
        name: next(row["flop_per_second"] for row in record["rows"] if row["name"] == "matmul")
        for name, record in records.items()
    }

    def rate(name: str, row: dict) -> list[str]:
        if "of_copy" in row:
            return [f"{1e3 * row['seconds']:.3f}", f"{row['of_copy']:.0%} of a copy", ""]
        return flash_cells(row, product[name] / product["flash"])  # all flash attention as shares of one run's product

    rows = [
        [row["case"], row.get("peer", "ours"), *rate(name, row)]
        for name, record in records.items()
        for row in record["rows"]
        if row["name"] == name.removesuffix("_peers") and "error" not in row
        if "peer" in row or not name.endswith("_peers")  # that run timed ours too, by the host's clock
    ]
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items() if v)
    note = f"{results['device']}, driver {results['driver']}, {versions}; bfloat16, medians."
    return f"{markdown(FLASH_HEADER, rows)}\n\n{note}"


def gpu_latent() -> str:
    """Decoding of latent entries and of quantized pages, beside the kernel that took bytes one by one."""
    results = json.loads((RESULTS / "h100" / "kernels_latent.json").read_text())
    before = {row["case"]: f"{1e3 * row['seconds']:.3f}" for row in results["rows"] if row["name"] == "decode before"}
    rows = [
        [
            row["case"],
            before.get(row["case"], ""),
            f"{1e3 * row['seconds']:.3f}",
            f"{row['of_copy']:.0%}",
            f"{row['of_copy'] * row['seconds'] / alone:.0%}" if (alone := row.get("split_kv_seconds")) else "",
        ]
        for row in results["rows"]
        if row["name"] == "decode"
    ]
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items() if v)
    note = f"{results['device']}, driver {results['driver']}, {versions}; bfloat16 but where it says so, medians."
    return f"{markdown(['case', 'ms before', 'ms', 'of a copy', 'split_kv alone'], rows)}\n\n{note}"


def sweep() -> str:
    """Every policy with one chain, at the ratios where they part."""
    results = json.loads((RESULTS / "sweep.json").read_text())
    ratios = [1.0, 1.25, 1.5, 2.0, 4.0, 8.0]
    cells = {(row["policy"], row["cr"]): row for row in results["rows"] if row["chains"] == 1}
    rows = [
        [
            style.LABELS[policy],
            *(percent(cells[policy, cr]["accuracy"]) if (policy, cr) in cells else "" for cr in ratios),
        ]
        for policy in style.by_policy(results["rows"])
    ]
    note = (
        f"Accuracy % of one chain, {results['problems']} problems, seed {results['seed']}, 95% intervals by bootstrap "
        "over problems; sampled in parts on one H100, which were then merged. An empty cell was not run."
    )
    return f"{markdown(['policy', *(f'CR {cr:g}' for cr in ratios)], rows)}\n\n{note}"


def read_fidelity(kind: str = "") -> tuple[dict, dict, dict]:
    """The record of the policies on a GPU, that of the bundled gates on a CPU, and rows by policy and target CR."""
    results = json.loads((RESULTS / "h100" / f"fidelity_smollm2{kind}.json").read_text())
    bundled = json.loads((RESULTS / "smollm2" / f"fidelity_bundled{kind}.json").read_text())
    others = [row for row in results["rows"] if row["policy"] != "dms"]
    rows = [others[0], *bundled["rows"], *others[1:]]
    return results, bundled, {(row["policy"], row["cr"] or 1 / (row["budget"] or 1)): row for row in rows}


def fidelity() -> str:
    """How far a compressed SmolLM2 is from the original, under the cache as it runs: in a chat, and on bare text."""
    (results, bundled, cells), (_, _, alone) = read_fidelity(), read_fidelity("_text_alone")
    rows = [
        [
            *(style.LABELS[policy], f"{cr:g}", f"{row['achieved_cr']:.2f}", interval(row["kl"])),
            *(interval(row["agreement"], 100), interval(row["perplexity"]), interval(alone[policy, cr]["kl"])),
            str(row["windows"]),
        ]
        for (policy, cr), row in cells.items()
    ]
    config, first, own = results["config"], results["rows"][0], bundled["rows"][0]
    note = (
        f"The first windows of {config['length']} tokens of held-out WikiText-2 as the answer to "
        f'"{config["chat"]}", the last {config["length"] - config["prompt"]} decoded through the cache (pages of '
        f"{config['page_size']}); KL in nats a token and agreement with the original's greedy choice, 95% intervals by "
        f"bootstrap over windows. The original has perplexity {first['perplexity_reference']['mean']:.1f} over "
        f"{first['windows']} windows and {own['perplexity_reference']['mean']:.1f} over {own['windows']}. KL, text "
        f"alone: without the chat template. Quest stores everything and reads that share. "
        f"{results['config']['dtype']}, {device(results)} DMS: "
        f"{bundled['config']['dtype']}, {device(bundled)}"
    )
    header = ["policy", "target CR", "achieved CR", "KL", "agreement %", "perplexity", "KL, text alone", "windows"]
    return f"{markdown(header, rows)}\n\n{note}"


def ruler() -> str:
    """Needles and variable tracking: a line for each task and length, a column for each policy."""
    results = json.loads((RESULTS / "h200" / "ruler_smollm2.json").read_text())
    cells = {(row["task"], row["length"], row["policy"]): row for row in results["rows"]}
    policies = [name for name in style.POLICIES if any(key[2] == name for key in cells)]

    def cell(*key) -> str:
        if key not in cells:
            return ""
        return percent(cells[key]["score"]) + ("*" if cells[key]["device"].startswith("cpu") else "")

    lines = sorted({key[:2] for key in cells})
    rows = [[f"{task}, {length:,}", *(cell(task, length, name) for name in policies)] for task, length in lines]
    own = [row["achieved_cr"] for row in results["rows"] if row["policy"] == "dms"]
    counts = {row["samples"] for row in results["rows"]}
    note = (
        f"Score %, {min(counts)} questions a cell, greedy, 95% intervals by bootstrap over questions. DMS: the gate "
        f"for CR 4, which achieves {min(own):.1f} to {max(own):.1f} here. TOVA, H2O and StreamingLLM hold a quarter "
        f"of the length (pages of {results['config']['page_size']}); Quest stores everything and reads a quarter. "
        f"R-KV, KeyDiff, SnapKV and VaSE hold a quarter and evict every 16 steps (on an H100, or with a star); Random "
        f"Attention never evicts a prompt, and holds all there is here. "
        f"{results['environment']['device'].split(' gpu ')[1]}, bfloat16, jax {results['environment']['jax']}"
    )
    on_cpu = any(row["device"].startswith("cpu") for row in results["rows"])
    note += "; with a star, two CPU cores, float32." if on_cpu else "."
    return f"{markdown(['task, length', *(style.LABELS[name] for name in policies)], rows)}\n\n{note}"


TABLES = {
    "job": job_tables.job,
    "gsm8k_job": job_tables.gsm8k_job,
    "start": job_tables.start,
    "fidelity": fidelity,
    "mini": mini,
    "ruler": ruler,
    "speed": speed,
    "gpu_headline": gpu_headline,
    "gpu_decode": gpu_decode,
    "gpu_kernels": gpu_kernels,
    "gpu_flash": gpu_flash,
    "gpu_latent": gpu_latent,
    "offload": offload_table.offload,
    "tensor": two_gpus.tensor,
    "retrofit_gpus": two_gpus.retrofit,
    "sweep": sweep,
    "baselines": baseline_tables.baselines,
    "mini_latent": baseline_tables.latent,
    "regressed": baseline_tables.regressed,
    **real_model_tables.TABLES,
}


def render(text: str) -> str:
    """`text` with what stands between `<!-- table NAME -->` and `<!-- end -->` made anew."""

    def fill(match: re.Match) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text()))
        print(page)


if __name__ == "__main__":
    main()
