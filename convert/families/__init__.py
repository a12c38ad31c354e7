"""Model families by the `model_type` of config.json."""

import dataclasses

from convert.families import (
    deepseek,
    deepseek_v2,
    deepseek_v3,
    dots1,
    glm4_moe,
    glm4_moe_lite,
    glm4v_moe,
    gpt_oss,
    kimi_k2,
    kimi_k25,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    qwen3_next,
    qwen3_vl_moe,
)
from convert.formats.ragged import emptied_experts, emptied_model, stock_config
from convert.rules import RAGGED, Family
from moe_jax.config import ModelConfig
from moe_jax.errors import InputError

_STOCK = (
    qwen2_moe.FAMILY,
    qwen3_moe.FAMILY,
    qwen3_next.FAMILY,
    mixtral.FAMILY,
    olmoe.FAMILY,
    deepseek.FAMILY,
    deepseek_v2.FAMILY,
    deepseek_v3.FAMILY,
    kimi_k2.FAMILY,
    glm4_moe.FAMILY,
    glm4_moe_lite.FAMILY,
    dots1.FAMILY,
    gpt_oss.FAMILY,
    qwen3_vl_moe.FAMILY,
    glm4v_moe.FAMILY,
    kimi_k25.FAMILY,
)


def _ragged(family: Family) -> Family:
    def config_from_hf(hf: dict) -> ModelConfig:
        return emptied_model(family.config_from_hf(stock_config(hf, family)), emptied_experts(hf))

    return dataclasses.replace(
        family,
        model_type=RAGGED + family.model_type,
        read_config=config_from_hf,
        ragged=True,
        together="",
    )


FAMILIES: dict[str, Family] = {family.model_type: family for family in _STOCK}
FAMILIES |= {
    RAGGED + name: _ragged(family)
    for name, family in FAMILIES.items()
    if family.twin is None and "ragged-bf16" in family.formats
}


def find_family(model_type: str | None) -> Family:
    """The family of a model type.

    Raises:
      InputError: it is unknown; names the known ones, those of our own exports left out.
    """
    name = str(model_type)[:80]
    plain = name.removeprefix(RAGGED)
    if name not in FAMILIES and plain in FAMILIES:  # registered from outside
        return _ragged(FAMILIES[plain])
    if name not in FAMILIES:
        known = ", ".join(known for known in FAMILIES if not known.startswith(RAGGED))
        raise InputError(f"model_type={name!r} is unknown; known are: {known}")
    return FAMILIES[name]
