"""GLM-4.5V: a GLM-4.5 without norms of queries and keys that also sees images.

On text all three coordinates of its rotary positions are equal, and so it is the plain rope.
"""

import dataclasses

from convert.families import glm4_moe
from convert.rules import Wrapper
from moe_jax.config import ModelConfig

# What config.json may leave out, as in transformers.
DEFAULTS = {key: value for key, value in glm4_moe.DEFAULTS.items() if key != "use_qk_norm"} | {
    "max_position_embeddings": 65536,
    "num_key_value_heads": 8,
    "attention_bias": True,
}


def config_from_hf(hf: dict) -> ModelConfig:
    """The text part of config.json -> ModelConfig.

    Raises:
      InputError: if a key is missing or has an unsupported value.
    """
    hf["use_qk_norm"] = False
    return glm4_moe.config_from_hf(hf)


FAMILY = dataclasses.replace(
    glm4_moe.FAMILY,
    model_type="glm4v_moe",
    stem="Glm4vMoe",
    read_config=config_from_hf,
    defaults=DEFAULTS,
    wrapper=Wrapper({"model.language_model.": "model.", "lm_head.": "lm_head."}),
    formats=("padded-bf16", "padded-int4"),
)
