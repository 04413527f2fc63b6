"""The train step of a retrofit: its loss and gradients, for every mode, compiled for a mesh.

`L = KL(teacher, student) + max(alpha* - mean(alpha), 0)`, with the eviction mask soft (arXiv 2506.05345,
section 3). With the query gate the borrowed neuron is given up first, over `retire_steps`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from dms_jax import dms, sharding
from dms_jax.config import DMSConfig, ModelConfig, require
from dms_jax.models.transformer import Decoder, packed_causal, self_attention, unembedding
from dms_jax.training.config import RetrofitConfig
from dms_jax.training.data import Packed
from dms_jax.training.loss import distillation_loss
from dms_jax.training.parameters import (
    constrain_params,
    merged_params,
    moment_shardings,
    optimizer,
    overlay,
    param_shardings,
    scale_lora,
    student_params,
    trained_part,
)
from dms_jax.types import MASK_VALUE, Attended, GateLogits, Keys, NewKeys, NewValues, Params, Queries, State
from dms_jax.weights.table import specs

Terms = dict[str, Array]  # what a step reports, by name


class TrainState(NamedTuple):
    """What a train step changes. params: the trained parameters, float32."""

    params: Params
    opt_state: State
    step: Int[Array, ""]


class MicroBatch(NamedTuple):
    """Rows that go through the model at once. keys: a raw random key a row, so that a row's noise is its own."""

    batch: Packed
    keys: Keys


@dataclass(frozen=True, eq=False)
class SoftEviction:
    """An `Attend` with the soft mask; its state collects how many real tokens were evicted, `[K]` a layer."""

    config: DMSConfig
    rows: MicroBatch

    def __call__(
        self, layer: int, q: Queries, k: NewKeys, v: NewValues, logit: GateLogits, state: Sequence[Float[Array, "K"]]
    ) -> tuple[Attended, State]:
        config, (batch, keys) = self.config, self.rows
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, layer)
        noisy = jax.vmap(dms.gumbel_sigmoid, (0, 0, None))(logit, own, config.tau)
        if config.per == "layer":  # one decision, so one draw
            noisy = jnp.broadcast_to(noisy[:, :1], noisy.shape)
        noisy = dms.shift_segments(noisy, config.decision_offset, batch.segments, MASK_VALUE)
        noisy = dms.protect_sinks(noisy, batch.positions, config.sinks, MASK_VALUE)
        log_keep_prob = dms.log_keep_prob(noisy)
        out = self_attention(q, k, v, batch.positions, log_keep_prob, config.window, batch.segments)
        real = (batch.segments > 0)[:, None]
        return out, (*state, jnp.sum(dms.straight_through(noisy) * real, axis=(0, 2)))


