"""DeepSeek-V2: latent attention, ungated shared experts, a softmax router with groups.

transformers 4.57 leaves out YaRN's `mscale_all_dim` on the attention scores of this family; 5.x and
the original code have it, and so have we.
"""

from convert.families import hf_config
from convert.families.tables import DENSE, EXPERTS, LATENT_ATTENTION, NORMS, SHARED
from convert.rules import Family
from moe_jax.config import LatentAttentionConfig, ModelConfig, MoEConfig
from moe_jax.errors import InputError

# What config.json may leave out, as in transformers.
DEFAULTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
    "q_lora_rank": 1536,
    "attention_bias": False,
    "rope_interleave": True,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
}


def latent_attention(hf: dict) -> LatentAttentionConfig:
    """Attention of DeepSeek-V2 and V3.

    Raises:
      InputError: if a key is missing or key/value heads are fewer than query heads.
    """
    hf_config.require(
        hf, "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
        "v_head_dim",
    )  # fmt: skip
    heads = hf["num_attention_heads"]
    if (hf.get("num_key_value_heads") or heads) != heads:
        raise InputError(
            f"num_key_value_heads={hf['num_key_value_heads']} must equal "
            f"num_attention_heads={heads} under latent attention"
        )
    return LatentAttentionConfig(
        num_heads=heads,
        query_rank=hf["q_lora_rank"],
        kv_rank=hf["kv_lora_rank"],
        plain_dim=hf["qk_nope_head_dim"],
        rope_dim=hf["qk_rope_head_dim"],
        value_dim=hf["v_head_dim"],
        rope=hf_config.rope_config(hf),
        interleaved=hf["rope_interleave"],
        bias=hf["attention_bias"],
    )


def require_value(hf: dict, name: str, *allowed) -> None:
    """Check that a key is absent, null or has an allowed value.

    Raises:
      InputError: if it has another one.
    """
    if hf.get(name) is not None and hf[name] not in allowed:
        raise InputError(f"{name}={hf[name]!r} must be {' or '.join(map(repr, allowed))}")


def config_from_hf(hf: dict) -> ModelConfig:
    """config.json -> ModelConfig.

    Raises:
      InputError: if a key is missing or has an unsupported value.
    """
    hf_config.require(
        hf, "vocab_size", "hidden_size", "num_hidden_layers", "moe_intermediate_size",
        "num_experts_per_tok", "n_shared_experts",
    )  # fmt: skip
    require_value(hf, "topk_method", "greedy", "group_limited_greedy")
    require_value(hf, "scoring_func", "softmax")
    require_value(hf, "moe_layer_freq", 1)
    # The original code renormalises then and does not scale, transformers does neither.
    require_value(hf, "norm_topk_prob", False)
    require_value(hf, "mlp_bias", False)
    grouped = hf["topk_method"] == "group_limited_greedy"
    if grouped:
        hf_config.require(hf, "n_group", "topk_group")
    moe = MoEConfig(
        num_experts=hf_config.num_experts(hf),
        experts_per_token=hf["num_experts_per_tok"],
        d_expert=hf["moe_intermediate_size"],
        renormalize=False,
        d_shared=hf["moe_intermediate_size"] * hf["n_shared_experts"],
        num_groups=hf["n_group"] if grouped else 1,
        groups_per_token=hf["topk_group"] if grouped else 1,
        routed_scale=hf["routed_scaling_factor"],
        float32_router=True,
    )
    return hf_config.model_config(
        hf,
        attention=latent_attention(hf),
        moe=moe,
        dense_layers=hf_config.first_dense_layers(hf),
    )


FAMILY = Family(
    model_type="deepseek_v2",
    stem="DeepseekV2",
    read_config=config_from_hf,
    defaults=DEFAULTS,
    rules=NORMS + LATENT_ATTENTION + DENSE + EXPERTS + SHARED,
    count_keys=("n_routed_experts",),
    shared_count_key="n_shared_experts",
)
