"""Padded folders: one width for the whole model, so that stock classes load them.

The width is decided in `ExportFormat.padded_width`, that of a plan in `pruning.budget.widths`.
"""

import dataclasses
from typing import Any

from convert.rules import Family
from moe_jax.config import ModelConfig


def padded_model(config: ModelConfig, family: Family, width: int) -> ModelConfig:
    """The architecture of a padded folder, as far as widths go.

    Where the shared expert's width is a number of experts' widths, it grows to the next whole
    number of them.
    """
    shared = config.moe.d_shared
    if family.shared_count_key is not None:
        shared = _shared_count(config, width) * width
    return config.replace(moe=dataclasses.replace(config.moe, d_expert=width, d_shared=shared))


def _shared_count(config: ModelConfig, width: int) -> int:
    return -(-config.moe.d_shared // width)


def padded_config(
    hf_config: dict[str, Any], config: ModelConfig, family: Family, width: int
) -> dict[str, Any]:
    """config.json of a padded folder: the stock family at expert width `width`.

    Args:
      hf_config: the source's config.json, of the stock family; not changed.
      config: the source's architecture.
      family: of the source.
      width: channels of every expert.

    Returns:
      A new dict.
    """
    padded = dict(hf_config)
    if family.shared_count_key is not None:
        padded[family.shared_count_key] = _shared_count(config, width)
    return padded | {
        "model_type": family.public_type,
        "architectures": [f"{family.stem}ForCausalLM"],
        family.width_key: width,
    }
