"""Qwen3-MoE: normalised queries and keys, no shared expert."""

from collections.abc import Mapping

from convert.families import hf_config
from convert.families.tables import ATTENTION, DENSE, EXPERTS, NORMS, QK_NORM
from convert.rules import Family
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig

# What config.json may leave out, as in transformers.
DEFAULTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "attention_bias": False,
    "norm_topk_prob": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
}


def config_from_hf(hf: dict, rope: Mapping[str, float] | None = None) -> ModelConfig:
    """config.json -> ModelConfig.

    Args:
      hf: config.json.
      rope: values of `rope_parameters` that it may leave out.

    Raises:
      InputError: if a key is missing or has an unsupported value.
    """
    hf_config.require(
        hf, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "moe_intermediate_size", "num_experts_per_tok",
    )  # fmt: skip
    bias = hf["attention_bias"]
    attention = AttentionConfig(
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        rope=hf_config.rope_config(hf, rope),
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        norm_eps=hf["rms_norm_eps"],
    )
    moe = MoEConfig(
        num_experts=hf_config.num_experts(hf),
        experts_per_token=hf["num_experts_per_tok"],
        d_expert=hf["moe_intermediate_size"],
        renormalize=hf["norm_topk_prob"],
    )
    # transformers applies the window to every layer, whatever layer_types says
    slides = hf["use_sliding_window"] and hf["sliding_window"]
    layers = range(hf["num_hidden_layers"]) if slides else ()
    return hf_config.model_config(
        hf,
        attention=attention,
        moe=moe,
        dense_layers=hf_config.sparse_step_dense_layers(hf),
        sliding_layers=layers,
    )


FAMILY = Family(
    model_type="qwen3_moe",
    stem="Qwen3Moe",
    read_config=config_from_hf,
    defaults=DEFAULTS,
    rules=NORMS + ATTENTION + QK_NORM + DENSE + EXPERTS,
    count_keys=("num_experts", "num_local_experts"),
)