@dataclass(frozen=True)
class Distillation:
    """The loss, the gradients and the train step of one phase of a retrofit.

    retiring: the phase in which the query gate's neuron is given up and nothing is evicted yet.
    """

    model: ModelConfig
    config: RetrofitConfig
    retiring: bool

    def train_step(self, state: TrainState, base: Params, batch: Packed) -> tuple[TrainState, Terms]:
        """One step; also returns every loss term and the gradient norm."""
        grads, terms = self.gradients(state.params, base, batch, state.step)
        updates, opt_state = optimizer(self.config).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), {**terms, "grad_norm": optax.tree.norm(grads)}

    def gradients(self, trained: Params, base: Params, batch: Packed, step: Int[Array, ""]) -> tuple[Params, Terms]:
        """float32 gradients of the loss of a batch `[B, T]`, and its terms."""
        # Cast once a step: the micro-batches share the copy.
        compute = scale_lora(trained, self.config, jnp.dtype(self.config.compute))
        compute = constrain_params(compute, self.model, self.config)
        key = jax.random.fold_in(jax.random.PRNGKey(self.config.seed), step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch.tokens.shape[0]))
        whole, total = MicroBatch(batch, keys), jnp.sum(batch.segments > 0)
        if self.config.accumulate == 1:
            grads, terms = self._share(compute, base, whole, step, total)
        else:
            grads, terms = self._accumulated(compute, base, whole, step, total)
        # By the chain rule, the factor in b is in its gradient.
        return scale_lora(grads, self.config, jnp.float32), self._reported(terms, step)

    def loss(
        self,
        trained: Params,
        base: Params,
        rows: MicroBatch,
        step: Int[Array, ""],
        total: Int[Array, ""],
        slope: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], Terms]:
        """A micro-batch's share of the loss of a batch of `total` real tokens, and its shares of the terms.

        slope: of the compression loss, by mean(alpha), where the micro-batch is not the whole batch. Then mean(alpha)
          times the slope stands for the compression loss: its gradient is the same.
        """
        batch, config = rows.batch, self.config
        causal = packed_causal(batch.positions, batch.segments)
        teacher_hidden, _ = Decoder(self.model).apply({"params": base}, batch.tokens, batch.positions, causal)
        teacher_hidden = jax.lax.stop_gradient(teacher_hidden)
        student = self._student(trained, base)
        hidden, evicted = self._forward(student, rows, step)
        real = batch.segments > 0
        kernels = [unembedding(tree, self.model) for tree in (base, student)]
        trains_kernel = config.mode == "full"
        kl = distillation_loss(teacher_hidden, hidden, *kernels, real, config.kl, config.loss_chunk, trains_kernel)
        kl = kl / total
        if self.retiring:
            return kl, {"kl": kl}
        alphas = jnp.stack(evicted) / total
        excess = self._compression(alphas.mean(), step) if slope is None else slope * alphas.mean()
        return kl + excess, {"kl": kl, "alpha_by_head": alphas}

    def target_cr(self, step: Int[Array, ""]) -> float | Array:
        return dms.target_cr(step - self.config.retirement, self.config.steps_per_cr, self.config.max_cr)

    def _compression(self, alpha: Float[Array, ""], step: Int[Array, ""]) -> Array:
        return dms.compression_loss(dms.target_alpha(self.target_cr(step)), alpha)

    def _student(self, trained: Params, base: Params) -> Params:
        if self.config.mode == "lora" and not self.retiring:
            base = self.config.gate.reset_neuron(base, self.model)
        return overlay(base, trained)

    def _forward(self, student: Params, rows: MicroBatch, step: Int[Array, ""]) -> Any:
        """The student's hidden states `[B, T, E]`, and the tokens that each layer evicts `[K]`."""
        batch, config = rows.batch, self.config
        decoder = Decoder(self.model, config.dms, config.remat)
        if self.retiring:
            attend, scale = packed_causal(batch.positions, batch.segments), 1.0 - step / config.retirement
        else:
            attend, scale = SoftEviction(config.dms, rows), 0.0
        return decoder.apply({"params": student}, batch.tokens, batch.positions, attend, (), scale)

    def _share(self, compute: Params, base: Params, rows: MicroBatch, step, total, slope=None) -> tuple[Params, Terms]:
        """float32 gradients of a micro-batch's share of the loss, sharded as parameters, and its terms."""
        grads, terms = jax.grad(self.loss, has_aux=True)(compute, base, rows, step, total, slope)
        return constrain_params(jax.tree.map(lambda x: x.astype(jnp.float32), grads), self.model, self.config), terms

    def _accumulated(self, compute: Params, base: Params, whole: MicroBatch, step, total) -> tuple[Params, Terms]:
        """Gradients and terms summed over `accumulate` micro-batches, one after the other in a scan.

        The slope of the compression loss, -1 or 0, depends on what the whole batch evicts, so that is counted first.
        """
        pieces = jax.tree.map(self._pieces, whole)

        def count(evicted: Array, rows: MicroBatch):
            # Tied to the micro-batch, or the compiler may gather every layer's weights before the scan, and keep them.
            (trained, frozen), rows = jax.lax.optimization_barrier(((compute, base), rows))
            return evicted + jnp.stack(self._forward(self._student(trained, frozen), rows, step)[1]), None

        slope = None
        if not self.retiring:
            evicted = jnp.zeros((self.model.num_layers, self.model.num_kv_heads))
            evicted, _ = jax.lax.scan(count, evicted, pieces)
            slope = jax.grad(self._compression)((evicted / total).mean(), step)

        def add(sums: tuple[Params, Terms], rows: MicroBatch):
            (trained, frozen), rows = jax.lax.optimization_barrier(((compute, base), rows))
            return jax.tree.map(jnp.add, sums, self._share(trained, frozen, rows, step, total, slope)), None

        first = jax.tree.map(lambda x: x[0], pieces)
        shapes = jax.eval_shape(self._share, compute, base, first, step, total, slope)
        grads, terms = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        start = constrain_params(grads, self.model, self.config), terms
        return jax.lax.scan(add, start, pieces)[0]

    def _pieces(self, x: Array) -> Array:
        """`[B, ...]` -> `[A, B / A, ...]`: micro-batch m has rows m, m + A, m + 2 A ..., so a device keeps its rows."""
        A = self.config.accumulate
        return x.reshape(x.shape[0] // A, A, *x.shape[1:]).swapaxes(0, 1)

    def _reported(self, terms: Terms, step: Int[Array, ""]) -> Terms:
        """The terms of the whole batch, and what follows from them."""
        if self.retiring:
            return {**terms, "loss": terms["kl"], "neuron_scale": 1.0 - step / self.config.retirement}
        alpha = terms["alpha_by_head"].mean()
        compression = self._compression(alpha, step)
        losses = {"loss": terms["kl"] + compression, "compression": compression}
        reached = {"alpha": alpha, "achieved_cr": 1 / (1 - alpha), "target_cr": self.target_cr(step)}
        return {**terms, **losses, **reached}


def abstract_state(model: ModelConfig, config: RetrofitConfig) -> tuple[TrainState, Params]:
    """The shapes and dtypes of the train state and of the base."""
    dtype = jnp.dtype(config.compute)
    flat = {tuple(spec.path.split("/")): jax.ShapeDtypeStruct(spec.shape, dtype) for spec in specs(model, None)}
    base = traverse_util.unflatten_dict(flat)
    student = jax.eval_shape(lambda params: student_params(params, model, config), base)
    trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trained_part(student, config))
    moments = jax.eval_shape(optimizer(config).init, trained)
    return TrainState(trained, moments, jax.ShapeDtypeStruct((), jnp.int32)), base


