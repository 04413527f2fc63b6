"""What is trained: the parameters laid over the original model, and the optimiser of those alone.

The original's weights (`base`) are held once, in the dtype of the computation, and are the teacher. What is trained
(`trained`, a tree with some of the paths) is kept in float32 and laid over them to make the student:

    mode      trained                          student
    full      every weight, and the gate       trained
    adapter   the gate                         base + trained
    lora      low-rank updates, and the gate   base + trained, the updates added where a projection is applied
"""

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from dms_jax import sharding
from dms_jax.config import ModelConfig
from dms_jax.training.config import RetrofitConfig
from dms_jax.types import Params, State
from dms_jax.weights.table import specs


def with_lora(params: Params, config: ModelConfig, recipe: RetrofitConfig) -> Params:
    """Adds the low-rank updates: a normal with variance 1 / fan-in, b zero, so that nothing changes at the start."""
    params = jax.tree.map(lambda x: x, params)
    rank, key = recipe.lora.rank, jax.random.key(recipe.seed)
    for n in range(config.num_layers):
        for m, name in enumerate(recipe.lora.targets):
            projection = params[f"layers_{n}"]["attn"][name]
            shape = projection["kernel"].shape
            inputs, outputs = (shape[:2], shape[2:]) if name == "o" else (shape[:1], shape[1:])
            own = jax.random.fold_in(key, 4 * n + m)
            fan_in = float(jnp.prod(jnp.asarray(inputs)))
            a = jax.random.normal(own, (*inputs, rank)) * fan_in**-0.5
            projection["lora"] = {"a": a, "b": jnp.zeros((rank, *outputs))}
    return params


def student_params(params: Params, config: ModelConfig, recipe: RetrofitConfig) -> Params:
    """The student's whole tree at the start: an original model with the gate, and the low-rank updates if asked."""
    params = recipe.gate.with_gate(params, config)
    return with_lora(params, config, recipe) if recipe.mode == "lora" else params


def mask(params: Params, recipe: RetrofitConfig) -> Params:
    """Of a student's tree, True for what is trained."""
    kinds = {"full": (), "adapter": ("gate",), "lora": ("gate", "lora")}[recipe.mode]

    def is_trained(path: tuple[str, ...]) -> bool:
        return recipe.mode == "full" or path[-1] in ("a", "b") or "attn" in path and path[2] in kinds

    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: is_trained(path) for path in flat})


def select(params: Params, chosen: Params) -> Params:
    """The part of a tree for which `chosen` is True."""
    flags = traverse_util.flatten_dict(chosen)
    flat = {path: x for path, x in traverse_util.flatten_dict(params).items() if flags[path]}
    return traverse_util.unflatten_dict(flat)


def overlay(base: Params, trained: Params) -> Params:
    """The base with what is trained laid over it: what the student is run with."""
    flat = {**traverse_util.flatten_dict(base), **traverse_util.flatten_dict(trained)}
    return traverse_util.unflatten_dict(flat)


def scaled(trained: Params, recipe: RetrofitConfig, dtype) -> Params:
    """What is trained in the dtype of the computation, `alpha / rank` taken into b."""
    factor = recipe.lora.alpha / recipe.lora.rank

    def cast(path, x):
        return (x * factor if recipe.mode == "lora" and path[-1] == "b" else x).astype(dtype)

    flat = traverse_util.flatten_dict(trained)
    return traverse_util.unflatten_dict({path: cast(path, x) for path, x in flat.items()})


def merged(base: Params, trained: Params, config: ModelConfig, recipe: RetrofitConfig, dtype) -> Params:
    """A retrofitted model as `dms_jax.load` reads it: trained over base, low-rank updates multiplied out in float32.

    With the query gate the updates are of projections whose borrowed neuron was reset, as in training.
    """
    base = jax.tree.map(jnp.asarray, base)
    if recipe.mode == "lora":
        base = recipe.gate.reset_neuron(base, config)
    tree = jax.tree.map(jnp.asarray, overlay(base, scaled(trained, recipe, jnp.float32)))
    for n in range(config.num_layers):
        for projection in tree[f"layers_{n}"]["attn"].values():
            lora = projection.pop("lora", None)
            if lora is not None:
                update = jnp.tensordot(lora["a"], lora["b"], 1)
                projection["kernel"] = projection["kernel"].astype(jnp.float32) + update
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def rate(recipe: RetrofitConfig) -> optax.Schedule:
    """The learning rate: constant after warm-up, falling to 0 over `hold_steps`."""
    last = optax.constant_schedule(recipe.learning_rate)
    if recipe.hold_steps:
        last = optax.linear_schedule(recipe.learning_rate, 0.0, recipe.hold_steps)
    warm = optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup_steps)
    return optax.join_schedules([warm, last], [recipe.total_steps - recipe.hold_steps])


def optimizer(recipe: RetrofitConfig) -> optax.GradientTransformation:
    """AdamW at `rate`, moments in float32; gradients clipped by the global norm of what is trained."""
    adamw = optax.adamw(rate(recipe), b1=0.9, b2=0.95, weight_decay=recipe.weight_decay)
    return optax.chain(optax.clip_by_global_norm(recipe.clip), adamw)


def letters(config: ModelConfig, recipe: RetrofitConfig | None) -> dict[tuple[str, ...], str]:
    """Path -> letters of every parameter of a student, or of an original model (`recipe` None)."""
    out = {}
    for spec in specs(config, recipe and recipe.dms):
        path = tuple(spec.path.split("/"))
        out[path] = spec.letters
        if recipe and recipe.mode == "lora" and path[-1] == "kernel" and path[-2] in recipe.lora.targets:
            inputs, outputs = spec.letters.split()[: len(spec.inputs)], spec.letters.split()[len(spec.inputs) :]
            out[*path[:-1], "lora", "a"] = " ".join((*inputs, "R"))
            out[*path[:-1], "lora", "b"] = " ".join(("R", *outputs))
    return out


def constrained(params: Params, config: ModelConfig, recipe: RetrofitConfig) -> Params:
    """A tree of trained parameters or their gradients, laid out as parameters inside a step: each device its part."""
    names = letters(config, recipe)
    flat = traverse_util.flatten_dict(params)
    table = sharding.PARAMETERS
    return traverse_util.unflatten_dict({p: sharding.constrain(x, names[p], table) for p, x in flat.items()})


def shardings(params: Params, config: ModelConfig, recipe: RetrofitConfig | None, mesh) -> Params:
    """Where each leaf of a tree (of base, or of what is trained) lies on the mesh."""
    names = letters(config, recipe)
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({p: sharding.parameter(mesh, names[p], x.shape) for p, x in flat.items()})


def moments_shardings(tx: optax.GradientTransformation, trained: Params, places: Params, mesh) -> State:
    """The optimiser's state laid out as what it belongs to; counters on every device."""
    state = jax.eval_shape(tx.init, trained)
    everywhere = sharding.replicated(mesh)
    return optax.tree_map_params(tx, lambda _, place: place, state, places, transform_non_params=lambda _: everywhere)
