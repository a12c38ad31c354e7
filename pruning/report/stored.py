"""Whether report.json holds what tables, figures and pages rely on, at every depth."""

from collections.abc import Mapping
from typing import Any

from pruning.kit.fitting import misfits
from pruning.report.stored_fields import Check, Loading, Repair, Stored

UNEVEN = ("gini", "fraction_holding")  # of a layer's score
DRAWN = 1e100  # beyond it matplotlib cannot tell its ticks apart


def faults(values: Mapping[str, Any]) -> list[str]:
    """Names of the fields of a report that are of another type, at any depth, or do not agree.

    Args:
      values: of report.json, "version" left out.
    """
    return misfits(Stored, values) or [name for name, holds in _agreements(values) if not holds]


def _agreements(values: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """What tables and figures rely on beside types, by the field that breaks it."""
    v, layers = values, len(values["layer_indices"])
    experts = len(v["counts"][0]) if v["counts"] else 0
    points, sizes, plan = len(v["concentration"]["fractions"]), v["sizes"], v["plan"]
    each = (layers, experts)
    found, stability = v["calibration"], v["calibration"].get("stability")
    texts = [q for models in v["quality"].values() for q in models.values()]
    chance = v.get("random", {})
    texts += chance.get("quality", {}).values()
    written = [sizes, *sizes["exports"].values()]
    coverages = [f"coverage_{name}" in plan for name in ("before", "aligned", "optimum")]
    return [
        ("layer_indices", layers > 0 and experts > 0),
        ("d_expert", v["d_expert"] > 0),
        *((name, _is_grid(v[name], each)) for name in ("counts", "attribution", "expert_coverage")),
        ("layer_coverage", _is_grid(v["layer_coverage"], (layers,))),
        ("layer_loss", all(_is_grid(one, (layers,)) for one in v["layer_loss"].values())),
        ("concentration", points > 1 and _is_grid(v["concentration"]["fractions"], (points,))
         and _is_grid(v["concentration"]["curves"], (*each, points))
         and len({name in v["concentration"] for name in (*UNEVEN, "model")}) == 1
         and all(_is_grid(v["concentration"].get(name, [0] * layers), (layers,))
                 for name in UNEVEN)),
        ("calibration", ("usage" in found) == ("router_entropy" in found)
         and _is_grid(found.get("router_entropy", [0] * layers), (layers,))
         and _is_grid(found.get("usage", [[0] * experts] * layers), each)
         and (stability is None or _agree(**stability))),
        ("quantization", _is_grid([one["nearest"] for one in v["quantization"]], (None,))
         and _is_grid([one["gptq"] for one in v["quantization"]], (None,))),
        ("model", v["model"]["parameters"] > 0),
        ("sizes", bool(sizes["exports"]) and 0 <= sizes["channels_kept"] <= sizes["channels"]
         and sizes["channels"] > 0 and sizes["source_bytes"] > 0
         and all(one["bytes"] > 0 and one["parameters"] > 0 for one in written[1:])),
        ("quality", all("dense" in models for models in v["quality"].values())
         and all(one["tokens"] > 0 and abs(one["nll"]) < 700 for one in texts)
         and all(q["top1"] is not None for models in v["quality"].values()
                 for name, q in models.items() if name != "dense")),
        ("plan", all(coverages) or not any(coverages)),
        ("plan", all(len(one) == 2 for one in plan.get("starved_experts", ()))),
        ("verification", all(one.keys() <= Check.__annotations__.keys()
                             for one in v["verification"])),
        ("random", not chance or (chance.keys() >= {"seed", "quality"}
         and chance["quality"].keys() >= v["quality"].keys())),
        ("repair", not v.get("repair") or v["repair"].keys() == Repair.__annotations__.keys()),
        ("alone", all(size is None or size > 0 for one in v.get("alone", {}).values()
                      for size in one.values())),
        ("loading", all(one.keys() <= Loading.__annotations__.keys()
                        and all(len(told) == 2 for told in one["clients"].values())
                        for one in v.get("loading", {}).values())),
    ]  # fmt: skip


def _agree(tokens: list, jaccard: list, halves: float | None, **others: Any) -> bool:
    """Whether the parts of a text have an overlap each, and all can be drawn."""
    known = [one for one in (*jaccard, halves) if one is not None]
    return len(tokens) == len(jaccard) and _is_grid([*tokens, *known], (None,))


def _is_grid(values: Any, shape: tuple[int | None, ...]) -> bool:
    """Whether nested lists have a shape, None for any length, and numbers that can be drawn."""
    if not shape:
        return values is not None and abs(values) < DRAWN
    fits = isinstance(values, list) and shape[0] in (None, len(values))
    return fits and all(_is_grid(one, shape[1:]) for one in values)
