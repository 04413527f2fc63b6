"""What a layer of any family calls to attend: training, prefill and decoding are functions of this signature."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from dms_jax.types import Attended, GateLogits, NewKeys, NewValues, Queries, State

Scale = float | Float[Array, ""]  # of the neuron that a gate borrows: 1 as it was, 0 hidden from attention


@runtime_checkable
class Attend(Protocol):
    """What a layer calls. `logit` is None where the model has no gate; `state` is any pytree."""

    def __call__(
        self, layer: int, q: Queries, k: NewKeys, v: NewValues, logit: GateLogits | None, state: State
    ) -> tuple[Attended, State]: ...
