"""Ragged folders: every expert at its own width, loaded with one modelling file."""

import dataclasses
from pathlib import Path
from typing import Any

from convert.rules import RAGGED, Family
from moe_jax.config import ModelConfig

MODELLING_FILE = Path(__file__).with_name("modeling_ragged_moe.py")


_EMPTIED = "emptied_experts"  # key of config.json: what experts without channels add


def has_constants(hf_config: dict[str, Any]) -> bool:
    """Whether the experts without channels of a ragged folder have tensors `constant`.

    Raises:
      ValueError: config.json says something else than "zero" or "constant" of them.
    """
    said = hf_config.get(_EMPTIED, "zero")
    if said not in ("zero", "constant"):
        raise ValueError(f"{_EMPTIED}={said!r} must be 'zero' or 'constant'")
    return said == "constant"


def emptied_model(config: ModelConfig, constants: bool) -> ModelConfig:
    """The architecture where experts without channels add constants, if no bias of theirs does."""
    added = constants and not config.moe.expert_bias
    return config.replace(moe=dataclasses.replace(config.moe, emptied_bias=added))


def ragged_config(
    hf_config: dict[str, Any],
    family: Family,
    counts: list[list[int]],
    constants: bool,
    mtp_width: int | None,
) -> dict[str, Any]:
    """config.json of a ragged folder.

    The model type is one of our own: under the stock one, transformers would ignore the modelling
    file and vLLM would copy narrow experts into uninitialised memory.

    Args:
      hf_config: the source's config.json, not changed.
      family: of the source.
      counts: channels per layer and expert, [] for dense layers.
      constants: whether experts without channels add constants.
      mtp_width: that of the experts that predict further tokens, if they were pruned.

    Returns:
      A new dict.
    """
    stem, module = f"Ragged{family.stem}", MODELLING_FILE.stem
    return {
        **hf_config,
        "model_type": RAGGED + family.public_type,
        "architectures": [f"{stem}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.{stem}Config",
            "AutoModel": f"{module}.{stem}Model",
            "AutoModelForCausalLM": f"{module}.{stem}ForCausalLM",
        },
        "expert_intermediate_sizes": counts,
        **({_EMPTIED: "constant"} if constants else {}),
        **({} if mtp_width is None else {"mtp_expert_intermediate_size": mtp_width}),
    }
