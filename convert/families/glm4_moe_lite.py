"""GLM-4.7-Flash: DeepSeek-V3's latent attention and router, its dense layers listed by name."""

import dataclasses

from convert.families import deepseek_v3, hf_config
from convert.families.deepseek_v2 import latent_attention
from moe_jax.config import ModelConfig
from moe_jax.errors import InputError

# What config.json may leave out, as in transformers.
DEFAULTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-05,
    "q_lora_rank": 768,
    "attention_bias": False,
    "rope_interleave": True,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.8,
}


def config_from_hf(hf: dict) -> ModelConfig:
    """config.json -> ModelConfig.

    Raises:
      InputError: if a key is missing or has an unsupported value.
    """
    hf_config.require(hf, "vocab_size", "hidden_size", "num_hidden_layers")
    return hf_config.model_config(
        hf,
        attention=latent_attention(hf),
        moe=deepseek_v3.sigmoid_moe(hf),
        dense_layers=_dense_layers(hf),
    )


def _dense_layers(hf: dict) -> list[int]:
    """Layers without experts: transformers reads names of layers, other programs a number."""
    count, types = hf["num_hidden_layers"], hf.get("mlp_layer_types")
    types = ["dense", *["sparse"] * (count - 1)] if types is None else types
    if len(types) != count or not set(types) <= {"dense", "sparse"}:
        raise InputError(
            f"mlp_layer_types={types} must say 'dense' or 'sparse' for each of the {count} layers"
        )
    dense = [i for i, kind in enumerate(types) if kind == "dense"]
    first = hf.get("first_k_dense_replace")
    if first is not None and dense != list(range(min(first, count))):
        raise InputError(
            f"first_k_dense_replace={first} and mlp_layer_types (by default the first layer is "
            f"dense) must agree, but the latter have dense layers {dense}"
        )
    return dense


FAMILY = dataclasses.replace(
    deepseek_v3.FAMILY,
    model_type="glm4_moe_lite",
    stem="Glm4MoeLite",
    read_config=config_from_hf,
    defaults=DEFAULTS,
)
