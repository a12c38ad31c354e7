"""Qwen1.5-MoE and Qwen2-MoE: biased q, k, v and a gated shared expert."""

from convert.families import hf_config
from convert.families.tables import ATTENTION, DENSE, EXPERTS, GATED_SHARED, NORMS
from convert.rules import Family
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig

# What config.json may leave out, as in transformers.
DEFAULTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "num_key_value_heads": 16,
    "norm_topk_prob": False,
    "qkv_bias": True,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "decoder_sparse_step": 1,
}


def config_from_hf(hf: dict) -> ModelConfig:
    """config.json -> ModelConfig.

    Raises:
      InputError: if a key is missing or has an unsupported value.
    """
    hf_config.require(
        hf, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts_per_tok",
    )  # fmt: skip
    heads = hf["num_attention_heads"]
    eps = hf["rms_norm_eps"]
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        rope=hf_config.rope_config(hf),
        qkv_bias=hf["qkv_bias"],
        norm_eps=eps,
    )
    moe = MoEConfig(
        num_experts=hf_config.num_experts(hf),
        experts_per_token=hf["num_experts_per_tok"],
        d_expert=hf["moe_intermediate_size"],
        renormalize=hf["norm_topk_prob"],
        d_shared=hf["shared_expert_intermediate_size"],
        shared_gate=True,
    )
    return hf_config.model_config(
        hf,
        attention=attention,
        moe=moe,
        dense_layers=hf_config.sparse_step_dense_layers(hf),
        sliding_layers=_sliding_layers(hf),
    )


def _sliding_layers(hf: dict) -> list[int]:
    layers = range(hf["num_hidden_layers"])
    if not hf["use_sliding_window"]:
        return []
    types = hf.get("layer_types")
    if types is not None:
        return [i for i in layers if types[i] == "sliding_attention"]
    limit = hf["max_window_layers"]
    return [i for i in layers if (i + 1) % 2 and i < limit]


FAMILY = Family(
    model_type="qwen2_moe",
    stem="Qwen2Moe",
    read_config=config_from_hf,
    defaults=DEFAULTS,
    rules=NORMS + ATTENTION + DENSE + EXPERTS + GATED_SHARED,
)
