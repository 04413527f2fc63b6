"""Tables of today's training-free rivals."""

import json

from paper_figures import style
from paper_figures.rows import device, markdown, percent


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
