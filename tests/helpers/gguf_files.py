"""GGUF files as llama.cpp's converter writes them, made apart from the tables under test."""

import gguf
import numpy as np


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k of the llama architecture."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """HF tensor name -> GGUF tensor name, written out apart from the table under test."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, n, rest = stem.split(".", 3)
        return f"blk.{n}.{NAMES[rest]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def write_gguf(file, config, tensors, kind="F32", metadata=None, extra=None, drop=()):
    """A GGUF file as llama.cpp's converter writes it.

    Args:
      config: our ModelConfig; tensors: HF names -> float32 arrays.
      kind: quantisation of the matrices; metadata: further keys; extra: further tensors; drop: ones left out.
    """
    kind = gguf.GGMLQuantizationType[kind]
    arch = config.family
    writer = gguf.GGUFWriter(file, arch)
    writer.add_name("a test")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.model_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    add_metadata(writer, {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1, **(metadata or {})})
    for name, value in tensors.items():
        if name in drop:
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            value = permute(value, config.num_heads if "q_proj" in name else config.num_kv_heads)
        quantised = value.ndim == 2
        data = gguf.quants.quantize(value, kind) if quantised else value
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind if quantised else None)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer, values):
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, (list, tuple)):
            writer.add_array(key, list(value))
        else:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
