"""The configuration of a retrofit: mode, schedule, optimiser, data and mesh, checked on creation."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from dms_jax.config import Count, DMSConfig, Positive, Ratio, Seed, Size, Within, check, require
from dms_jax.models.gates import Gate, gate_of

TARGETS = ("q", "k", "v", "o")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates (Hu et al., arXiv 2106.09685) of attention projections: `W + alpha / rank * a b`.

    targets: which of q, k, v and o.
    """

    rank: Size = 16
    alpha: Positive = 32.0
    targets: tuple[Literal["q", "k", "v", "o"], ...] = TARGETS

    def __post_init__(self):
        check(self, "lora.")
        require(bool(self.targets), "lora.targets", self.targets, f"expected some of {', '.join(TARGETS)}")


@dataclass(frozen=True)
class SourceConfig:
    """A data set to train on.

    path: a JSONL or parquet file, or a name on the Hugging Face hub.
    weight: its share of the documents, relative to the other sources.
    split, subset: of a hub data set.
    prompt, response: the fields with a user's turn and its answer; messages: a field with a whole chat; text: a
      field with plain text. All empty: found by the usual names, see `documents.USUAL`.
    """

    path: str
    weight: Positive = 1.0
    split: str = "train"
    subset: str | None = None
    prompt: str = ""
    response: str = ""
    messages: str = ""
    text: str = ""

    def __post_init__(self):
        check(self, "data.")
        require(bool(self.path), "data.path", self.path, "names no data set")
        kinds = bool(self.prompt or self.response) + bool(self.messages) + bool(self.text)
        require(kinds <= 1, "data.text", self.text, "give prompt and response, or messages, or text")
        pair = bool(self.prompt) == bool(self.response)
        require(pair, "data.response", self.response, "prompt and response go together")


@dataclass(frozen=True)
class RetrofitConfig:
    """The configuration of a retrofit; defaults are the paper's (section 4, appendix B) where it gives them.

    model: what `dms_jax.load` takes.
    mode: what is trained: "full" every weight, "adapter" the adapter gate alone, "lora" low-rank updates and, with
      the adapter gate, the gate.
    retire_steps: over how many steps the query gate's neuron is scaled from 1 to 0, before anything is evicted; 0 takes
      it away at once.
    steps_per_cr, max_cr: the schedule CR(t) = 1 + t / steps_per_cr, held at max_cr.
    crs: the members of the family that are written besides the one at max_cr; none given: one at each whole CR.
    hold_steps: more steps at max_cr, during which the learning rate falls to 0.
    kl: "forward" is KL(teacher, student), "reverse" the other way (the authors' code).
    batch_size: rows of `context` tokens a step, taken in `accumulate` micro-batches one after the other. The
      compression loss is that of the whole batch, whose mean alpha is counted first: a forward pass of the student
      more where there are several micro-batches.
    context: tokens a row, into which documents are packed.
    compute: dtype of the forward and backward pass; what is trained is kept in float32.
    remat: what is recomputed in the backward pass: "none", "dots" (all but the products with weights), or "block"
      (all but each block's input).
    loss_chunk: tokens a row whose logits exist at once.
    mesh: devices along data, fsdp and tensor; the product is the number of devices.
    data: the sources that are blended; none given: problems of the mini task.
    save_every, log_every: steps between checkpoints (besides one at each member) and between lines of the log.
    """

    model: str = "mini"
    dms: DMSConfig = field(default_factory=DMSConfig)
    mode: Literal["full", "adapter", "lora"] = "full"
    lora: LoraConfig = field(default_factory=LoraConfig)
    retire_steps: Count = 2000
    steps_per_cr: Size = 100
    max_cr: Ratio = 8.0
    crs: tuple[Ratio, ...] = ()
    hold_steps: Count = 0
    kl: Literal["forward", "reverse"] = "forward"
    learning_rate: Positive = 3e-5
    warmup_steps: Count = 20
    weight_decay: Annotated[float, Within(0, 1)] = 0.0
    clip: Positive = 1.0
    batch_size: Size = 256
    accumulate: Size = 1
    context: Size = 512
    compute: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "block"] = "none"
    loss_chunk: Size = 256
    mesh: tuple[Size, Size, Size] = (1, 1, 1)
    data: tuple[SourceConfig, ...] = ()
    save_every: Size = 200
    log_every: Size = 10
    seed: Seed = 0

    def __post_init__(self):
        check(self)
        trains = self.mode != "adapter" or bool(self.gate.tensors)
        require(trains, "mode", self.mode, f"there is no adapter to train with gate={self.dms.gate!r}")
        learns = self.mode != "lora" or bool(self.gate.tensors) or "q" in self.lora.targets
        require(learns, "lora.targets", self.lora.targets, f"gate={self.dms.gate!r} is learnt by q alone")
        require(self.max_cr > 1, "max_cr", self.max_cr, "must be above 1")
        require(self.max_cr <= self.context, "max_cr", self.max_cr, f"a row has only context={self.context} tokens")
        divides = self.batch_size % self.accumulate == 0
        require(divides, "accumulate", self.accumulate, f"must divide batch_size={self.batch_size}")
        within = all(1 < cr <= self.max_cr for cr in self.crs)
        require(within, "crs", self.crs, f"the schedule goes from 1 to max_cr={self.max_cr:g}")
        for key, crs in (("max_cr", (self.max_cr,)), ("crs", self.crs)):
            steps = [(cr - 1) * self.steps_per_cr for cr in crs]
            reached = all(math.isclose(step, round(step), rel_tol=1e-6) for step in steps)
            reason = f"no whole step reaches it with steps_per_cr={self.steps_per_cr}"
            require(reached, key, getattr(self, key), reason)

    @property
    def gate(self) -> Gate:
        """The gate that is trained."""
        return gate_of(self.dms)

    @property
    def retirement(self) -> int:
        """Steps before anything is evicted."""
        return self.gate.retirement(self.retire_steps)

    @property
    def total_steps(self) -> int:
        return self.retirement + round((self.max_cr - 1) * self.steps_per_cr) + self.hold_steps

    def step_of(self, cr: float) -> int:
        """The step at which the schedule reaches a CR; that of the highest is the last."""
        return self.total_steps if cr == self.max_cr else self.retirement + round((cr - 1) * self.steps_per_cr)

    def members(self) -> dict[int, float]:
        """Step -> CR of every member of the family that is written."""
        crs = self.crs or range(2, math.ceil(self.max_cr))
        return {self.step_of(cr): float(cr) for cr in sorted({*crs, self.max_cr})}
