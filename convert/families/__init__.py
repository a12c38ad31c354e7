"""Model families by the `model_type` of config.json."""

import difflib

from convert.families import qwen2_moe, qwen3_moe
from convert.rules import Family

RAGGED = "ragged_"  # prefix of the model types of our custom export


def _family(model_type: str, module) -> dict[str, Family]:
    return {
        prefix + model_type: Family(
            prefix + model_type, module.config_from_hf, module.RULES, ragged=bool(prefix)
        )
        for prefix in ("", RAGGED)
    }


FAMILIES: dict[str, Family] = _family("qwen2_moe", qwen2_moe) | _family("qwen3_moe", qwen3_moe)


def find_family(model_type: str | None) -> Family:
    """The family of a model type.

    Raises:
      ValueError: if it is unknown; names the nearest and all known ones.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.0)
    raise ValueError(
        f"model_type={model_type!r} is unknown; the nearest is {near[0]!r}, "
        f"known are {', '.join(FAMILIES)}"
    )
