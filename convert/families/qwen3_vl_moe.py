"""Qwen3-VL-MoE: a Qwen3-MoE that also sees images; every routing weight is renormalised.

On text all three coordinates of its rotary positions are equal, and so it is the plain rope.
"""

import dataclasses

from convert.families import qwen3_moe
from convert.rules import Wrapper
from moe_jax.config import ModelConfig

ROPE = {"rope_theta": 500000.0}

# What config.json may leave out, as in transformers.
DEFAULTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-06,
    "num_key_value_heads": 16,
    "attention_bias": False,
    "decoder_sparse_step": 1,
}


def config_from_hf(hf: dict) -> ModelConfig:
    """The text part of config.json -> ModelConfig.

    Raises:
      InputError: if a key is missing or has an unsupported value.
    """
    hf["norm_topk_prob"], hf["use_sliding_window"] = True, False
    return qwen3_moe.config_from_hf(hf, ROPE)


FAMILY = dataclasses.replace(
    qwen3_moe.FAMILY,
    model_type="qwen3_vl_moe",
    stem="Qwen3VLMoe",
    read_config=config_from_hf,
    defaults=DEFAULTS,
    rope=ROPE,
    together="halves",
    wrapper=Wrapper({"model.language_model.": "model.", "lm_head.": "lm_head."}),
    formats=("padded-bf16",),  # its class reads fused experts only
)
