"""What config.json says of latent attention: DeepSeek V2 and V3, Youtu-LLM and MiniCPM3, as transformers reads it.

Layers of DeepSeek that are mixtures of experts are refused.
"""

from collections.abc import Mapping
from typing import Any

from dms_jax.config import Count, LatentConfig, Layers, ModelConfig, Size, require, take

ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "youtu": "YoutuForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
}
MLP_BIASED = ("deepseek_v2", "minicpm3")  # have the key mlp_bias
DIMS = {
    "kv_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
    "query_rank": "q_lora_rank",
}
_DEEPSEEK = {
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
# What an absent key means.
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **_DEEPSEEK, "first_k_dense_replace": 0, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
    },
    "deepseek_v3": {
        **_DEEPSEEK, "first_k_dense_replace": 3, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1,
    },
    "youtu": {
        **_DEEPSEEK, "max_position_embeddings": 131072, "bos_token_id": 128000, "eos_token_id": 128001,
        "tie_word_embeddings": True,
    },
    "minicpm3": {
        "kv_lora_rank": 256, "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
        "max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256,
    },
}  # fmt: skip


def latent_from_hf(raw: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Fields of ModelConfig in which these families differ; `raw` with DEFAULTS filled in.

    Raises:
      ConfigError: layers that are mixtures of experts, and what else is not supported; names the key.
    """
    heads = raw["num_attention_heads"]
    kv_heads = take(raw, "num_key_value_heads", Size, heads)
    require(kv_heads == heads, "num_key_value_heads", kv_heads, f"latent attention expands to all {heads} heads")
    if family.startswith("deepseek"):
        dense, layers = take(raw, "first_k_dense_replace", Count), take(raw, "num_hidden_layers", Layers)
        reason = f"of {layers} layers those from there on are mixtures of experts, which are not supported"
        require(dense >= layers, "first_k_dense_replace", dense, reason)
    rope = take(raw, "rope_parameters", dict, {}) or take(raw, "rope_scaling", dict, {})
    kind, mscale = rope.get("rope_type", rope.get("type", "default")), rope.get("mscale_all_dim")
    require(kind in ("default", "yarn") or not mscale, "mscale_all_dim", mscale, f"with {kind} it is not supported")
    dims = {field: take(raw, key, Size, None) for field, key in DIMS.items()}
    if family == "minicpm3" and dims["value_dim"] is None:
        dims["value_dim"] = raw["hidden_size"] // heads
    pairs = family == "deepseek_v2" or family != "minicpm3" and take(raw, "rope_interleave", bool, True)
    out: dict[str, Any] = {"latent": LatentConfig(**dims, interleaved=pairs)}
    out |= {"num_kv_heads": 1, "head_dim": dims["kv_rank"] + dims["rope_dim"]}
    if family == "minicpm3":
        out["embed_scale"] = take(raw, "scale_emb", float)
        out["depth_scale"] = take(raw, "scale_depth", float, None)
        out["logit_dim"] = take(raw, "dim_model_base", Size, None)
    return out


def latent_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json keys of a model with latent attention; empty for others.

    Raises:
      ConfigError: what HF's class of this family cannot express.
    """
    c, latent, family = config, config.latent, config.family
    require((latent is not None) == (family in ARCHITECTURES), "latent", latent, f"cannot be said in a {family} config")
    scales = {"scale_emb": c.embed_scale, "scale_depth": c.depth_scale, "dim_model_base": c.logit_dim}
    plain = family == "minicpm3" or tuple(scales.values()) == (1.0, None, None)
    require(plain, "embed_scale, depth_scale, logit_dim", scales, f"cannot be said in a {family} config")
    if latent is None:
        return {}
    fixed = {"deepseek_v2": True, "minicpm3": False}.get(family, latent.interleaved)
    told = f"cannot be said in a {family} config"
    require(latent.interleaved == fixed, "latent.interleaved", latent.interleaved, told)
    out = {key: getattr(latent, field) for field, key in DIMS.items()}
    out |= {"num_key_value_heads": c.num_heads, "head_dim": latent.rope_dim}
    if family.startswith("deepseek"):
        out["first_k_dense_replace"] = c.num_layers
    if family in ("deepseek_v3", "youtu"):
        out["rope_interleave"] = latent.interleaved
    return out | (scales if family == "minicpm3" else {})
