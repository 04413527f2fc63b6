"""Gates: where eviction logits come from, and everything else in which one kind of gate differs from another.

A kind of gate is a subclass of `Gate` in GATES, under the name that DMSConfig.gate gives it (see `add`). Decoder,
training, weights and decoding call its methods and never ask which kind they have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, overload

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dms_jax import dms
from dms_jax.config import GATE_NAMES, DMSConfig, ModelConfig, require
from dms_jax.models import layers
from dms_jax.types import GateLogits, Params, Queries, Residual


class GateTensor(NamedTuple):
    """A parameter that a gate adds to every layer: path in "layers_{n}/attn", name in HF's layer, table layout."""

    path: str
    hf: str
    layout: str


@dataclass(frozen=True)
class Gate:
    """What a gate is to the rest of the package; the methods here are those of a gate that changes nothing.

    reads_residual: the logits follow from the residual stream alone, so that those of all layers can be computed at
      once, by `logits_from_residuals`, from what entered the layers.
    warms_up: attention gives up something over the first steps of a retrofit, in which nothing is evicted.
    tensors: parameters of its own; an adapter can be trained, written and read without the model's.
    foreign: the config.json keys by which NVIDIA's checkpoints say that they have this gate.
    """

    dms: DMSConfig

    reads_residual: ClassVar[bool] = False
    warms_up: ClassVar[bool] = False
    tensors: ClassVar[tuple[GateTensor, ...]] = ()
    foreign: ClassVar[Mapping[str, Any]] = {}

    def check(self, model: ModelConfig) -> None:
        """Raises ConfigError for a model that cannot have this gate."""

    def logits(self, q: Queries, residual: Residual, model: ModelConfig) -> GateLogits:
        """Eviction logits `[B, K, T]` of a layer, from q before RoPE or from the residual stream that entered it.

        Runs inside the layer's linen module, to which the gate's own parameters belong.
        """
        raise NotImplementedError

    def logits_from_residuals(
        self, params: Params, residuals: Sequence[Residual], model: ModelConfig
    ) -> Float[Array, "L B K T"]:
        """The logits of all layers at once; of a gate that `reads_residual`. params: the whole model's."""
        raise NotImplementedError

    def hidden(self, q: Queries, factor: float | Array, model: ModelConfig) -> Queries:
        """q without what attention may not see, or with `factor` of it; applied before and after RoPE."""
        return q

    def retirement(self, steps: int) -> int:
        """Of the warm-up steps that a retrofit asks for, those that this gate takes."""
        return steps if self.warms_up else 0

    def with_gate(self, params: Params, model: ModelConfig) -> Params:
        """An original model's parameters with those that the gate adds, at values that evict nothing."""
        return params

    def reset_neuron(self, params: Params, model: ModelConfig) -> Params:
        """Parameters after the warm-up, with what attention gave up set to zero."""
        return params

    def in_params(self, params: Params) -> bool:
        """Whether the tree holds the gate's own parameters (True for a gate that has none)."""
        layer = params["layers_0"]["attn"]
        return all(tensor.path.split("/")[0] in layer for tensor in self.tensors)


@dataclass(frozen=True)
class QueryGate(Gate):
    """The paper's gate: a neuron of the first query head of each group, which attention gives up (section 3.1)."""

    warms_up: ClassVar[bool] = True
    foreign: ClassVar[Mapping[str, Any]] = {"dms_separate_alpha": False}

    def check(self, model: ModelConfig) -> None:
        latent = model.latent is not None
        require(
            not latent, "gate", self.dms.gate, "latent attention has no neuron of a query head to borrow: use adapter"
        )
        n, D = self.dms.neuron, model.head_dim
        require(-D <= n < D, "neuron", n, f"must be a dim of a head, {-D} to {D - 1}")

    def logits(self, q: Queries, residual: Residual, model: ModelConfig) -> GateLogits:
        return dms.query_gate(q, model.num_kv_heads, self.dms)

    def hidden(self, q: Queries, factor: float | Array, model: ModelConfig) -> Queries:
        return dms.scale_neuron(q, factor, self.dms.neuron, model.num_kv_heads)

    def reset_neuron(self, params: Params, model: ModelConfig) -> Params:
        """Zeroes what feeds the borrowed neuron, so that every logit is `-logit_bias`.

        With a q-norm the neuron stays 0 through it, since the norm only rescales. Of a low-rank update it is the rows
        of b that feed the neuron; projections that are not in the tree are passed over.
        """
        params = jax.tree.map(lambda x: x, params)  # a new tree, so that the caller's keeps its leaves
        neurons = (..., slice(None, None, model.group_size), self.dms.neuron)
        for n in range(model.num_layers):
            q = params.get(f"layers_{n}", {}).get("attn", {}).get("q", {})
            for name, value in q.items():
                if name == "lora":
                    q[name] = {"a": value["a"], "b": value["b"].at[neurons].set(0)}
                else:
                    q[name] = value.at[neurons].set(0)
        return params


