"""The plan of a sweep, policies x L x W x CR on one model, and the runs that are put together to one.

A row of the table is a policy at a compression ratio, a maximum length and a number of chains. DMS comes in the
members of a retrofitted family. A policy with a budget holds `ceil(L / CR)` tokens a head, or reads as many (Quest),
whatever a prompt's length.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dms_jax import policies
from dms_jax.config import one_of, require
from dms_jax.config_files import load_yaml
from experiments import stats
from experiments.chains import Model
from experiments.run import Run, RunError, differences, read_config, read_jsonl
from experiments.variants import SCORED, TRAINING_FREE, Variant

PLAN = Path(__file__).resolve().parents[1] / "configs" / "aime_sweep.yaml"
# What may differ between runs that are merged: the rest decides what a chain is.
FREE_TO_DIFFER = ("policies", "sweep", "limit", "batch_size", "weights")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The cells of a sweep. problems: of each cell, unless a limit is given.

    protect_prompt, evict_every: see `dms_jax.policies.ScoredPolicy`; None leaves them to each method.
    """

    policies: tuple[str, ...]
    max_lengths: tuple[int, ...]
    chains: tuple[int, ...]
    dms_crs: tuple[float, ...]
    budget_crs: tuple[float, ...]
    page_size: int = 16
    problems: int = 512
    protect_prompt: bool | None = None
    evict_every: int | None = None

    def __post_init__(self):
        for key in ("policies", "max_lengths", "chains", "dms_crs", "budget_crs"):
            values = getattr(self, key)
            require(len(set(values)) == len(values), key, values, "a value occurs twice")
        for key in ("policies", "max_lengths", "chains"):
            require(len(getattr(self, key)) > 0, key, getattr(self, key), "must not be empty")
        for name in self.policies:
            one_of("policies", name, policies.NAMES)
        for key in ("max_lengths", "chains"):
            require(all(n > 0 for n in getattr(self, key)), key, getattr(self, key), "must be positive")
        for key in ("dms_crs", "budget_crs"):
            require(all(cr > 1 for cr in getattr(self, key)), key, getattr(self, key), "must be above 1")
        for key in ("page_size", "problems"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be positive")

    def restricted(self, names: Sequence[str]) -> "Sweep":
        """Only these of its policies; all for none."""
        for name in names:
            one_of("policies", name, self.policies)
        return dataclasses.replace(self, policies=tuple(p for p in self.policies if p in names)) if names else self

    def ratios(self, policy: str) -> tuple[float, ...]:
        return {"full": (1.0,), "dms": self.dms_crs}.get(policy, self.budget_crs)


def read(path: Path) -> Sweep:
    """The plan of a YAML file.

    Raises:
      ConfigError: no such file, or an impossible plan.
    """
    require(path.is_file(), "plan", str(path), "no such file")
    return load_yaml(Sweep, path)


class Entry(NamedTuple):
    """A model under a policy; its chains serve every W."""

    policy: str
    cr: float
    max_length: int

    @property
    def source(self) -> str:
        weights = f"cr{self.cr:g}" if self.policy == "dms" else "base"
        return f"{weights}/{self.policy} CR{self.cr:g} L{self.max_length}"

    @property
    def budget(self) -> int | None:
        """Tokens a head, for a policy that needs to be told."""
        return math.ceil(self.max_length / self.cr) if self.policy in TRAINING_FREE else None

    def eviction(self, plan: Sweep) -> dict[str, Any]:
        """What `generate` is told of a budgeted policy."""
        options = (plan.protect_prompt, plan.evict_every) if self.policy in SCORED else ()
        return Variant(self.policy, None, self.budget, *options).eviction


def entries(plan: Sweep) -> Iterator[Entry]:
    for length in plan.max_lengths:
        for policy in plan.policies:
            yield from (Entry(policy, cr, length) for cr in plan.ratios(policy))


def models(plan: Sweep, load: Callable[[float | None], Any]) -> tuple[list[Model], list[stats.Cell]]:
    """What is sampled, and the rows of the table.

    Args:
      load: gives the member of the family for a CR, the original for None; called once for each.
    Raises:
      ConfigError: a budget too small for its policy, or DMS on a model that was never retrofitted.
    """
    loaded, made, cells = {}, [], []
    for entry in entries(plan):
        member = entry.cr if entry.policy == "dms" else None
        if member not in loaded:
            loaded[member] = load(member)
        lm, eviction = loaded[member], entry.eviction(plan)
        dms = lm.dms if entry.policy == "dms" else None
        policies.named(entry.policy, dms, page_size=plan.page_size, **eviction)  # an error now, not hours later
        names = {w: f"{entry.max_length / 1024:.2g}-{w}-{entry.cr:g}" for w in sorted(plan.chains)}
        most = max(plan.chains)
        made.append(Model(entry.source, names[most], lm, entry.policy, dms, most, entry.max_length, eviction))
        cells += [
            stats.Cell(name, entry.source, entry.policy, entry.cr, w, entry.max_length) for w, name in names.items()
        ]
    return made, cells


def _flat(config: dict) -> dict:
    """A run's configuration with what its plan says of all policies that evict, which is in no sample's source."""
    plan = config.get("sweep") or {}
    return config | {key: plan[key] for key in ("protect_prompt", "evict_every") if key in plan}


def merge(run: Run, folders: Sequence[Path], sources: Sequence[str]) -> int:
    """Takes over from other run folders the samples of these sources that the run lacks; returns how many.

    Raises:
      RunError: a folder whose run is another one in anything that decides what a chain is.
    """
    done = {(s["source"], s["id"], s["chain"]) for s in run.samples}
    before = len(done)
    for folder in folders:
        theirs = read_config(folder)
        if theirs is None:
            raise RunError(f"{folder}: not a run folder")
        changed = differences(_flat(theirs), _flat(run.config), FREE_TO_DIFFER)
        weights, ours = theirs.get("weights", {}), run.config["weights"]
        changed += [f"weights of {s}" for s in sorted(weights.keys() & ours.keys()) if weights[s] != ours[s]]
        if changed:
            raise RunError(f"{folder}: holds a run that differs in {', '.join(changed)}")
        rows = []
        for sample in read_jsonl(folder / "samples.jsonl"):
            key = (sample["source"], sample["id"], sample["chain"])
            if sample["source"] in sources and key not in done:
                done.add(key)
                rows.append(sample)
        run.append(rows)
    return len(done) - before
