"""Kimi-K2: DeepSeek-V3 under a name of its own, which transformers knows only by remote code."""

import dataclasses

from convert.families import deepseek_v3
from convert.rules import Twin


def _deepseek_v3_config(hf: dict) -> dict:
    return hf | {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}


FAMILY = dataclasses.replace(
    deepseek_v3.FAMILY,
    model_type="kimi_k2",
    twin=Twin("deepseek_v3", _deepseek_v3_config, lambda layer: layer),
)
