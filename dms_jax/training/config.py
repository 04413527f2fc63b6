"""The configuration of a retrofit: mode, schedule, optimiser, data and mesh, checked on creation."""

import math
from dataclasses import dataclass, field

from dms_jax.config import DMSConfig, one_of, require
from dms_jax.models.gates import Gate, gate_of

MODES = ("full", "adapter", "lora")
REMAT = ("none", "dots", "block")
TARGETS = ("q", "k", "v", "o")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates (Hu et al., arXiv 2106.09685) of attention projections: `W + alpha / rank * a b`.

    targets: which of q, k, v and o.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        require(self.rank > 0, "lora.rank", self.rank, "must be positive")
        require(self.alpha > 0, "lora.alpha", self.alpha, "must be positive")
        known = bool(self.targets) and set(self.targets) <= set(TARGETS)
        require(known, "lora.targets", self.targets, f"expected some of {', '.join(TARGETS)}")


@dataclass(frozen=True)
class SourceConfig:
    """A data set to train on.

    path: a JSONL or parquet file, or a name on the Hugging Face hub.
    weight: its share of the documents, relative to the other sources.
    split, subset: of a hub data set.
    prompt, response: the fields with a user's turn and its answer; messages: a field with a whole chat; text: a
      field with plain text. All empty: found by the usual names, see `documents.FIELDS`.
    """

    path: str
    weight: float = 1.0
    split: str = "train"
    subset: str | None = None
    prompt: str = ""
    response: str = ""
    messages: str = ""
    text: str = ""

    def __post_init__(self):
        require(bool(self.path), "data.path", self.path, "names no data set")
        require(self.weight > 0, "data.weight", self.weight, "must be positive")
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
    retire_steps: over how many steps the query gate's neuron is scaled from 1 to 0, before anything is evicted.
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
    mode: str = "full"
    lora: LoraConfig = field(default_factory=LoraConfig)
    retire_steps: int = 2000
    steps_per_cr: int = 100
    max_cr: float = 8.0
    crs: tuple[float, ...] = ()
    hold_steps: int = 0
    kl: str = "forward"
    learning_rate: float = 3e-5
    warmup_steps: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0
    batch_size: int = 256
    accumulate: int = 1
    context: int = 512
    compute: str = "float32"
    remat: str = "none"
    loss_chunk: int = 256
    mesh: tuple[int, int, int] = (1, 1, 1)
    data: tuple[SourceConfig, ...] = ()
    save_every: int = 200
    log_every: int = 10
    seed: int = 0

    def __post_init__(self):
        one_of("kl", self.kl, ("forward", "reverse"))
        one_of("mode", self.mode, MODES)
        one_of("compute", self.compute, ("float32", "bfloat16"))
        one_of("remat", self.remat, REMAT)
        trains = self.mode != "adapter" or bool(self.gate.tensors)
        require(trains, "mode", self.mode, f"there is no adapter to train with gate={self.dms.gate!r}")
        for key in ("learning_rate", "weight_decay", "clip", "max_cr"):
            require(math.isfinite(getattr(self, key)), key, getattr(self, key), "must be finite")
        for key in ("learning_rate", "clip"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be positive")
        require(self.max_cr > 1, "max_cr", self.max_cr, "must be above 1")
        require(self.max_cr <= self.context, "max_cr", self.max_cr, f"a row has only context={self.context} tokens")
        for key in ("steps_per_cr", "batch_size", "accumulate", "context", "loss_chunk", "save_every", "log_every"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be positive")
        for key in ("retire_steps", "hold_steps", "warmup_steps"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must not be negative")
        divides = self.batch_size % self.accumulate == 0
        require(divides, "accumulate", self.accumulate, f"must divide batch_size={self.batch_size}")
        require(len(self.mesh) == 3 and min(self.mesh) > 0, "mesh", self.mesh, "expected data, fsdp, tensor")
        reached = all(1 < cr <= self.max_cr for cr in self.crs)
        require(reached, "crs", self.crs, f"the schedule goes from 1 to max_cr={self.max_cr:g}")
        apart = len(self.members()) == len({*self.crs, self.max_cr}) or not self.crs
        require(apart, "crs", self.crs, f"two of them fall on one step with steps_per_cr={self.steps_per_cr}")

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
