"""Kimi-K2: DeepSeek-V3 under a name of its own, which transformers knows only by remote code."""

import dataclasses

from convert.families import deepseek_v3
from convert.rules import Twin

_OWN_KEYS = ("auto_map",)


def _deepseek_v3_config(hf: dict) -> dict:
    kept = {key: value for key, value in hf.items() if key not in _OWN_KEYS}
    return kept | {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}


FAMILY = dataclasses.replace(
    deepseek_v3.FAMILY,
    model_type="kimi_k2",
    twin=Twin("deepseek_v3", _deepseek_v3_config, lambda layer: layer),
)
