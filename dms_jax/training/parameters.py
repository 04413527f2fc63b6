"""The trained part of a model's parameters, the student that it makes over the frozen base, and its optimiser.

The original model's weights (`base`) are held once, in the dtype of the computation, and are the teacher. The trained
parameters (`trained`, a tree with some of the paths) are float32, and laid over the base they make the student:

    mode      trained                          student
    full      every weight, and the gate       trained
    adapter   the gate                         base + trained
    lora      low-rank updates, and the gate   base + trained, the updates added where a projection is applied
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh

from dms_jax import sharding
from dms_jax.config import ModelConfig, require
from dms_jax.training.config import RetrofitConfig
from dms_jax.types import Params, State
from dms_jax.weights.table import specs


def with_lora(params: Params, model: ModelConfig, config: RetrofitConfig) -> Params:
    """Adds the low-rank updates: a normal with variance 1 / fan-in, b zero, so that nothing changes at the start."""
    params = jax.tree.map(lambda x: x, params)
    rank, key = config.lora.rank, jax.random.key(config.seed)
    for n in range(model.num_layers):
        for m, name in enumerate(config.lora.targets):
            present = name in params[f"layers_{n}"]["attn"] and model.latent is None
            require(
                present, "mode", config.mode, "there are no low-rank updates of latent attention: train the adapter"
            )
            projection = params[f"layers_{n}"]["attn"][name]
            shape = projection["kernel"].shape
            inputs, outputs = (shape[:2], shape[2:]) if name == "o" else (shape[:1], shape[1:])
            own = jax.random.fold_in(key, 4 * n + m)
            a = jax.random.normal(own, (*inputs, rank)) * float(math.prod(inputs)) ** -0.5
            projection["lora"] = {"a": a, "b": jnp.zeros((rank, *outputs))}
    return params


def student_params(params: Params, model: ModelConfig, config: RetrofitConfig) -> Params:
    """The student's whole tree at the start: an original model with the gate, and the low-rank updates if asked."""
    params = config.gate.with_gate(params, model)
    require(config.gate.in_params(params), "gate", config.dms.gate, "its with_gate does not add its tensors")
    return with_lora(params, model, config) if config.mode == "lora" else params


def trained_part(student: Params, config: RetrofitConfig) -> Params:
    """The part of a student's tree that is trained."""
    gate = {("attn", *tensor.path.split("/")) for tensor in config.gate.tensors}

    def is_trained(path: tuple[str, ...]) -> bool:
        return config.mode == "full" or "lora" in path or path[1:] in gate

    flat = traverse_util.flatten_dict(student)
    return traverse_util.unflatten_dict({path: x for path, x in flat.items() if is_trained(path)})


def overlay(base: Params, trained: Params) -> Params:
    """The student's tree: the base with the trained parameters laid over it."""
    flat = {**traverse_util.flatten_dict(base), **traverse_util.flatten_dict(trained)}
    return traverse_util.unflatten_dict(flat)


def scale_lora(trained: Params, config: RetrofitConfig, dtype) -> Params:
    """The trained parameters in a dtype, with the `alpha / rank` of low-rank updates multiplied into b."""
    factor = config.lora.alpha / config.lora.rank

    def cast(path, x):
        return (x * factor if config.mode == "lora" and path[-1] == "b" else x).astype(dtype)

    flat = traverse_util.flatten_dict(trained)
    return traverse_util.unflatten_dict({path: cast(path, x) for path, x in flat.items()})


def merged_params(base: Params, trained: Params, model: ModelConfig, config: RetrofitConfig) -> Params:
    """The parameters of a retrofitted model: what was trained laid over the base, low-rank updates multiplied out.

    Changed parameters are float32, the others as in the base. With the query gate the updates are of projections
    whose borrowed neuron was reset, as in training.
    """
    base = jax.tree.map(jnp.asarray, base)
    if config.mode == "lora":
        base = config.gate.reset_neuron(base, model)
    tree = jax.tree.map(jnp.asarray, overlay(base, scale_lora(trained, config, jnp.float32)))
    for n in range(model.num_layers):
        for projection in tree[f"layers_{n}"]["attn"].values():
            lora = projection.pop("lora", None)
            if lora is not None:
                update = jnp.tensordot(lora["a"], lora["b"], 1)
                projection["kernel"] = projection["kernel"].astype(jnp.float32) + update
    return tree


def learning_rate(config: RetrofitConfig) -> optax.Schedule:
    """The learning rate: constant after warm-up, falling to 0 over `hold_steps`."""
    rate = config.learning_rate
    # Over no steps a linear schedule keeps its first value.
    warm = optax.linear_schedule(0.0 if config.warmup_steps else rate, rate, config.warmup_steps)
    last = optax.linear_schedule(rate, 0.0, config.hold_steps)
    return optax.join_schedules([warm, last], [config.total_steps - config.hold_steps])


def optimizer(config: RetrofitConfig) -> optax.GradientTransformation:
    """AdamW with moments in float32; gradients are clipped by the global norm of what is trained."""
    adamw = optax.adamw(learning_rate(config), b1=0.9, b2=0.95, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def param_letters(model: ModelConfig, config: RetrofitConfig | None) -> dict[tuple[str, ...], str]:
    """Path -> letters of every parameter of a student, or of an original model (`config` None)."""
    out = {}
    for spec in specs(model, config and config.dms):
        path = tuple(spec.path.split("/"))
        out[path] = spec.letters
        if config and config.mode == "lora" and path[-1] == "kernel" and path[-2] in config.lora.targets:
            inputs, outputs = spec.letters.split()[: len(spec.inputs)], spec.letters.split()[len(spec.inputs) :]
            out[*path[:-1], "lora", "a"] = " ".join((*inputs, "R"))
            out[*path[:-1], "lora", "b"] = " ".join(("R", *outputs))
    return out


def constrain_params(params: Params, model: ModelConfig, config: RetrofitConfig) -> Params:
    """Shards a tree of trained parameters, or of their gradients, inside a step as parameters are sharded."""
    names = param_letters(model, config)
    flat = traverse_util.flatten_dict(params)
    table = sharding.PARAMETERS
    return traverse_util.unflatten_dict({p: sharding.constrain(x, names[p], table) for p, x in flat.items()})


def param_shardings(params: Params, model: ModelConfig, config: RetrofitConfig | None, mesh: Mesh) -> Params:
    """The sharding of each leaf of a tree: of a student's parameters, or of an original model's (`config` None)."""
    names = param_letters(model, config)
    flat: dict[tuple, Any] = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({p: sharding.parameter(mesh, names[p], x.shape) for p, x in flat.items()})


def moment_shardings(tx: optax.GradientTransformation, trained: Params, shardings: Params, mesh: Mesh) -> State:
    """The shardings of the optimiser's state: moments as their parameters, counters replicated."""
    state, everywhere = jax.eval_shape(tx.init, trained), sharding.replicated(mesh)
    return optax.tree_map_params(tx, lambda _, own: own, state, shardings, transform_non_params=lambda _: everywhere)
