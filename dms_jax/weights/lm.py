"""LM: a loaded model, its configuration, parameters, tokenizer and gate."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from dms_jax.config import DMSConfig, ModelConfig, Ratio, described, fits, require
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
        require(fits(self.cr, Ratio | None), "cr", self.cr, f"expected {described(Ratio)}")
        if self.dms is not None:
            gate_of(self.dms).check(self.config)

    def logits(self, tokens: ArrayLike, dms: DMSConfig | None = None) -> Logits:
        """`[B, T]` token ids -> `[B, T, V]` float32; with `dms` the hard delayed-eviction mask is on.

        Raises:
          ConfigError: tokens that are no ids of the vocabulary, or a gate in `dms` that the model does not carry.
        """
        ids = self.checked_ids(tokens, "tokens", "[B, T]")
        self.config.check_length(ids.shape[1])
        if dms is not None:
            self.check_gate(dms)
        return _logits(self.params, jnp.asarray(ids), self.config, self.dms, dms)

    def checked_ids(self, tokens: Any, key: str, shape: str) -> np.ndarray:
        """Token ids as int32; ConfigError unless they have as many axes as `shape` and are in the vocabulary."""
        try:
            ids = np.asarray(tokens)
        except ValueError:
            ids = np.zeros(())  # rows of different lengths
        fitting = ids.ndim == len(shape.split(",")) and ids.size > 0
        require(fitting, f"{key}.shape", ids.shape, f"expected {shape}, and not empty")
        require(ids.dtype.kind in "iu", f"{key}.dtype", ids.dtype, "expected whole numbers")
        low, high, V = int(ids.min()), int(ids.max()), self.config.vocab_size
        require(low >= 0 and high < V, key, low if low < 0 else high, f"is outside the vocabulary, 0 to {V - 1}")
        return ids.astype(np.int32)

    def check_gate(self, dms: DMSConfig) -> None:
        """Raises ConfigError unless the model carries the gate that `dms` describes."""
        require(isinstance(dms, DMSConfig), "dms", dms, "expected a DMSConfig")
        mine, asked = gate_of(self.dms), gate_of(dms)
        carried = "no gate: it was never retrofitted" if self.dms is None else f"the {self.dms.gate!r} gate"
        require(type(asked) is type(mine), "dms.gate", dms.gate, f"the model carries {carried}")
        require(asked.in_params(self.params), "dms.gate", dms.gate, "the parameters hold no such gate")


@functools.partial(jax.jit, static_argnames=("config", "own", "evicting"))
def _logits(
    params: Params, tokens: Tokens, config: ModelConfig, own: DMSConfig | None, evicting: DMSConfig | None
) -> Logits:
    B, T = tokens.shape
    attend = causal if evicting is None else hard_eviction(evicting, jnp.full((B,), T))
    positions = arange_positions(tokens)
    return Decoder(config, evicting or own).apply({"params": params}, tokens, positions, attend, method="logits")[0]
