"""LM: a loaded model, its configuration, parameters, tokenizer and gate."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Int

from dms_jax.config import DMSConfig, ModelConfig, require
from dms_jax.models.gates import gate_of
from dms_jax.models.transformer import Decoder, arange_positions, causal, hard_eviction
from dms_jax.types import Logits, Params, Tokens


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class LM:
    """A model ready to run.

    params: the linen tree of `transformer.Decoder(config, dms)`.
    tokenizer: a transformers tokenizer, None if the source had none.
    dms: what the parameters were retrofitted for, None for an original model.
    cr: the compression ratio that they were retrofitted for; None for an original model, or where nothing says so.
    """

    config: ModelConfig
    params: Params = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(default=None, repr=False)
    dms: DMSConfig | None = None
    cr: float | None = None

    def __post_init__(self):
        require(self.cr is None or self.cr >= 1, "cr", self.cr, "must be at least 1")

    def logits(self, tokens: Int[ArrayLike, "B T"], dms: DMSConfig | None = None) -> Logits:
        """`[B, T]` token ids -> `[B, T, V]` float32; with `dms` the hard delayed-eviction mask is on.

        Raises:
          ConfigError: `dms` describes a gate that the model does not carry.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        require(tokens.ndim == 2, "tokens.shape", tokens.shape, "expected [B, T]")
        if dms is not None:
            self.check_gate(dms)
        return _logits(self.params, tokens, self.config, dms or self.dms, dms is not None)

    def check_gate(self, dms: DMSConfig) -> None:
        """Raises ConfigError unless the model carries the gate that `dms` describes."""
        require(self.dms is not None, "dms", dms, "this model was never retrofitted")
        mine, asked = gate_of(self.dms), gate_of(dms)
        require(type(asked) is type(mine), "dms.gate", dms.gate, f"the model carries the {self.dms.gate!r} gate")
        require(mine.in_params(self.params), "dms.gate", dms.gate, "the parameters hold no such gate")


@functools.partial(jax.jit, static_argnames=("config", "dms", "evict"))
def _logits(params: Params, tokens: Tokens, config: ModelConfig, dms: DMSConfig | None, evict: bool) -> Logits:
    B, T = tokens.shape
    attend = hard_eviction(dms, jnp.full((B,), T)) if evict else causal
    positions = arange_positions(tokens)
    return Decoder(config, dms).apply({"params": params}, tokens, positions, attend, method="logits")[0]
