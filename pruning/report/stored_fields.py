"""The types of report.json at every depth, as far as tables, figures and pages rely on them."""

from typing import NotRequired, TypedDict


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
    layer_bits: NotRequired[list[int]]
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


class Uneven(TypedDict):
    """How unevenly channels share the score."""

    gini: float
    fraction_holding: float


class Concentration(TypedDict):
    """Curves [L][E][K] over fractions [K]; numbers of every layer and of the model."""

    fractions: list[float]
    curves: list[list[list[float]]]
    gini: NotRequired[list[float]]
    fraction_holding: NotRequired[list[float]]
    model: NotRequired[Uneven]


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
    active_bytes: NotRequired[int]
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


class Repair(TypedDict):
    """What a repair did; {} without one."""

    mode: NotRequired[str]
    tokens: NotRequired[int]
    experts: NotRequired[int]
    changed: NotRequired[int]
    starved: NotRequired[int]
    layers: NotRequired[int]
    expert: NotRequired[int]
    layer: NotRequired[int]


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
    repair: NotRequired[Repair]
