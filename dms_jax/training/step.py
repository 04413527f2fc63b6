"""Retrofitting: the loss and one train step, for every mode and every mesh.

`L = KL(teacher, student) + max(alpha* - mean(alpha), 0)`, with the eviction mask soft (arXiv 2506.05345,
section 3). With the query gate the borrowed neuron is given up first, over `retire_steps`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from dms_jax import dms, sharding
from dms_jax.config import DMSConfig, ModelConfig, require
from dms_jax.models.transformer import Attend, Decoder, packed_causal, self_attention, unembedding
from dms_jax.training import parameters as trainable
from dms_jax.training.config import RetrofitConfig
from dms_jax.training.data import Packed
from dms_jax.training.loss import distillation_loss
from dms_jax.types import MASK_VALUE, Keys, Params, State


class TrainState(NamedTuple):
    """What a train step changes. params: what is trained, float32."""

    params: Params
    opt_state: State
    step: Int[Array, ""]


def soft_eviction(config: DMSConfig, batch: Packed, keys: Keys) -> Attend:
    """An `Attend` with the soft mask; state collects how many real tokens were evicted, `[K]` a layer.

    keys: `[B, 2]`, one raw random key a row, so that a row's noise does not depend on its micro-batch.
    """

    def attend(layer, q, k, v, logit, state):
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, layer)
        noisy = jax.vmap(dms.gumbel_sigmoid, (0, 0, None))(logit, own, config.tau)
        noisy = dms.shift_segments(noisy, config.decision_offset, batch.segments, MASK_VALUE)
        noisy = dms.protect_sinks(noisy, batch.positions, config.sinks, MASK_VALUE)
        log_keep_prob = dms.log_keep_prob(noisy)
        out = self_attention(q, k, v, batch.positions, log_keep_prob, config.window, batch.segments)
        real = (batch.segments > 0)[:, None]
        return out, (*state, jnp.sum(dms.straight_through(noisy) * real, axis=(0, 2)))

    return attend


def loss_fn(
    trained: Params,
    base: Params,
    batch: Packed,
    keys: Keys,
    step: Int[Array, ""],
    total: Int[Array, ""],
    *,
    model: ModelConfig,
    config: RetrofitConfig,
    retiring: bool,
) -> tuple[Array, dict[str, Array]]:
    """The loss of a micro-batch as its share of a batch of `total` real tokens, and its terms as such shares.

    The mean of alpha in the compression loss runs over the micro-batch. While `retiring`, the query gate's neuron
    is given up and nothing is evicted.
    """
    teacher, student = Decoder(model), Decoder(model, config.dms, config.remat)
    causal = packed_causal(batch.positions, batch.segments)
    teacher_hidden, _ = teacher.apply({"params": base}, batch.tokens, batch.positions, causal)
    teacher_hidden = jax.lax.stop_gradient(teacher_hidden)
    under = base
    if config.mode == "lora" and not retiring:
        under = config.gate.reset_neuron(base, model)
    params = trainable.overlay(under, trained)
    scale = 1.0 - step / config.retirement if retiring else 0.0
    attend = causal if retiring else soft_eviction(config.dms, batch, keys)
    hidden, evicted = student.apply({"params": params}, batch.tokens, batch.positions, attend, (), scale)
    real = batch.segments > 0
    kernels = [unembedding(tree, model) for tree in (base, params)]
    trains_kernel = config.mode == "full"
    distance = (
        distillation_loss(teacher_hidden, hidden, *kernels, real, config.kl, config.loss_chunk, trains_kernel) / total
    )
    if retiring:
        return distance, {"loss": distance, "kl": distance}
    tokens = jnp.sum(real)
    alphas = jnp.stack(evicted) / jnp.maximum(tokens, 1)
    share = tokens / total
    excess = share * dms.compression_loss(dms.target_alpha(_target_cr(step, config)), alphas.mean())
    loss = distance + excess
    return loss, {"loss": loss, "kl": distance, "compression": excess, "alpha_by_head": share * alphas}


def _target_cr(step: Int[Array, ""], config: RetrofitConfig) -> Array:
    return dms.target_cr(step - config.retirement, config.steps_per_cr, config.max_cr)


def gradients(
    trained: Params, base: Params, batch: Packed, step: Int[Array, ""], *, model, config: RetrofitConfig, retiring: bool
) -> tuple[Params, dict[str, Array]]:
    """float32 gradients and terms of a batch `[B, T]`, summed over `config.accumulate` micro-batches in a scan."""
    dtype = jnp.dtype(config.compute)
    # Cast once a step: the micro-batches share the copy.
    compute = trainable.constrained(trainable.scaled(trained, config, dtype), model, config)
    B = batch.tokens.shape[0]
    key = jax.random.fold_in(jax.random.PRNGKey(config.seed), step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    total = jnp.sum(batch.segments > 0)
    grad_fn = jax.grad(functools.partial(loss_fn, model=model, config=config, retiring=retiring), has_aux=True)

    def one(weights, piece):
        grads, terms = grad_fn(*weights, *piece, step, total)
        grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
        return trainable.constrained(grads, model, config), terms

    if config.accumulate == 1:
        grads, terms = one((compute, base), (batch, keys))
    else:
        # Micro-batch m holds rows m, m + A, m + 2 A ...: the rows of a device stay on it.
        def pieces(x):
            return x.reshape(B // config.accumulate, config.accumulate, *x.shape[1:]).swapaxes(0, 1)

        def add(sums, piece):
            # Tied to the micro-batch, or the compiler may gather every layer's weights before the scan, and keep them.
            weights, piece = jax.lax.optimization_barrier(((compute, base), piece))
            return jax.tree.map(jnp.add, sums, one(weights, piece)), None

        split = jax.tree.map(pieces, (batch, keys))
        shapes = jax.eval_shape(one, (compute, base), jax.tree.map(_first, split))
        grads, terms = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        zeros = trainable.constrained(grads, model, config), terms
        (grads, terms), _ = jax.lax.scan(add, zeros, split)
    return trainable.scaled(grads, config, jnp.float32), terms  # by the chain rule, the factor in b is in its gradient


def _first(x):
    return x[0]


def train_step(
    state: TrainState, base: Params, batch: Packed, *, model: ModelConfig, config: RetrofitConfig, retiring: bool
) -> tuple[TrainState, dict[str, Array]]:
    """One step of distillation; returns every loss term and the gradient norm. Jitted by `compiled_step`."""
    grads, terms = gradients(state.params, base, batch, state.step, model=model, config=config, retiring=retiring)
    updates, opt_state = trainable.optimizer(config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if retiring:
        terms["neuron_scale"] = 1.0 - state.step / config.retirement
    else:
        alpha = terms["alpha_by_head"].mean()
        terms |= {"alpha": alpha, "achieved_cr": 1 / (1 - alpha), "target_cr": _target_cr(state.step, config)}
    return TrainState(params, opt_state, state.step + 1), {**terms, "grad_norm": optax.tree.norm(grads)}


def fresh_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """A training state at step 0, with its own float32 copy of the parameters (a train step donates them)."""
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))


class Layout(NamedTuple):
    """Where a run's arrays lie: a TrainState, the base's parameters and a batch, as trees of shardings."""

    state: TrainState
    base: Params
    batch: Packed


def layout(state: TrainState, base: Params, model: ModelConfig, config: RetrofitConfig, mesh) -> Layout:
    """The Layout on a mesh; `state` and `base` may be abstract.

    Raises:
      ConfigError: micro-batches that cannot be dealt out evenly.
    """
    ways, rows = sharding.batch_ways(mesh), config.batch_size // config.accumulate
    require(
        rows % ways == 0, "batch_size", config.batch_size, f"its micro-batches of {rows} rows go over {ways} devices"
    )
    places = trainable.shardings(state.params, model, config, mesh)
    moments = trainable.moments_shardings(trainable.optimizer(config), state.params, places, mesh)
    everywhere = sharding.replicated(mesh)
    rows = sharding.batch(mesh)
    return Layout(
        TrainState(places, moments, everywhere),
        trainable.shardings(base, model, None, mesh),
        Packed(rows, rows, rows),
    )


def compiled_step(
    model: ModelConfig,
    config: RetrofitConfig,
    retiring: bool,
    places: Layout | None = None,
    options: dict | None = None,
):
    """`train_step(state, base, batch)` under jit, the state donated; over a mesh it is to be called with that in force.

    places: the layout over a mesh, None on one device. options: of the compiler.
    """
    step = functools.partial(train_step, model=model, config=config, retiring=retiring)
    step.__name__ = "train_step"
    where = {}
    if places is not None:
        everywhere = sharding.replicated(jax.tree.leaves(places.base)[0].mesh)
        where = {"in_shardings": tuple(places), "out_shardings": (places.state, everywhere)}
    return jax.jit(step, donate_argnums=0, compiler_options=options, **where)


def start(params: Params, model: ModelConfig, config: RetrofitConfig, mesh) -> tuple[TrainState, Params, Layout]:
    """The state at step 0 and the base on the mesh, of an original model's parameters, which may lie on the host."""
    with sharding.on_host():
        whole = trainable.student_params(params, model, config)
        trained = trainable.select(whole, trainable.mask(whole, config))
        # Masters are copies: a step donates them, and the caller's parameters are not to be given away.
        trained = jax.tree.map(lambda x: np.array(x, np.float32), trained)
        base = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(config.compute)), params)
    tx = trainable.optimizer(config)
    abstract = TrainState(trained, jax.eval_shape(tx.init, trained), jax.ShapeDtypeStruct((), jnp.int32))
    places = layout(abstract, base, model, config, mesh)
    trained = sharding.place(trained, places.state.params)
    opt_state = jax.jit(tx.init, out_shardings=places.state.opt_state)(trained)
    step = sharding.place(np.zeros((), np.int32), places.state.step)
    return TrainState(trained, opt_state, step), sharding.place(base, places.base), places


def member(
    state: TrainState, base: Params, model: ModelConfig, config: RetrofitConfig, dtype: str = "bfloat16"
) -> Params:
    """The retrofitted model's parameters, whole and on the host, on every process."""
    if config.mode == "full":
        base = {}  # all of it was trained
    trained, base = sharding.gather((state.params, base))
    with sharding.on_host():
        return jax.tree.map(np.asarray, trainable.merged(base, trained, model, config, dtype))


def gate_alone(state: TrainState, dtype: str = "bfloat16") -> Params:
    """What `save_gate` needs of a run in adapter mode."""
    return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), sharding.gather(state.params))
