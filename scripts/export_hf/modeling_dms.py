# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Llama, Qwen2 and Qwen3 with Dynamic Memory Sparsification (arXiv 2506.05345), for transformers 4.57 and newer.

Every KV head decides, for each token, whether its key and value may be evicted (alpha = 1). Key j is visible to query i
iff `j <= i` and (`i - j <= window` or not `alpha_j`); the decision for token j is read off token j + offset.

The cache stores live tokens only, those of all heads one after the other, so that heads may differ in length and memory
falls by the compression ratio. While a layer attends, its tokens are padded to the longest head. This file is short
and plain rather than fast: dms_jax has the kernels.

Shapes: B batch, T new tokens, S tokens to read, H query heads, K KV heads, G = H / K, D head dim, E model dim.
"""

from dataclasses import fields

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

CACHE = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"  # of an output
QUERIES = 256  # that attend at a time: bounds the mask of a long prompt


class LiveTokens(CacheLayerMixin):
    """What one layer stores. The N live tokens of all rows and heads lie one after the other, row by row, head by head.

    keys, values: `[N, D]`. positions, evicted: `[N]`. lengths: `[B, K]`, how many of the N each head has.
    seen: `[B]`, tokens so far without padding. columns: the same with padding, which is how transformers counts.
    """

    is_compileable = is_croppable = is_sliding = False

    def __init__(self, config):
        super().__init__()
        self.window, self.offset = config.dms_window_size, config.dms_decision_offset
        self.sinks, self.columns = config.dms_sinks, 0

    def lazy_initialization(self, keys, values=None):
        B, K, _, D = keys.shape
        self.keys, self.values = keys.new_empty(0, D), keys.new_empty(0, D)
        self.lengths = torch.zeros(B, K, dtype=torch.long, device=keys.device)
        self.seen = self.lengths.new_zeros(B)
        self.positions, self.evicted = self.lengths.new_empty(0), self.lengths.new_empty(0, dtype=torch.bool)
        self.is_initialized = True

    def update(self, keys, values, positions, decisions):
        """Adds tokens, drops those that no later token may read, and returns all that the new ones may.

        Args: keys, values `[B, K, T, D]`; positions `[B, T]`, -1 for padding; decisions `[B, K, T]`.
        Returns: keys, values `[B, K, S, D]`; their positions, -1 for none, and decisions `[B, K, S]`.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys)
        new = positions[:, None].expand(keys.shape[:3])
        old_keys, old_values, old_positions, old_evicted = self._padded()
        keys, values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
        at = torch.cat([old_positions, new], 2)
        evicted = torch.cat([old_evicted, torch.zeros_like(decisions)], 2) | self._decided(at, positions, decisions)
        self.seen = self.seen + (positions >= 0).sum(-1)
        self.columns += positions.shape[1]
        distance = self.seen[:, None, None] - 1 - at
        self._store((at >= 0) & ~(evicted & (distance > self.window)), keys, values, at, evicted)
        return keys, values, at, evicted

    def _decided(self, at, positions, decisions):
        """Which tokens at positions `at` `[B, K, S]` are marked by the new tokens' decisions `[B, K, T]`."""
        real = positions >= 0
        order = (~real).long().argsort(dim=-1, stable=True)  # real tokens first
        decisions = decisions.gather(2, order[:, None].expand_as(decisions))
        source = at + self.offset - self.seen[:, None, None]
        known = (at >= self.sinks) & (source >= 0) & (source < real.sum(-1)[:, None, None])
        return known & decisions.gather(2, source.clamp(0, decisions.shape[2] - 1))

    def _padded(self):
        """The stored tokens as `[B, K, S]` and `[B, K, S, D]`, S the longest head; position -1 where there is none."""
        places = torch.arange(int(self.lengths.max()), device=self.lengths.device) < self.lengths[..., None]
        padded = []
        for flat, fill in ((self.keys, 0), (self.values, 0), (self.positions, -1), (self.evicted, False)):
            out = flat.new_full((*places.shape, *flat.shape[1:]), fill)
            out[places] = flat
            padded.append(out)
        return padded

    def _store(self, keep, keys, values, positions, evicted):
        self.lengths = keep.sum(-1)
        self.keys, self.values, self.positions, self.evicted = keys[keep], values[keep], positions[keep], evicted[keep]

    def batch_select_indices(self, indices):
        if self.is_initialized:
            keys, values, positions, evicted = (x[indices] for x in self._padded())
            self.seen = self.seen[indices]
            self._store(positions >= 0, keys, values, positions, evicted)

    def reorder_cache(self, beam_idx):
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats):
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self.seen), device=self.seen.device).repeat_interleave(repeats))

    def crop(self, max_length):
        raise NotImplementedError("evicted tokens cannot be had back: no assisted decoding")

    def reset(self):
        self.is_initialized, self.columns, self.keys, self.values = False, 0, None, None

    def get_seq_length(self):
        return self.columns

    def get_mask_sizes(self, query_length):
        return self.columns + query_length, 0

    def get_max_length(self):
        return -1

    get_max_cache_shape = get_max_length  # transformers 4


class DMSCache(Cache):
    """The cache that `generate` makes; pass it again for a second turn."""

    def __init__(self, config):
        super().__init__(layers=[LiveTokens(config) for _ in range(config.num_hidden_layers)])

    @property
    def live_tokens(self) -> torch.Tensor:
        """How many tokens each head stores, `[layers, B, K]`."""
        return torch.stack([layer.lengths.cpu() for layer in self.layers])

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)


