"""Mixtral: every layer has experts, named w1 (gate), w3 (up) and w2 (down)."""

from convert.families import hf_config
from convert.families.tables import ATTENTION, NORMS, emptied_rule, expert_rules
from convert.rules import Family
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig

ROPE = {"rope_theta": 1e6}

# What config.json may leave out, as in transformers.
DEFAULTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "num_key_value_heads": 8,
    "sliding_window": None,
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
    heads = hf["num_attention_heads"]
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        rope=hf_config.rope_config(hf, ROPE),
    )
    moe = MoEConfig(
        num_experts=hf_config.num_experts(hf),
        experts_per_token=hf["num_experts_per_tok"],
        d_expert=hf["intermediate_size"],
        renormalize=True,
    )
    layers = range(hf["num_hidden_layers"]) if hf.get("sliding_window") else ()
    return hf_config.model_config(hf, attention=attention, moe=moe, sliding_layers=layers)


_EXPERTS = expert_rules("block_sparse_moe", "w1", "w3", "w2")

FAMILY = Family(
    model_type="mixtral",
    stem="Mixtral",
    read_config=config_from_hf,
    defaults=DEFAULTS,
    rules=NORMS + ATTENTION + (*_EXPERTS, emptied_rule("block_sparse_moe")),
    # What transformers 5 calls them in memory, and on disk if save_original_format is False.
    aliases={own.hf: rule.hf for own, rule in zip(expert_rules(), _EXPERTS, strict=True)},
    width_key="intermediate_size",
    count_keys=("num_local_experts",),
    rope=ROPE,
)
