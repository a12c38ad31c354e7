"""What report.json holds at every depth, as far as tables, figures and pages rely on it."""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from pruning.kit.fitting import misfits

DRAWN = 1e100  # beyond it matplotlib cannot tell its ticks apart


class Model(TypedDict):
    """`CompressionReport.model`; each of the following is the field of that name."""

    path: str
    family: str
    parameters: int
    bytes: int


class Recipe(TypedDict):
    """Options that decide what the page shows; all others are shown as they are."""

    planner: NotRequired[str]
    layer_loss: NotRequired[str]
    until_stable: NotRequired[float | None]


class Source(TypedDict):
    """A calibration text."""

    path: str
    documents: int
    tokens: int


class Stability(TypedDict):
    """Of the kept set over the parts of the text."""

    tokens: list[int]
    jaccard: list[float | None]
    halves: float | None


class Calibration(TypedDict):
    """The text that was scored."""

    tokens: int
    sources: list[Source]
    stability: NotRequired[Stability | None]
    router_entropy: NotRequired[list[float]]
    usage: NotRequired[list[list[float]]]


class Plan(TypedDict):
    """Provenance of the plan."""

    width: NotRequired[str]
    align: NotRequired[str]
    coverage_before: NotRequired[float]
    coverage_aligned: NotRequired[float]
    coverage_optimum: NotRequired[float]
    emptied_experts: NotRequired[int]
    harmful_experts: NotRequired[int]
    starved_experts: NotRequired[list[list[int]]]
    starved_share: NotRequired[float]
    super_channels: NotRequired[list[list[int]]]
    super_channels_removed: NotRequired[int]


class LayerLoss(TypedDict):
    """Of every layer, before and after smoothing."""

    raw: list[float]
    smoothed: list[float]


class Concentration(TypedDict):
    """Curves [L][E][K] over fractions [K]."""

    fractions: list[float]
    curves: list[list[list[float]]]


class LayerRounding(TypedDict):
    """What GPTQ did in a layer."""

    nearest: float
    gptq: float
    matrices: int
    fallbacks: int


class ActiveParameters(TypedDict):
    """What a token meets on average."""

    source: float
    exports: float


class ExportSize(TypedDict):
    """Of one export."""

    bytes: int
    parameters: int
    bits_per_parameter: float
    padded_bytes: int | None
    rounded_again: NotRequired[float]


class Sizes(TypedDict):
    """What was written and what is left."""

    source_bytes: int
    channels: int
    channels_kept: int
    active_parameters: NotRequired[ActiveParameters]
    exports: dict[str, ExportSize]


class TextQuality(TypedDict):
    """Of one model on one text."""

    nll: float
    perplexity: float
    tokens: int
    kl: float | None
    top1: float | None


class Evaluation(TypedDict):
    """The text that was measured on."""

    window: int
    stride: int | None
    seen: NotRequired[dict[str, float | None]]
    texts: NotRequired[dict[str, str]]


class Environment(TypedDict):
    """Where and when."""

    date: str


class Stage(TypedDict):
    """Time and memory of one."""

    name: str
    seconds: float
    peak_memory_bytes: int


class Sample(TypedDict):
    """What both models wrote."""

    prompt: str
    dense: str
    compressed: str
    export: str


class NamedSample(Sample):
    """The same of one text of several."""

    text: str


class Check(TypedDict):
    """One of `pruning.stages.verify`."""

    export: str
    check: str
    ok: bool
    detail: str
    done: NotRequired[bool]


class Random(TypedDict):
    """Random channels at the same size; {} if they were not measured."""

    seed: NotRequired[int]
    quality: NotRequired[dict[str, TextQuality]]


class Alone(TypedDict):
    """Bytes of an export by one of the two means alone."""

    pruned_bytes: int
    rounded_bytes: int | None


class Loading(TypedDict):
    """The fields of `pruning.report.loading.Loading`."""

    form: str
    clients: dict[str, list[str]]
    has_tokenizer: bool
    has_latent_attention: bool
    has_linear_attention: bool
    auto_class: NotRequired[str]


class Stored(TypedDict):
    """The fields of `CompressionReport`."""

    model: Model
    recipe: Recipe
    environment: Environment
    calibration: Calibration
    plan: Plan
    layer_indices: list[int]
    d_expert: int
    counts: list[list[int]]
    attribution: list[list[float]]
    expert_coverage: list[list[float]]
    layer_coverage: list[float]
    layer_loss: LayerLoss
    concentration: Concentration
    quantization: list[LayerRounding]
    sizes: Sizes
    quality: dict[str, dict[str, TextQuality]]
    evaluation: Evaluation
    stages: list[Stage]
    sample: Sample
    verification: list[Check]
    samples: NotRequired[list[NamedSample]]
    random: NotRequired[Random]
    alone: NotRequired[dict[str, Alone]]
    loading: NotRequired[dict[str, Loading]]
    command: NotRequired[str]
    not_run: NotRequired[dict[str, str]]


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
         and _is_grid(v["concentration"]["curves"], (*each, points))),
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