class Layout(NamedTuple):
    """The shardings of a TrainState, of the base's parameters and of a batch."""

    state: TrainState
    base: Params
    batch: Packed


def layout(model: ModelConfig, config: RetrofitConfig, mesh: Mesh | AbstractMesh) -> Layout:
    """The Layout on a mesh.

    Raises:
      ConfigError: micro-batches that cannot be dealt out evenly.
    """
    ways, rows = sharding.batch_ways(mesh), config.batch_size // config.accumulate
    require(
        rows % ways == 0, "batch_size", config.batch_size, f"its micro-batches of {rows} rows go over {ways} devices"
    )
    state, base = abstract_state(model, config)
    params = param_shardings(state.params, model, config, mesh)
    moments = moment_shardings(optimizer(config), state.params, params, mesh)
    by_rows = sharding.batch(mesh)
    return Layout(
        TrainState(params, moments, sharding.replicated(mesh)),
        param_shardings(base, model, None, mesh),
        Packed(by_rows, by_rows, by_rows),
    )


@functools.lru_cache(maxsize=4)
def compiled_step(model: ModelConfig, config: RetrofitConfig, retiring: bool, mesh: Mesh) -> Any:
    """`train_step(state, base, batch)` under jit for a mesh, which must be in force; the state is donated.

    Equal arguments share compiled code.
    """
    places = layout(model, config, mesh)
    step = Distillation(model, config, retiring).train_step
    out: tuple[TrainState, NamedSharding] = places.state, sharding.replicated(mesh)
    return jax.jit(step, donate_argnums=0, in_shardings=tuple(places), out_shardings=out)


def initial_state(params: Params, model: ModelConfig, config: RetrofitConfig, mesh: Mesh) -> tuple[TrainState, Params]:
    """The state at step 0 and the base, on the mesh, of an original model's parameters, which may be on the host."""
    places, tx = layout(model, config, mesh), optimizer(config)
    with sharding.on_host():
        trained = trained_part(student_params(params, model, config), config)
        # Masters are copies: a step donates them, and the caller's parameters are not to be given away.
        trained = jax.tree.map(lambda x: np.array(x, np.float32), trained)
        base = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(config.compute)), params)
    trained = sharding.place(trained, places.state.params)
    opt_state = jax.jit(tx.init, out_shardings=places.state.opt_state)(trained)
    step = sharding.place(np.zeros((), np.int32), places.state.step)
    return TrainState(trained, opt_state, step), sharding.place(base, places.base)


def member_params(state: TrainState, base: Params, model: ModelConfig, config: RetrofitConfig) -> Params:
    """`merged_params`, whole and on the host, on every process."""
    if config.mode == "full":
        base = {}  # all of it was trained
    trained, base = sharding.gather((state.params, base))
    with sharding.on_host():
        return jax.tree.map(np.asarray, merged_params(base, trained, model, config))
