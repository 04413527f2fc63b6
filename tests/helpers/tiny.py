"""Tiny models with random weights, as HF torch models and folders, for the tests of weights in and out."""

import numpy as np
import torch

HF_CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LATENT_CLASSES = {"deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3", "youtu": "Youtu", "minicpm3": "MiniCPM3"}

# Odd shapes: G = 1, 3, 7; a head dim that is not model_dim / heads.
SHAPES = {
    "G1": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8},
    "G3": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16},
    "G7": {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 10},
}
# Queries by way of a vector or not, dims that are all different (and keys of an even width, which torch needs for V2).
LATENT_SHAPES = {
    "ranked": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6, "q_lora_rank": 20,
               "kv_lora_rank": 26, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "v_head_dim": 14},
    "whole": {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": None,
              "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 9},
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "yarn": YARN,
    "yarn-mscale": {**YARN, "mscale": 1.3, "mscale_all_dim": 0.7, "beta_fast": 4.0, "beta_slow": 0.5},
    "yarn-attention": {**YARN, "attention_factor": 0.8},
    "yarn-untruncated": {**YARN, "truncate": False, "beta_fast": 3.0},
}  # fmt: skip


# As in MiniCPM3-4B, within the context of the first training; for the four pairs of the "ranked" shape.
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.3, 2.0, 2.9], "long_factor": [9.0] * 4,
            "original_max_position_embeddings": 128}  # fmt: skip


def hf_config(family: str, shape: str = "G3", rope: str = "default", **changes):
    """A transformers config; theta is small, so that every part of a RoPE scaling matters in 64 positions."""
    import transformers

    values = {
        **(SHAPES | LATENT_SHAPES)[shape],
        "vocab_size": 97,
        "num_hidden_layers": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 128,
        "rope_parameters": {**(ROPES | {"longrope": LONGROPE})[rope], "rope_theta": 500.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    if family.startswith("deepseek"):
        values = {"first_k_dense_replace": values["num_hidden_layers"], **values}
    return getattr(transformers, f"{(HF_CLASSES | LATENT_CLASSES)[family]}Config")(**values)


def hf_model(config, seed: int = 0):
    """A float32 torch model; every weight, norm and bias is random and large enough to matter."""
    import transformers

    name = (HF_CLASSES | LATENT_CLASSES)[config.model_type]
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model


def tokens(batch: int = 2, length: int = 64, vocab: int = 97, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (batch, length))


def hf_logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def hf_from_gguf(file, raw: dict):
    """A GGUF file as transformers itself reads it (`from_pretrained` would need accelerate for that).

    raw: the config.json that we make of it; every value that transformers reads must agree.
    """
    import transformers
    from transformers.initialization import no_init_weights
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = getattr(transformers, f"{HF_CLASSES[raw['model_type']]}Config").from_dict(raw)
    with no_init_weights():
        model = getattr(transformers, f"{HF_CLASSES[raw['model_type']]}ForCausalLM")(config).float().eval()
    loaded = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)
    for key, value in loaded["config"].items():
        if raw.get(key) is not None and not (key == "head_dim" and value is None):
            assert np.isclose(raw[key], value) if isinstance(value, float) else raw[key] == value, key
    missing, unexpected = model.load_state_dict(loaded["tensors"], strict=False)
    model.tie_weights()
    assert not unexpected and set(missing) <= {"lm_head.weight"} and config.tie_word_embeddings or not missing
    return model
