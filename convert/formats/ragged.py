"""Ragged folders: every expert at its own width, loaded with one modelling file."""

from pathlib import Path
from typing import Any

from convert.rules import RAGGED, Family

MODELLING_FILE = Path(__file__).with_name("modeling_ragged_moe.py")


def ragged_config(
    hf_config: dict[str, Any], family: Family, counts: list[list[int]], mtp_width: int | None
) -> dict[str, Any]:
    """config.json of a ragged folder.

    The model type is one of our own: under the stock one, transformers would ignore the modelling
    file and vLLM would copy narrow experts into uninitialised memory.

    Args:
      hf_config: the source's config.json, not changed.
      family: of the source.
      counts: channels per layer and expert, [] for dense layers.
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
        **({} if mtp_width is None else {"mtp_expert_intermediate_size": mtp_width}),
    }