def attend(q, positions, keys, values, at, evicted, window):
    """Attention `[B, H, T, D]` of queries at `positions` `[B, T]` to what `LiveTokens.update` returned."""
    (B, H, T, D), (K, S) = q.shape, keys.shape[1:3]
    q, out = q.view(B, K, H // K, T, D), []
    for start in range(0, T, QUERIES):
        some = q[..., start : start + QUERIES, :]
        i, j = positions[:, None, start : start + QUERIES, None], at[:, :, None]
        visible = (j >= 0) & (j <= i) & ((i - j <= window) | ~evicted[:, :, None])
        visible = visible | (i < 0)  # padding reads anything: a softmax over nothing is NaN
        mask = visible[:, :, None].expand(*some.shape[:4], S).flatten(2, 3)
        out.append(F.scaled_dot_product_attention(some.flatten(2, 3), keys, values, attn_mask=mask).view_as(some))
    return torch.cat(out, 3).view(B, H, T, D)


class DMSAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        E, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.config, self.heads, self.kv_heads = config, H, K
        self.head_dim = D = getattr(config, "head_dim", None) or E // H
        out_bias = config.model_type != "qwen2" and config.attention_bias
        bias = config.model_type == "qwen2" or config.attention_bias
        self.q_proj, self.o_proj = nn.Linear(E, H * D, bias), nn.Linear(H * D, E, out_bias)
        self.k_proj, self.v_proj = nn.Linear(E, K * D, bias), nn.Linear(E, K * D, bias)
        self.q_norm = self.k_norm = nn.Identity()
        if config.model_type == "qwen3":
            self.q_norm, self.k_norm = (LlamaRMSNorm(D, config.rms_norm_eps) for _ in range(2))
        if config.dms_separate_alpha:
            self.dms_proj_alpha_norm = LlamaRMSNorm(E, config.rms_norm_eps)
            self.dms_proj_alpha = nn.Linear(E, K, bias=False)

    def forward(self, x, residual, rotation, positions, stored):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(B, T, self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        decisions = self.decisions(q, residual)
        q, k = apply_rotary_pos_emb(self.without_neuron(q), k, *rotation)
        q = self.without_neuron(q)  # rotation put its partner's share in its place
        out = attend(q, positions, *stored.update(k, v, positions, decisions), self.config.dms_window_size)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))

    def decisions(self, q, residual):
        """alpha `[B, K, T]`, True where a token may be evicted; from q `[B, H, T, D]` before RoPE, or `[B, T, E]`."""
        c = self.config
        if c.dms_separate_alpha:
            x = self.dms_proj_alpha(self.dms_proj_alpha_norm(residual)).transpose(1, 2)
        else:
            x = q[:, :: self.heads // self.kv_heads, :, c.dms_neuron]
        x = x if c.dms_gate_dtype == "model" else x.float()
        marked = c.dms_alpha_scale * x - c.dms_initial_alpha_offset > 0
        if getattr(c, "dms_disable_eviction", False):
            marked = torch.zeros_like(marked)
        return marked[:, :1].expand_as(marked) if c.dms_alpha_per == "layer" else marked

    def without_neuron(self, q):
        """q with the borrowed neuron of the first query head of each group at zero."""
        if self.config.dms_separate_alpha:
            return q
        q = q.clone()
        q[:, :: self.heads // self.kv_heads, :, self.config.dms_neuron] = 0
        return q


class DMSMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        E, hidden, bias = config.hidden_size, config.intermediate_size, getattr(config, "mlp_bias", False)
        self.gate_proj, self.up_proj = nn.Linear(E, hidden, bias), nn.Linear(E, hidden, bias)
        self.down_proj = nn.Linear(hidden, E, bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DMSBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = DMSAttention(config), DMSMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotation, positions, stored):
        x = x + self.self_attn(self.input_layernorm(x), x, rotation, positions, stored)
        return x + self.mlp(self.post_attention_layernorm(x))


class DMSDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DMSBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)

    def forward(self, x, mask, cache):
        """Hidden states `[B, T, E]` of embeddings; mask `[B, T]` is True for tokens and False for padding."""
        first = cache.layers[0]
        seen = first.seen[:, None] if first.is_initialized else 0
        positions = torch.where(mask, seen + mask.long().cumsum(-1) - 1, -1)
        rotation = self.rotary_emb(x, positions.clamp(min=0))
        for block, stored in zip(self.layers, cache.layers, strict=True):
            x = block(x, rotation, positions, stored)
        return self.norm(x)


class DMSForCausalLM(PreTrainedModel, GenerationMixin):
    base_model_prefix = "model"
    _no_split_modules = ["DMSBlock"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _supports_sdpa = True
    _is_stateful = True  # what is evicted cannot be had back, so no assisted decoding

    def __init__(self, config):
        super().__init__(config)
        self.model = DMSDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` leaves the cache to `forward`

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        past_key_values=None,
        cache=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Logits `[B, T, V]`. attention_mask `[B, tokens so far]` is 0 for padding, on whichever side."""
        cache = past_key_values if cache is None else cache
        if cache is None:
            cache = DMSCache(self.config)
        if not isinstance(cache, DMSCache):
            raise TypeError(f"a cache of another kind ({type(cache).__name__}): pass none, or a DMSCache")
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x.shape
        if attention_mask is None:
            attention_mask = torch.ones(B, T, device=x.device)
        x = self.model(x, attention_mask[:, -T:].to(x.device) != 0, cache)
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        kept = {CACHE: cache} if use_cache is None or use_cache else {}
        return CausalLMOutputWithPast(loss, logits, **kept)
