"""Majority votes, pass@k, bootstrap intervals and the rows of a results table; numpy only."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
BOOTSTRAP_SEED = 0
CONFIDENCE = 0.95
METHOD = f"percentile bootstrap over problems, {RESAMPLES:,} resamples"


class Estimate(NamedTuple):
    """A mean over problems with its confidence interval."""

    mean: float
    low: float
    high: float


class Cell(NamedTuple):
    """One configuration of the table: a model's chains, of which the first `chains` vote."""

    name: str  # L-W-CR
    source: str  # which model's chains: their configuration as sampled, with its policy
    policy: str
    cr: float
    chains: int
    max_length: int


def majority(answers: Sequence[str | None]) -> int | None:
    """Index of the first chain that gave the winning answer; None where no chain gave one.

    The answer with the most votes wins. Of those tied, the one given by the earliest chain wins, so two chains
    that disagree count as the first.

        ["7", "9", None, "9"] -> 1         ["7", "9"] -> 0         [None, None] -> None
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None
    # Counter keeps the order of first appearance, and max returns the first of equals.
    return answers.index(max(votes, key=votes.__getitem__))


def bootstrap(values: Sequence[float]) -> Estimate:
    """The mean of one value per problem, with the interval of its bootstrap distribution.

    Problems are drawn with replacement. Where every problem has the same value the interval has no width: with a
    handful of problems, read it with the sample size beside it.
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        raise ValueError("no problems to estimate from")
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    means = np.empty(RESAMPLES)
    block = max(1, 2**22 // values.size)  # bounds the memory of the drawn indices
    for start in range(0, RESAMPLES, block):
        part = means[start : start + block]
        part[:] = values[rng.integers(values.size, size=(len(part), values.size))].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Estimate(float(values.mean()), float(low), float(high))


def voted_right(chains: Sequence[dict]) -> bool:
    """Whether the majority answer of these samples, given in order of chain, is right."""
    winner = majority([sample["answer"] for sample in chains])
    return winner is not None and chains[winner]["correct"]


def pass_at(right: int, chains: int, k: int) -> float:
    """The chance that one of k chains is right, drawn from `chains` of which `right` are: the unbiased estimate.

    pass_at(1, 4, 2) = 1 - (3 choose 2) / (4 choose 2) = 0.5
    """
    return 1 - math.comb(chains - right, k) / math.comb(chains, k)


def powers(chains: int) -> list[int]:
    """The k of pass@k for so many chains: 1, 2, 4, ..., and all of them."""
    return sorted({*(2**n for n in range(chains.bit_length())), chains})


def group_samples(samples: Iterable[dict]) -> dict[str, dict[str, list[dict]]]:
    """source -> problem id -> samples in order of chain."""
    groups: dict[str, dict[str, list[dict]]] = {}
    for sample in samples:
        groups.setdefault(sample["source"], {}).setdefault(sample["id"], []).append(sample)
    for problems in groups.values():
        for chains in problems.values():
            chains.sort(key=lambda sample: sample["chain"])
    return groups


def complete_problems(groups: dict, cells: Sequence[Cell]) -> list[str]:
    """Problems for which every cell has its first chains, in an order that does not depend on which ended first."""

    def complete(problem):
        made = [(groups.get(c.source, {}).get(problem, ())[: c.chains], c.chains) for c in cells]
        return all([sample["chain"] for sample in first] == list(range(chains)) for first, chains in made)

    return sorted((problem for problem in groups.get(cells[0].source, {}) if complete(problem)), key=natural)


def natural(problem: str) -> tuple[int, str]:
    """A sort key under which "mini-9" comes before "mini-10"."""
    return len(problem), problem


def table(samples: Iterable[dict], cells: Sequence[Cell], metric: str = "vote") -> list[dict]:
    """One row a cell, all over the same problems: those that every cell has finished.

    A problem is solved if the majority answer is right or, with metric "pass", if any chain is (pass@all); such rows
    have `pass_at`, the unbiased estimates from the cell's chains for k = 1, 2, 4, ... Costs are sums over a problem's
    chains, averaged over problems: chains run in parallel, so their peaks add up. `achieved_cr` and `finished` are
    means over chains. `gain` compares with the first cell, problem by problem.
    """
    groups = group_samples(samples)
    problems = complete_problems(groups, cells)
    rows, first = [], None
    for cell in cells if problems else ():
        chains = [groups[cell.source][problem][: cell.chains] for problem in problems]
        counts = [sum(sample["correct"] for sample in c) for c in chains]
        solved = [voted_right(c) for c in chains] if metric == "vote" else [count > 0 for count in counts]
        right = np.array(solved, float)
        first = right if first is None else first
        rows.append(
            {
                "config": cell.name,
                "source": cell.source,
                "policy": cell.policy,
                "cr": cell.cr,
                "chains": cell.chains,
                "max_length": cell.max_length,
                "problems": len(problems),
                "accuracy": bootstrap(right)._asdict(),
                "gain": bootstrap(right - first)._asdict(),
                **{
                    field: float(np.mean([sum(s[field] for s in c) for c in chains]))
                    for field in ("kv_reads", "prefill_reads", "peak_tokens", "tokens")
                },
                **{
                    field: float(np.mean([s[field] for c in chains for s in c]))
                    for field in ("achieved_cr", "finished")
                },
            }
        )
        if metric == "pass":
            rows[-1]["pass_at"] = {
                str(k): bootstrap([pass_at(count, cell.chains, k) for count in counts])._asdict()
                for k in powers(cell.chains)
            }
    return rows
