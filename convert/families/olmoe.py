"""OLMoE: queries and keys are normalised over all heads together, then perhaps clipped."""

from convert.families import hf_config
from convert.families.tables import ATTENTION, EXPERTS, JOINT_QK_NORM, NORMS
from convert.rules import Family
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig

# What config.json may leave out, as in transformers.
DEFAULTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "attention_bias": False,
    "norm_topk_prob": False,
    "clip_qkv": None,
}


def config_from_hf(hf: dict) -> ModelConfig:
    """config.json -> ModelConfig.

    Raises:
      InputError: if a key is missing or has an unsupported value.
    """
    hf_config.require(
        hf, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size", "num_experts_per_tok",
    )  # fmt: skip
    heads, bias = hf["num_attention_heads"], hf["attention_bias"]
    eps = hf["rms_norm_eps"]
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf["hidden_size"] // heads,
        rope=hf_config.rope_config(hf),
        qk_norm=True,
        joint_qk_norm=True,
        clip_qkv=hf["clip_qkv"],
        qkv_bias=bias,
        out_bias=bias,
        norm_eps=eps,
    )
    moe = MoEConfig(
        num_experts=hf_config.num_experts(hf),
        experts_per_token=hf["num_experts_per_tok"],
        d_expert=hf["intermediate_size"],
        renormalize=hf["norm_topk_prob"],
    )
    return hf_config.model_config(hf, attention=attention, moe=moe)


FAMILY = Family(
    model_type="olmoe",
    stem="Olmoe",
    read_config=config_from_hf,
    defaults=DEFAULTS,
    rules=NORMS + ATTENTION + JOINT_QK_NORM + EXPERTS,
    width_key="intermediate_size",
)
