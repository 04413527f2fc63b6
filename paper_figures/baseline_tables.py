"""Tables of today's training-free rivals, and of a gate that was regressed instead of distilled."""

import json

from paper_figures import real_model_tables, style
from paper_figures.rows import device, interval, markdown, percent


def read(name: str) -> dict:
    return json.loads((style.RESULTS / f"{name}.json").read_text())


def baselines() -> str:
    """The mini model's sweep with protected prompts: a line for each policy and ratio, by peak."""
    results = read("mini_baselines")
    plan = results["config"]["sweep"]
    rows = [
        [
            style.LABELS[policy],
            f"{row['cr']:g}",
            percent(row["accuracy"]),
            f"{row['kv_reads']:,.0f}",
            f"{row['peak_tokens']:,.0f}",
            f"{row['achieved_cr']:.2f}",
        ]
        for policy, group in style.by_policy(results["rows"]).items()
        for row in sorted(group, key=lambda row: row["cr"])
    ]
    note = (
        f"One chain, {results['problems']} problems, seed {results['seed']}, 95% intervals by bootstrap over problems. "
        f"Training-free policies but Quest never evict the prompt, and evict every {plan['evict_every']} steps; their "
        f"peak counts what they hold above the budget by then, Quest's its page summaries, and reads count what an "
        f"eviction reads again. {device(results)}"
    )
    return f"{markdown(['policy', 'CR', 'accuracy %', 'KV reads', 'peak tokens', 'achieved CR'], rows)}\n\n{note}"


def latent() -> str:
    """The mini task with latent attention and with keys and values, as many numbers a token: one chain and four."""
    records = {"latent": read("mini_latent/accuracy"), "keys and values": read("mini_latent/peer_accuracy")}
    rows = [
        real_model_tables.line(row, cache, f"{row['cr']:g}")
        for cache, results in records.items()
        for row in results["rows"]
    ]
    results = records["latent"]
    note = (
        f"{results['problems']} problems, seed {results['seed']}, temperature {results['config']['temperature']:g}, "
        f"95% intervals by bootstrap over problems, gains paired with CR 1 of the same model. {device(results)}"
    )
    header = ["cache", "CR", "chains", "accuracy %", "gain, points", "KV reads", "peak tokens", "achieved CR"]
    return f"{markdown(header, rows)}\n\n{note}"


def regressed() -> str:
    """SmolLM2 under two gates of one architecture: distilled, and regressed on what a second reading attends to."""
    distilled, fitted = read("smollm2/fidelity_distilled"), read("smollm2/fidelity_regressed")
    rows = [
        [name, f"{row['cr']:g}", f"{row['achieved_cr']:.2f}", interval(row["kl"]), interval(row["agreement"], 100)]
        for name, results in (("distilled (DMS)", distilled), ("regressed (as KVzap)", fitted))
        for row in results["rows"]
    ]
    config, first = fitted["config"], fitted["rows"][0]
    note = (
        f"SmolLM2-135M-Instruct, adapter gates over the same weights, with the same window; {first['windows']} pieces "
        f'of {config["length"]} tokens of held-out WikiText-2 as the answer to "{config["chat"]}", the last '
        f"{config['length'] - config['prompt']} decoded through the cache; KL in nats a token and agreement with the "
        f"original's greedy choice, 95% intervals by bootstrap over pieces. {device(fitted)}"
    )
    return f"{markdown(['supervision', 'target CR', 'achieved CR', 'KL', 'agreement %'], rows)}\n\n{note}"
