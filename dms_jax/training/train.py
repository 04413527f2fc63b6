"""A retrofit from beginning to end: what the script, the ablation and the tests call."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dms_jax import sharding
from dms_jax.config import DMSConfig, ModelConfig, require
from dms_jax.training import flops
from dms_jax.training.config import RetrofitConfig
from dms_jax.training.data import Packed, Stream
from dms_jax.training.log import Watcher, Work
from dms_jax.training.loop import Loop
from dms_jax.training.step import Terms, TrainState, compiled_step, initial_state, layout, member_params
from dms_jax.types import Params
from dms_jax.weights.lm import LM

OnMember = Callable[[float, Params], None]


def train(
    params: Params,
    model: ModelConfig,
    config: RetrofitConfig,
    stream: Stream,
    folder: Path,
    on_member: OnMember | None = None,
    until: int | None = None,
    watchers: Sequence[Watcher] = (),
) -> TrainState:
    """Retrofits an original model, on the mesh of the config; returns the last state.

    A run found in `folder` goes on from its newest whole checkpoint.

    Args:
      stream: batches of packed rows.
      on_member: called with the CR of each member of the family and its parameters: whole and on the host, on every
        process, float32 where they were trained; in mode "adapter" the gate's alone.
      until: the step to stop at; None is the schedule's end.
      watchers: called with each line of the log.
    Raises:
      ConfigError: a mesh that does not fit, or a token that the model has not.
      CheckpointError: a checkpoint cannot be saved, or none is whole.
      FloatingPointError: the loss or the gradient is not finite.
    """
    model.check_length(config.context)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state, base = initial_state(params, model, config, mesh)
        run = Retrofit(model, config, base, mesh, on_member)
        first, _ = next(stream(None))
        loop = Loop(
            folder,
            config.total_steps if until is None else until,
            config.save_every,
            config.log_every,
            tuple(config.members()),
            work_of(model, config, first),
            tuple(watchers),
        )
        return loop.run(run.step, state, stream, run.before_step, run.put)


@dataclasses.dataclass(frozen=True, eq=False)
class Retrofit:
    """A retrofit on its mesh: its steps, and what happens between them."""

    model: ModelConfig
    config: RetrofitConfig
    base: Params
    mesh: Mesh
    on_member: OnMember | None

    def step(self, number: int, state: TrainState, batch: Packed) -> tuple[TrainState, Terms]:
        retiring = number < self.config.retirement
        return compiled_step(self.model, self.config, retiring, self.mesh)(state, self.base, batch)

    def before_step(self, number: int, state: TrainState) -> TrainState:
        """Resets the retired neuron when the first eviction comes, and hands out members of the family."""
        if number == self.config.retirement and self.config.gate.warms_up:
            state = state._replace(params=self._reset(state.params))
        cr = self.config.members().get(number)
        if cr is not None and self.on_member is not None:
            if self.config.mode == "adapter":
                self.on_member(cr, sharding.gather(state.params))
            else:
                self.on_member(cr, member_params(state, self.base, self.model, self.config))
        return state

    def put(self, batch: Packed) -> Packed:
        largest, vocabulary = int(batch.tokens.max()), self.model.vocab_size
        require(largest < vocabulary, "data", largest, f"is no token of the model, which has {vocabulary}")
        return sharding.place(batch, Packed(*[sharding.batch(self.mesh)] * 3))

    def _reset(self, params: Params) -> Params:
        def reset(params: Params) -> Params:
            return self.config.gate.reset_neuron(params, self.model)

        return jax.jit(reset, out_shardings=layout(self.model, self.config, self.mesh).state.params)(params)


def work_of(model: ModelConfig, config: RetrofitConfig, batch: Packed) -> Work:
    """What a step does with batches like this one, padding included, on the devices of the mesh."""
    tokens, keys = batch.tokens.size, float(np.mean(batch.positions + 1))
    work = flops.step_flops(model, config, tokens, keys)
    return Work(tokens, work, flops.peak_flops(math.prod(config.mesh)))


def retrofitted(lm: LM, params: Params, dms: DMSConfig, cr: float, dtype: str = "bfloat16") -> LM:
    """A member of a family, to save: the model with the parameters that `on_member` gets, in a dtype."""
    params = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), params)
    return dataclasses.replace(lm, params=params, dms=dms, cr=float(cr))
