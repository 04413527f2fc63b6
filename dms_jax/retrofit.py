"""Level 4. Retrofitting: the distillation loss, one train step, and the loop that runs it.

`L = KL(teacher, student) + max(alpha* - mean(alpha), 0)`, with the eviction mask soft (arXiv 2506.05345,
section 3). With the query gate the borrowed neuron is given up first, over `retire_steps`.
"""

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from tqdm import tqdm

from dms_jax import attention, checkpoint, dms, masks
from dms_jax.config import DMSConfig, ModelConfig, one_of, require
from dms_jax.data import Batch
from dms_jax.transformer import Attend, Decoder, arange_positions, causal
from dms_jax.types import NEGATIVE, Lengths, Params, Residual, State


@dataclass(frozen=True)
class RetrofitConfig:
    """A retrofit. Steps count batches; the defaults are the paper's (section 4, appendix B) where it gives them.

    retire_steps: over how many steps the query gate's neuron is scaled from 1 to 0, before anything is evicted.
    steps_per_cr, max_cr: the schedule CR(t) = 1 + t / steps_per_cr, held at max_cr.
    hold_steps: more steps at max_cr, during which the learning rate falls to 0.
    kl: "forward" is KL(teacher, student), "reverse" the other way (the authors' code).
    """

    dms: DMSConfig = field(default_factory=DMSConfig)
    retire_steps: int = 2000
    steps_per_cr: int = 100
    max_cr: float = 8.0
    hold_steps: int = 0
    kl: str = "forward"
    learning_rate: float = 3e-5
    warmup_steps: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self):
        one_of("kl", self.kl, ("forward", "reverse"))
        require(self.max_cr > 1, "max_cr", self.max_cr, "must be above 1")
        for key in ("steps_per_cr", "batch_size"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be positive")
        for key in ("retire_steps", "hold_steps", "warmup_steps"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must not be negative")

    @property
    def retirement(self) -> int:
        """Steps before anything is evicted: the adapter gate borrows no neuron, so none."""
        return self.retire_steps if self.dms.gate == "query" else 0

    @property
    def total_steps(self) -> int:
        return self.retirement + round((self.max_cr - 1) * self.steps_per_cr) + self.hold_steps


class TrainState(NamedTuple):
    """What a train step changes."""

    params: Params
    opt_state: State
    step: Array


def optimizer(config: RetrofitConfig) -> optax.GradientTransformation:
    """AdamW at a constant rate after warm-up, falling to 0 over `hold_steps`; gradients clipped by global norm."""
    pieces = [
        optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps),
        optax.linear_schedule(config.learning_rate, 0.0, max(config.hold_steps, 1)),
    ]
    if config.hold_steps == 0:
        pieces[1] = optax.constant_schedule(config.learning_rate)
    rate = optax.join_schedules(pieces, [config.total_steps - config.hold_steps])
    adamw = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def soft_eviction(config: DMSConfig, lengths: Lengths, key: Array) -> Attend:
    """An `Attend` with the soft mask; state collects the share of real tokens evicted, `[K]` a layer."""

    def attend(layer, q, k, v, logit, state):
        positions = arange_positions(q[..., 0, 0])
        noisy = dms.gumbel_sigmoid(logit, jax.random.fold_in(key, layer), config.tau)
        noisy = masks.shift(noisy, config.decision_offset, lengths, NEGATIVE)
        out = attention.blockwise(q, k, v, positions, positions, dms.keep_log(noisy), config.window)
        real = (positions < lengths[:, None])[:, None]
        alpha = jnp.sum(dms.straight_through(noisy) * real, axis=(0, 2)) / jnp.sum(lengths)
        return out, (*state, alpha)

    return attend


def reset_neuron(params: Params, config: ModelConfig, dms_config: DMSConfig) -> Params:
    """Zeroes what feeds the borrowed neuron once attention no longer uses it, so that every logit is `-offset`.

    With a q-norm the neuron stays 0 through it, since the norm only rescales.
    """
    params = jax.tree.map(lambda x: x, params)  # a new tree, so that the caller's keeps its leaves
    for n in range(config.num_layers):
        q = params[f"layers_{n}"]["attn"]["q"]
        for name, value in q.items():
            q[name] = value.at[..., :: config.group_size, dms_config.neuron].set(0)
    return params


def with_gate(params: Params, config: ModelConfig, dms_config: DMSConfig) -> Params:
    """Adds what a gate needs and an original model lacks: for the adapter W = 0, which evicts nothing."""
    if dms_config.gate != "adapter" or "gate" in params["layers_0"]["attn"]:
        return params
    params = jax.tree.map(lambda x: x, params)  # a new tree: the caller's is the teacher's
    E, K, dtype = config.model_dim, config.num_kv_heads, params["embed"]["embedding"].dtype
    for n in range(config.num_layers):
        gate = {"norm": {"scale": jnp.ones(E, dtype)}, "proj": {"kernel": jnp.zeros((E, K), dtype)}}
        params[f"layers_{n}"]["attn"]["gate"] = gate
    return params


def distillation_loss(
    teacher: Callable[[Residual], Array],
    student: Callable[[Residual], Array],
    teacher_hidden: Residual,
    student_hidden: Residual,
    lengths: Lengths,
    direction: str,
    chunk: int = 256,
) -> Float[Array, ""]:
    """Mean KL over real tokens, in nats, computed `chunk` tokens of each sequence at a time.

    `teacher` and `student` unembed `[B, t, E]` into logits; they are recomputed for the gradient, so that no
    `[B, T, V]` float32 array is ever kept. A scan, since XLA would hold the logits of unrolled chunks all at once.
    """
    B, T, _ = student_hidden.shape
    chunk = min(chunk, T)
    pad = -T % chunk

    def pieces(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def add(total, piece):
        t, s, real = piece
        per_token = dms.kl(jax.lax.stop_gradient(teacher(t)), student(s), direction)
        return total + jnp.sum(jnp.where(real, per_token, 0)), None

    real = jnp.arange(T) < lengths[:, None]
    total, _ = jax.lax.scan(add, jnp.zeros(()), (pieces(teacher_hidden), pieces(student_hidden), pieces(real)))
    return total / jnp.sum(lengths)


def loss_fn(
    params: Params,
    teacher_params: Params,
    model: ModelConfig,
    config: RetrofitConfig,
    batch: Batch,
    step,
    key,
    retiring,
):
    """The loss at `step` and its terms. `retiring` (static): the neuron is being given up, nothing is evicted."""
    positions = arange_positions(batch.tokens)
    lengths = batch.lengths
    original, student = Decoder(model), Decoder(model, config.dms)
    teacher_hidden, _ = original.apply({"params": teacher_params}, batch.tokens, positions, causal)
    since = step - config.retirement
    if retiring:
        scale, attend = 1.0 - step / config.retirement, causal
    else:
        scale, attend = 0.0, soft_eviction(config.dms, lengths, key)
    hidden, alphas = student.apply({"params": params}, batch.tokens, positions, attend, (), scale)
    distance = distillation_loss(
        lambda h: original.apply({"params": teacher_params}, h, method="unembed"),
        lambda h: student.apply({"params": params}, h, method="unembed"),
        jax.lax.stop_gradient(teacher_hidden),
        hidden,
        lengths,
        config.kl,
    )
    if retiring:
        return distance, {"loss": distance, "kl": distance, "neuron_scale": scale}
    alphas = jnp.stack(alphas)
    cr = dms.target_cr(since, config.steps_per_cr, config.max_cr)
    excess = dms.compression_loss(dms.target_alpha(cr), alphas.mean())
    terms = {"loss": distance + excess, "kl": distance, "compression": excess, "target_cr": cr}
    return distance + excess, {**terms, "alpha": alphas.mean(), "alpha_by_head": alphas}


@functools.partial(jax.jit, static_argnames=("model", "config", "retiring"), donate_argnames=("state",))
def train_step(
    state: TrainState,
    teacher_params: Params,
    batch: Batch,
    *,
    model: ModelConfig,
    config: RetrofitConfig,
    retiring: bool,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of distillation; returns every loss term and the gradient norm."""
    key = jax.random.fold_in(jax.random.PRNGKey(config.seed), state.step)
    grad_fn = jax.grad(loss_fn, has_aux=True)
    grads, terms = grad_fn(state.params, teacher_params, model, config, batch, state.step, key, retiring)
    updates, opt_state = optimizer(config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1), {**terms, "grad_norm": optax.tree.norm(grads)}


def fresh_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """A training state at step 0, with its own copy of the parameters (a train step donates them)."""
    params = jax.tree.map(jnp.array, params)
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))


def fit(
    step_fn: Callable[[TrainState, Batch], tuple[TrainState, dict]],
    state: TrainState,
    batches: Callable[[int], Batch],
    steps: int,
    folder: Path,
    save_every: int = 200,
    log_every: int = 10,
    on_step: Callable[[int, TrainState], TrainState] = lambda step, state: state,
) -> TrainState:
    """Runs `step_fn` up to step `steps`, from the newest checkpoint in `folder` if there is one.

    `on_step(step, state)` is called before each step and may change the state (to snapshot or reset something).
    Every `log_every` steps the metrics are appended to `folder/log.jsonl`, and every `save_every` steps, which must
    be a multiple of that, the state is saved: only states whose loss and gradient (`metrics` "loss" and "grad_norm")
    were seen to be finite.

    Raises:
      FloatingPointError: the loss or the gradient is not; the last checkpoint is older than that and untouched.
    """
    require(save_every % log_every == 0, "save_every", save_every, f"must be a multiple of log_every={log_every}")
    folder = Path(folder)
    checkpoints = checkpoint.manager(folder / "checkpoints")
    start, state = checkpoint.restore(checkpoints, state)
    _drop_lines_after(folder / "log.jsonl", start)
    with (folder / "log.jsonl").open("a") as log, tqdm(total=steps, initial=start, unit="step") as bar:
        for step in range(start, steps):
            state = on_step(step, state)
            state, metrics = step_fn(state, batches(step))
            bar.update()
            if (step + 1) % log_every and step + 1 != steps:
                continue
            metrics = jax.tree.map(lambda x: np.asarray(x).tolist(), metrics)
            for name in ("loss", "grad_norm"):  # the loss is of the state before the step, the gradient made this one
                if not np.isfinite(metrics[name]):
                    last = checkpoints.latest_step()
                    raise FloatingPointError(f"{name}={metrics[name]} at step {step}; last good checkpoint: {last}")
            log.write(json.dumps({"step": step + 1, **metrics}) + "\n")
            log.flush()
            bar.set_postfix({k: f"{v:.4g}" for k, v in metrics.items() if isinstance(v, float)})
            if (step + 1) % save_every == 0 or step + 1 == steps:
                checkpoint.save(checkpoints, step + 1, state)
    return on_step(steps, state)


def _drop_lines_after(path: Path, step: int) -> None:
    """Forgets log lines of steps that will be run again, and a last line that was cut off."""
    if not path.exists():
        return
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    path.write_text("".join(kept))


def _whole_lines(path: Path) -> Iterable[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
