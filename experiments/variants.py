"""What an experiment compares: a model under several policies, at several compression ratios and budgets."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dms_jax import policies
from dms_jax.config import DMSConfig, one_of, require

# Policies that need no training, but to be told how many tokens a head may keep (Quest: may read).
TRAINING_FREE = tuple(policies.BUDGETED)
SCORED = tuple(policy.name for policy in policies.SCORED)  # those of them that evict


class Variant(NamedTuple):
    """A policy with its member of a retrofitted family (None: the weights as they are) or its budget.

    policy: None for the model's own, dms where it was retrofitted, full otherwise.
    protect_prompt, evict_every: see `dms_jax.policies.ScoredPolicy`; None leaves them to the method.
    """

    policy: str | None
    cr: float | None = None
    budget: int | float | None = None
    protect_prompt: bool | None = None
    evict_every: int | None = None

    @property
    def name(self) -> str:
        """`full`, `dms CR4`, `tova 256`, `tova 0.25`, `tova 256 prompt every 64`."""
        cr = "" if self.cr is None else f" CR{self.cr:g}"
        name = f"{self.policy}{cr}" + ("" if self.budget is None else f" {self.budget:g}")
        if self.protect_prompt is not None:
            name += " prompt" if self.protect_prompt else " no prompt"
        return name if self.evict_every is None else f"{name} every {self.evict_every}"

    @property
    def eviction(self) -> dict:
        """What `generate` is told of a budgeted policy."""
        options = {key: getattr(self, key) for key in ("budget", "protect_prompt", "evict_every")}
        return {key: value for key, value in options.items() if value is not None}


class Loaded(NamedTuple):
    """A variant with its model; `dms` is None for policies that read no gate."""

    variant: Variant
    lm: Any
    dms: DMSConfig | None

    @property
    def options(self) -> dict:
        """What `generate` is told of it."""
        return {"policy": self.variant.policy, "dms": self.dms, **self.variant.eviction}

    def in_tokens(self, length: int | None) -> "Loaded":
        """The same with a budget in tokens: a share is one of `length`, or of the model's context where that is None.

        Else it would be one of the longest sequence, and how many there are must not change it.
        """
        if self.variant.budget is None:
            return self
        budget = policies.tokens_of(self.variant.budget, length or self.lm.config.max_positions)
        return self._replace(variant=self.variant._replace(budget=budget))


def variants(
    names: Sequence[str],
    crs: Sequence[float],
    budgets: Sequence[int | float],
    protect_prompt: bool | None = None,
    evict_every: int | None = None,
) -> list[Variant]:
    """Every policy once: DMS for each ratio, a training-free one for each budget, with the options that it has.

    Raises:
      ConfigError: a value twice or out of range, a training-free policy without a budget, or a ratio, a budget or an
        option that no policy takes.
    """
    for key, values in (("policy", names), ("cr", crs), ("budget", budgets)):
        require(len(set(values)) == len(values), key, tuple(values), "a value occurs twice")
    require(all(cr > 1 for cr in crs), "cr", tuple(crs), "must be above 1; --policy full is the original")
    for budget in budgets:
        fits = budget >= 1 if isinstance(budget, int) else 0 < budget <= 1
        require(fits, "budget", budget, "is tokens per head (1, 2, ...) or a share of the longest (0.0 to 1.0)")
    trained, free = "dms" in names, [name for name in names if name in TRAINING_FREE]
    require(trained or not crs, "cr", tuple(crs), "only policy dms comes in several ratios")
    require(bool(free) or not budgets, "budget", tuple(budgets), "only training-free policies take one")
    require(bool(budgets) or not free, "policy", free, "needs --budget")
    scored = [name for name in free if name in SCORED]
    for key, value in (("protect_prompt", protect_prompt), ("evict_every", evict_every)):
        require(value is None or bool(scored), key, value, "only training-free policies that evict have it")
    out = []
    for policy in names:
        if policy == "dms":
            out += [Variant(policy, cr=cr) for cr in crs or (None,)]
        else:
            options = (protect_prompt, evict_every) if policy in scored else ()
            out += [Variant(policy, None, budget, *options) for budget in (budgets if policy in free else (None,))]
    return out


def load(
    model: str,
    chosen: Sequence[Variant],
    dtype: str,
    gate: str | Path | None = None,
    window: int | None = None,
    meanwhile: Callable[[int, Loaded], None] | None = None,
) -> list[Loaded]:
    """The model of each variant, whose policy is then known; variants of the same weights share them.

    meanwhile: called while weights are read, with the number of each variant of these weights and what will be loaded,
      with shapes in place of parameters.

    Raises:
      ConfigError: an unknown policy, a model without a tokenizer, or DMS on a model that was never retrofitted.
    """
    import dms_jax

    for variant in chosen:
        one_of("policy", variant.policy or "full", policies.NAMES)
    family = gate is not None and Path(gate).is_dir()  # without a ratio it means the original

    def early(cr: float | None, lm: Any) -> None:
        for n, variant in enumerate(chosen):
            if meanwhile and variant.cr == cr:
                meanwhile(n, _resolved(variant, lm, model, window))

    models = {}
    for cr in {v.cr for v in chosen}:
        own = None if family and cr is None else gate
        models[cr] = dms_jax.load(model, dtype=dtype, gate=own, cr=cr, meanwhile=functools.partial(early, cr))
    loaded = [_resolved(variant, models[variant.cr], model, window) for variant in chosen]
    one = any(model.dms for model in loaded)
    require(window is None or one, "window", window, "only policy dms has one")
    return loaded


def _resolved(variant: Variant, lm: Any, model: str, window: int | None) -> Loaded:
    """A variant with its policy, and the DMSConfig that it runs with."""
    dms = None
    variant = variant._replace(policy=variant.policy or ("full" if lm.dms is None else "dms"))
    require(lm.tokenizer is not None, "model", model, "has no tokenizer")
    if variant.policy == "dms":
        require(lm.dms is not None, "policy", "dms", f"{model} was never retrofitted; is a --cr missing?")
        dms = lm.dms if window is None else dataclasses.replace(lm.dms, window=window)
    return Loaded(variant, lm, dms)


def batches(items: Sequence, size: int) -> Iterator[tuple[list, list]]:
    """Groups of `size`, each beside itself filled up with copies: one batch size compiles once."""
    for start in range(0, len(items), size):
        group = list(items[start : start + size])
        yield group, group + [group[-1]] * (size - len(group))
