"""The letter table, and a name for every kind of tensor.

Letters, used in annotations, einsum strings and docstrings alike:

    B  batch (sequences)        H  query heads               E  model dim
    T  query length (tokens)    K  KV heads                  F  MLP dim
    S  key length (slots)       G  query heads per KV head   V  vocabulary
    L  layers                   D  head dim                  N  steps of a decoded chunk
    U  value dim: D, or less where a value is the first U numbers of its key (latent attention)

Query head `h` belongs to KV head `h // G`. Positions count from 0 and are absolute.
"""

from typing import Any

from jaxtyping import Array, Bool, Float, Int, UInt32

Params = dict[str, Any]  # a linen parameter tree
State = Any  # whatever pytree an attention path threads through the layers

Layer = int | Int[Array, ""]  # a layer's number; may be traced
Window = int | Int[Array, ""]  # w, or a decision's offset; may be traced
Tokens = Int[Array, "B T"]
Positions = Int[Array, "B T"]
Segments = Int[Array, "B T"]  # which of the documents packed into a row a token is of; 0 is padding
Lengths = Int[Array, "B"]
Counts = Int[Array, "B"]  # a number for each sequence: its tokens, its position, its row
Keys = UInt32[Array, "B 2"]  # one raw random key a sequence

Residual = Float[Array, "B T E"]
Logits = Float[Array, "B T V"]
NextLogits = Float[Array, "B V"]

Queries = Float[Array, "B T H D"]
Attended = Float[Array, "B T H U"]  # what attention makes of them
NewKeys = Float[Array, "B T K D"]  # of the tokens being processed
NewValues = Float[Array, "B T K U"]
StoredKeys = Float[Array, "B K S D"]  # in their slots
StoredValues = Float[Array, "B K S U"]

GateLogits = Float[Array, "B K T"]  # eviction logit of each token and KV head
Decisions = Bool[Array, "B K T"]  # alpha: True means evict
LogKeepProb = Float[Array, "B K S"]  # log(1 - p): 0 for a kept key, MASK_VALUE for an evicted one
ScoreBias = Float[Array, "B K T S"]
Visible = Bool[Array, "B K T S"]

PerHead = Int[Array, "B K"]  # a count or a slot for each KV head
PerHeadKeys = Float[Array, "B K D"]  # of one token a sequence
PerHeadValues = Float[Array, "B K U"]
Slots = Int[Array, "B K S"]  # the slot of each token, or the position in each slot
SlotFlags = Bool[Array, "B K S"]

MASK_VALUE = -1e30  # stands for -inf in scores: finite, so that gradients stay finite
