"""DeepSeek-V3 and its like (R1, Moonlight): a sigmoid router whose bias only selects."""

from convert.families import hf_config
from convert.families.deepseek_v2 import latent_attention, require_value
from convert.families.tables import (
    CORRECTION_BIAS,
    DENSE,
    EXPERTS,
    LATENT_ATTENTION,
    NORMS,
    SHARED,
)
from convert.rules import Family, Mtp
from moe_jax.config import ModelConfig, MoEConfig

NEXTN = Mtp(
    "num_nextn_predict_layers",
    {
        "embed_tokens.weight": "VD",
        "enorm.weight": "D",
        "hnorm.weight": "D",
        "eh_proj.weight": "DK",
        "shared_head.norm.weight": "D",
        "shared_head.head.weight": "VD",
    },
)


def sigmoid_moe(hf: dict, *, groups: int, groups_per_token: int, scale: float) -> MoEConfig:
    """Experts of DeepSeek-V3 and GLM-4.5; the keywords are the defaults of the family.

    Raises:
      InputError: if a key is missing or has an unsupported value.
    """
    hf_config.require(hf, "moe_intermediate_size", "num_experts_per_tok", "n_shared_experts")
    require_value(hf, "topk_method", "noaux_tc")
    require_value(hf, "scoring_func", "sigmoid")
    require_value(hf, "moe_layer_freq", 1)
    return MoEConfig(
        num_experts=hf_config.num_experts(hf),
        experts_per_token=hf["num_experts_per_tok"],
        d_expert=hf["moe_intermediate_size"],
        renormalize=hf.get("norm_topk_prob", True),
        d_shared=hf["moe_intermediate_size"] * hf["n_shared_experts"],
        score="sigmoid",
        correction_bias=True,
        num_groups=hf.get("n_group") or groups,
        groups_per_token=hf.get("topk_group") or groups_per_token,
        group_score="top2",
        routed_scale=hf.get("routed_scaling_factor", scale),
        float32_router=True,
    )


def config_from_hf(hf: dict) -> ModelConfig:
    """config.json -> ModelConfig.

    Raises:
      InputError: if a key is missing or has an unsupported value.
    """
    hf_config.require(hf, "vocab_size", "hidden_size", "num_hidden_layers")
    return hf_config.model_config(
        hf,
        attention=latent_attention(hf),
        moe=sigmoid_moe(hf, groups=8, groups_per_token=4, scale=2.5),
        dense_layers=hf_config.first_dense_layers(hf, 3),
    )


FAMILY = Family(
    model_type="deepseek_v3",
    stem="DeepseekV3",
    config_from_hf=config_from_hf,
    rules=NORMS + LATENT_ATTENTION + DENSE + EXPERTS + CORRECTION_BIAS + SHARED,
    count_keys=("n_routed_experts",),
    shared_count_key="n_shared_experts",
    mtp=NEXTN,
)
