"""Padded folders: one width for the whole model, so that stock classes load them."""

from typing import Any

from convert.formats.ragged import CLASSES


def padded_config(hf_config: dict[str, Any], width: int) -> dict[str, Any]:
    """config.json of a padded folder: the stock family at expert width `width`.

    Args:
      hf_config: the source's config.json (a ragged one loses what made it ragged), not changed.
      width: channels of every expert.

    Returns:
      A new dict.
    """
    config = {
        key: value
        for key, value in hf_config.items()
        if key not in ("auto_map", "expert_intermediate_sizes")
    }
    family = str(hf_config["model_type"]).removeprefix("ragged_")
    architecture = CLASSES[family].removeprefix("Ragged") + "ForCausalLM"
    return config | {
        "model_type": family,
        "architectures": [architecture],
        "moe_intermediate_size": width,
    }
