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


def config_from_hf(hf: dict) -> ModelConfig:
    """config.json -> ModelConfig.

    Raises:
      InputError: if a key is missing or has an unsupported value.
    """
    hf_config.require(
        hf, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
    )  # fmt: skip
    eps = hf.get("rms_norm_eps", 1e-5)
    attention = AttentionConfig(
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        rope=hf_config.rope_config(hf, ROPE, partial=True),
        qk_norm=hf.get("use_qk_norm", False),
        qkv_bias=hf.get("attention_bias", False),
        norm_eps=eps,
    )
    return hf_config.model_config(
        hf,
        attention=attention,
        moe=sigmoid_moe(hf, groups=1, groups_per_token=1, scale=1.0),
        dense_layers=hf_config.first_dense_layers(hf, 1),
        norm_eps=eps,
    )


FAMILY = Family(
    model_type="glm4_moe",
    stem="Glm4Moe",
    config_from_hf=config_from_hf,
    rules=NORMS + ATTENTION + QK_NORM + DENSE + EXPERTS + CORRECTION_BIAS + SHARED,
    count_keys=("n_routed_experts",),
    shared_count_key="n_shared_experts",
    rope=ROPE,
    mtp=NEXTN,
)
