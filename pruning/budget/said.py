"""What a plan says of itself."""

from typing import Any, NotRequired, TypedDict


class PlannedText(TypedDict):
    """A calibration text behind a plan."""

    text: str
    sha256: str
    weight: float
    documents: int
    tokens: int
    options: NotRequired[str]


class Said(TypedDict, total=False):
    """The provenance of a plan, as far as cards, `apply` and `plan` rely on it."""

    criterion: str
    attribution: str
    planner: str | None
    planner_options: dict[str, Any]
    width: str
    prune_rate: float
    nested_in: float | None
    block: int
    minimum: int
    layer_rates: dict[str, Any]
    coverage_aligned: float
    scoring: dict[str, Any]
    sources: list[PlannedText]
    evaluation: list[str]
    repair: str
    choice: dict[str, Any]
    cut_router: bool
    top_k: int | None
    merge: str