class Adapter(nn.Module):
    """`W rmsnorm(x)` for each KV head, W zero at the start; `[B, T, K]`."""

    num_kv_heads: int
    eps: float

    @nn.compact
    def __call__(self, x: Residual) -> Float[Array, "B T K"]:
        x = layers.RMSNorm(self.eps, name="norm")(x)
        return layers.Linear((self.num_kv_heads,), init=nn.initializers.zeros, name="proj")(x)


@dataclass(frozen=True)
class AdapterGate(Gate):
    """The gate of the authors' release: a linear map of the normed residual stream; base weights may stay frozen."""

    reads_residual: ClassVar[bool] = True
    tensors: ClassVar[tuple[GateTensor, ...]] = (
        GateTensor("gate/proj/kernel", "self_attn.dms_proj_alpha.weight", "E | K"),
        GateTensor("gate/norm/scale", "self_attn.dms_proj_alpha_norm.weight", "E"),
    )
    foreign: ClassVar[Mapping[str, Any]] = {"dms_separate_alpha": True}

    def logits(self, q: Queries, residual: Residual, model: ModelConfig) -> GateLogits:
        return dms.affine(Adapter(model.num_kv_heads, model.norm_eps, name="gate")(residual), self.dms)

    def logits_from_residuals(
        self, params: Params, residuals: Sequence[Residual], model: ModelConfig
    ) -> Float[Array, "L B K T"]:
        # A layer's gate is three kernels of a few microseconds on a GPU, which a decode step of few tokens feels.
        own = [params[f"layers_{n}"]["attn"]["gate"] for n in range(model.num_layers)]
        adapter = Adapter(model.num_kv_heads, model.norm_eps)
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *own)

        def of_layer(params: Params, x: Residual) -> GateLogits:
            projected: Any = adapter.apply({"params": params}, x)
            return dms.affine(projected, self.dms)

        return jax.vmap(of_layer)(stacked, jnp.stack(residuals))

    def with_gate(self, params: Params, model: ModelConfig) -> Params:
        if self.in_params(params):
            return params
        params = jax.tree.map(lambda x: x, params)  # a new tree: the caller's is the teacher's
        E, K, dtype = model.model_dim, model.num_kv_heads, params["embed"]["embedding"].dtype
        for n in range(model.num_layers):
            gate = {"norm": {"scale": jnp.ones(E, dtype)}, "proj": {"kernel": jnp.zeros((E, K), dtype)}}
            params[f"layers_{n}"]["attn"]["gate"] = gate
        return params


GATES: dict[str, type[Gate]] = {"query": QueryGate, "adapter": AdapterGate}


def add(name: str, kind: type[Gate]) -> None:
    """Makes a kind of gate known, under the name by which a DMSConfig asks for it."""
    require(name not in GATES, "gate", name, "there is one of that name")
    GATES[name] = kind
    GATE_NAMES.append(name)


@overload
def gate_of(config: DMSConfig) -> Gate: ...
@overload
def gate_of(config: None) -> None: ...
def gate_of(config: DMSConfig | None) -> Gate | None:
    """The gate that a DMSConfig describes."""
    return None if config is None else GATES[config.gate](config)


def gate_name(foreign: Mapping[str, Any]) -> str:
    """The gate that a config.json of a retrofitted model names; an absent key counts as false."""
    said = {name: all(foreign.get(k, False) == v for k, v in gate.foreign.items()) for name, gate in GATES.items()}
    return max(said, key=lambda name: said[name])
