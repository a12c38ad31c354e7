"""dots.llm1: the router of DeepSeek-V3 beside attention with normalised queries and keys."""

from convert.families import hf_config
from convert.families.deepseek_v3 import sigmoid_moe
from convert.families.tables import (
    ATTENTION,
    CORRECTION_BIAS,
    DENSE,
    EXPERTS,
    NORMS,
    QK_NORM,
    SHARED,
)
from convert.rules import Family
from moe_jax.config import AttentionConfig, ModelConfig

# What config.json may leave out, as in transformers.
DEFAULTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
    "num_key_value_heads": 32,
    "attention_bias": False,
    "sliding_window": 4096,
    "max_window_layers": 62,
    "norm_topk_prob": False,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
}


def config_from_hf(hf: dict) -> ModelConfig:
    """config.json -> ModelConfig.

    Raises:
      InputError: if a key is missing or has an unsupported value.
    """
    hf_config.require(
        hf, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    )  # fmt: skip
    heads, bias = hf["num_attention_heads"], hf["attention_bias"]
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=hf["num_key_value_heads"] or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        rope=hf_config.rope_config(hf),
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        norm_eps=hf["rms_norm_eps"],
    )
    return hf_config.model_config(
        hf,
        attention=attention,
        moe=sigmoid_moe(hf),
        dense_layers=hf_config.first_dense_layers(hf),
        sliding_layers=_sliding_layers(hf),
    )


def _sliding_layers(hf: dict) -> list[int]:
    layers, types = range(hf["num_hidden_layers"]), hf.get("layer_types")
    if types is not None:
        return [i for i in layers if types[i] == "sliding_attention"]
    return [i for i in layers if hf["sliding_window"] and i >= hf["max_window_layers"]]


FAMILY = Family(
    model_type="dots1",
    stem="Dots1",
    read_config=config_from_hf,
    defaults=DEFAULTS,
    rules=NORMS + ATTENTION + QK_NORM + DENSE + EXPERTS + CORRECTION_BIAS + SHARED,
    count_keys=("n_routed_experts",),
    shared_count_key="n_shared_experts",
)
