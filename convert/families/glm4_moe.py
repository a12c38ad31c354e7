"""GLM-4.5: the router of DeepSeek-V3 and grouped-query attention that turns half of each head."""

from convert.families import hf_config
from convert.families.deepseek_v3 import NEXTN, sigmoid_moe
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

ROPE = {"partial_rotary_factor": 0.5}

# What config.json may leave out, as in transformers.
DEFAULTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "attention_bias": False,
    "use_qk_norm": False,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
}


def config_from_hf(hf: dict) -> ModelConfig:
    """config.json -> ModelConfig.

    Raises:
      InputError: if a key is missing or has an unsupported value.
    """
    hf_config.require(
        hf, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
    )  # fmt: skip
    eps = hf["rms_norm_eps"]
    attention = AttentionConfig(
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        rope=hf_config.rope_config(hf, ROPE, partial=True),
        qk_norm=hf["use_qk_norm"],
        qkv_bias=hf["attention_bias"],
        norm_eps=eps,
    )
    return hf_config.model_config(
        hf,
        attention=attention,
        moe=sigmoid_moe(hf),
        dense_layers=hf_config.first_dense_layers(hf),
    )


FAMILY = Family(
    model_type="glm4_moe",
    stem="Glm4Moe",
    read_config=config_from_hf,
    defaults=DEFAULTS,
    rules=NORMS + ATTENTION + QK_NORM + DENSE + EXPERTS + CORRECTION_BIAS + SHARED,
    count_keys=("n_routed_experts",),
    shared_count_key="n_shared_experts",
    rope=ROPE,
    mtp=NEXTN,
)
