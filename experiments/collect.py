"""One table of several runs on the same problems: every row over the problems that all of them finished.

A comparison of many models or policies is often sampled in parts, on several devices or with options that differ
from policy to policy. The first row of the first run is what gains are paired with. Of a run that was interrupted those
models count that have all chains of all its problems, or with --common of the problems that every run finished.

example:
  python -m experiments.collect runs/gsm8k-full runs/gsm8k-dms runs/gsm8k-tova --out gsm8k.json
"""

import operator
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console

from experiments import report, stats
from experiments.command import metavar
from experiments.run import RunError, differences, read_config, read_json, read_jsonl, write_json

COMMON = ("problems", "seed", "temperature", "top_p", "stop")  # of a run's config.json
RUN = ("run", "left", True, operator.itemgetter("run"))  # a column, as in report.py
SHOWN = ("gate", "window", "budget", "protect_prompt", "evict_every")  # of a run, beside each of its rows


class Part(NamedTuple):
    """A run: its folder, and what stands in its files; rows: those of its table."""

    folder: Path
    config: dict
    entry: dict
    samples: list[dict]
    rows: list[dict]
    results: dict | None

    def cells(self, number: int) -> list[stats.Cell]:
        """The rows of its table, with sources that no other part has."""
        return [
            stats.Cell(r["config"], f"{number}/{r['source']}", *(r[f] for f in stats.Cell._fields[2:]))
            for r in self.rows
        ]


def read_part(folder: Path, problems: set[str] | None = None) -> Part:
    """A run folder; problems: those for which models of an unfinished run must have all their chains.

    Raises:
      RunError: it is none, holds no table of chains, or its run is not finished and has no such model.
    """
    config = read_config(folder)
    if config is None:
        raise RunError(f"{folder}: not a run folder")
    samples, entries = read_jsonl(folder / "samples.jsonl"), read_json(folder / "metadata.json", list)
    if "chains" not in config or not entries:
        raise RunError(f"{folder}: holds no chains of a task's problems")
    if (folder / "results.json").exists():
        results = read_json(folder / "results.json", dict)
        if not results.get("rows") or results.get("samples", len(samples)) != len(samples):
            raise RunError(f"{folder}: results.json is not of all chains there; the run's own command mends it")
        return Part(folder, config, entries[-1], samples, results["rows"], results)
    # Lengths of a sweep's models differ.
    rows = complete_rows(config, samples, problems) if problems and not config.get("sweep") else []
    if not rows:
        raise RunError(f"{folder}: this run is not finished; its own command continues it")
    return Part(folder, config, entries[-1], samples, rows, None)


def complete_rows(config: dict, samples: list[dict], problems: set[str]) -> list[dict]:
    """What rows of a run's table would say of the models that have every chain of these problems."""
    rows = []
    for source, group in stats.group_samples(samples).items():
        if problems <= finished_problems(group):
            one = group[min(problems)][0]
            length, most, cr = one["config"].split("-", 2)
            shared = {"source": source, "policy": one["policy"], "max_length": config["max_length"]}
            shared |= {"cr": None if cr == "?" else float(cr)}
            chains = sorted({*config["chains"], int(most)})
            rows += [{"config": f"{length}-{w}-{cr}", "chains": w, **shared} for w in chains]
    return rows


def finished_problems(group: dict[str, list[dict]]) -> set[str]:
    """The problems of which a model has all its chains, whose number its samples say as the W of L-W-CR."""
    return {problem for problem, made in group.items() if len(made) >= int(made[0]["config"].split("-")[1])}


def voting(part: Part, numbers: Sequence[int]) -> Part:
    """The part with rows of these numbers of chains too, for each of its models that has more chains than that."""
    rows = []
    for source in dict.fromkeys(row["source"] for row in part.rows):
        own = [row for row in part.rows if row["source"] == source]
        length, _, cr = own[0]["config"].split("-", 2)
        have = {row["chains"] for row in own}
        more = [n for n in set(numbers) - have if n < max(have)]
        own += [{**own[0], "config": f"{length}-{n}-{cr}", "chains": n} for n in more]
        rows += sorted(own, key=operator.itemgetter("chains"))
    return part._replace(rows=rows)


def collect(parts: list[Part]) -> dict[str, Any]:
    """The content of a results.json with the rows of all parts.

    Raises:
      RunError: parts on other problems, whose chains were drawn otherwise, or two of one name.
    """
    first, named = parts[0], {part.folder.name: part.folder for part in parts}
    for part in parts:
        if named[part.folder.name] != part.folder:
            raise RunError(f"{part.folder}: {named[part.folder.name]} has the same name, by which rows are told apart")
        mine, theirs = ({key: p.config.get(key) for key in COMMON} for p in (part, first))
        changed = differences(mine, theirs)
        if changed:
            raise RunError(f"{part.folder}: {', '.join(changed)}: not as in {first.folder}")
    cells = [cell for n, part in enumerate(parts) for cell in part.cells(n)]
    samples = [{**s, "source": f"{n}/{s['source']}"} for n, part in enumerate(parts) for s in part.samples]
    rows = stats.table(samples, cells, "pass" if "pass_at" in first.results["rows"][0] else "vote")
    for row in rows:
        number, _, row["source"] = row["source"].partition("/")
        row["run"] = parts[int(number)].folder.name
    copied = {key: first.results[key] for key in ("experiment", "task", "form", "seed", "interval", "caption")}
    runs = {
        part.folder.name: {
            "command": part.entry["command"],
            **{key: part.config.get(key) for key in SHOWN},
            "environment": part.entry,
            "finished": part.results is not None,
        }
        for part in parts
    }
    return {
        **copied,
        "problems": rows[0]["problems"] if rows else 0,
        "all_problems": len({sample["id"] for sample in first.samples}),
        "config": first.config,
        "runs": runs,
        "rows": rows,
    }


def finished_by_all(folder: Path) -> set[str]:
    """Problems of which every model in a run folder has all its chains."""
    groups = stats.group_samples(read_jsonl(folder / "samples.jsonl"))
    done = [finished_problems(group) for group in groups.values()]
    return set.intersection(*done) if done else set()


def main(
    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], metavar("RUN ...")]],
    out: Path,
    common: bool = False,
    chains: tuple[int, ...] = (),
) -> int:
    """Writes OUT, which the scripts of paper_figures draw, and prints its table.

    Args:
      runs: run folders of one task, of which the first is finished.
      out: the JSON file.
      common: count every model, over the problems that all runs finished. Which these are depends on where a run was
        interrupted: on the order of the problems, and a little on how long their chains are.
      chains: numbers of chains that have rows beside those of the runs, where a run has more; the first ones vote.
    """
    try:
        first = read_part(runs[0])
        problems = {sample["id"] for sample in first.samples}
        if common:
            problems = problems.intersection(*(finished_by_all(folder) for folder in runs))
        parts = [first, *(read_part(folder, problems) for folder in runs[1:])]
        outcome = collect([voting(part, chains) for part in parts])
    except RunError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    write_json(out, outcome)
    columns = report.PASS_COLUMNS if outcome["rows"] and "pass_at" in outcome["rows"][0] else report.COLUMNS
    title = f"{outcome['task']}: {outcome['problems']} problems that all {len(runs)} runs finished"
    report.print_results(Console(width=report.WIDE), outcome["rows"], title, (RUN, *columns[1:-2]))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__, prog="python -m experiments.collect"))
