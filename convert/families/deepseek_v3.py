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

# What config.json may leave out, as in transformers.
DEFAULTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-06,
    "q_lora_rank": 1536,
    "attention_bias": False,
    "rope_interleave": True,
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
}


def sigmoid_moe(hf: dict) -> MoEConfig:
    """Experts of DeepSeek-V3 and GLM-4.5.

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
        renormalize=hf["norm_topk_prob"],
        d_shared=hf["moe_intermediate_size"] * hf["n_shared_experts"],
        score="sigmoid",
        correction_bias=True,
        num_groups=hf["n_group"] or 1,
        groups_per_token=hf["topk_group"] or 1,
        group_score="top2",
        routed_scale=hf["routed_scaling_factor"],
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
        moe=sigmoid_moe(hf),
        dense_layers=hf_config.first_dense_layers(hf),
    )


FAMILY = Family(
    model_type="deepseek_v3",
    stem="DeepseekV3",
    read_config=config_from_hf,
    defaults=DEFAULTS,
    rules=NORMS + LATENT_ATTENTION + DENSE + EXPERTS + CORRECTION_BIAS + SHARED,
    count_keys=("n_routed_experts",),
    shared_count_key="n_shared_experts",
    mtp=NEXTN,
)
