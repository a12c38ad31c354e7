"""The dense model as the family that it is exported as describes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convert.description import Description
from convert.families import find_family
from convert.formats.ragged import stock_config
from convert.rules import Family
from moe_jax.config import ModelConfig
from moe_jax.transformer import DecoderLayer


@dataclass(frozen=True)
class Written:
    """What an export writes a dense model as.

    Attributes:
      family: whose names and config.json it gets.
      hf_config: config.json of the dense model in that family.
      config: the same as our architecture.
      layer: decoder layer -> one that the family's rules write.
    """

    family: Family
    hf_config: dict[str, Any]
    config: ModelConfig
    layer: Callable[[DecoderLayer], DecoderLayer]

    def stored(self, name: str) -> str:
        """A tensor's name on disk, by that in the family's rules."""
        wrapper = self.family.wrapper
        return name if wrapper is None else wrapper.stored(name)


def as_written(base: Description) -> Written:
    """The family itself, or its twin."""
    twin = base.family.twin
    if twin is None:
        hf_config = stock_config(base.hf_config, base.family)
        return Written(base.family, hf_config, base.config, lambda layer: layer)
    family, hf_config = find_family(twin.model_type), twin.config(base.hf_config)
    return Written(family, hf_config, family.config_from_hf(hf_config), twin.layer)
