"""What terminal, page and model card say in the same words."""

from collections.abc import Mapping
from typing import Any

from convert.export_format import ExportFormat

NOMINALLY = (
    "Nominally: as papers count, 16 bits for every parameter of the dense model over the format's "
    "bits for every one that is left, embeddings and routers too, without scales; no file is so "
    "small."
)


def check_result(check: Mapping[str, Any]) -> str:
    """How a check of an export came out, in a word or two."""
    if not check["ok"]:
        return "FAILED"
    return "ok" if check.get("done", True) else "not done"


def repair_words(found: Mapping[str, Any]) -> str:
    """A sentence on what was repaired without training.

    Args:
      found: as `repair` of the report; not empty.
    """
    whole = f"{found['layer']} of {found['layers']} layers as a whole, "
    taken = whole if found["mode"] == "layer" else ""
    return (
        f"repaired on {found['tokens']:,} tokens: {taken}{found['changed']:,} of "
        f"{found['experts']:,} experts changed, {found['starved']:,} starved of text"
    )


def second_rounding(error: float) -> str:
    """A sentence on weights that the model stores in few bits: how exactly an export has them.

    Args:
      error: relative squared error, 0 if nothing was rounded again.
    """
    if not error:
        return "what the model stores in few bits is taken over bit for bit"
    return (
        "weights that the model stores in few bits were rounded a second time, with a relative "
        f"squared error of {error:.2g}"
    )


def nominally(export: str, dense: int, left: int) -> str:
    """How many times smaller an export is by `NOMINALLY`'s count, from parameters before and after;
    a number in words, as tables show it."""
    return f"{16 * dense / (ExportFormat(export).bits * left):.2f}"
