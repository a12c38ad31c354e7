"""What a width policy reads and what it returns."""

import dataclasses
from typing import Any

import numpy as np

from pruning.budget.importance import PlannerOptions
from pruning.budget.planners import DEFAULTS, Planner
from pruning.scores.criteria import ChannelScores


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What a width policy reads.

    Attributes:
      scores: of channels, experts and layers.
      budget: channels to keep.
      reserved: bool, experts that keep at least `least` channels.
      most: int, most channels of each expert.
      least: smallest width of a kept expert, a multiple of `block`.
      block: every width is a multiple of it, and it divides F.
      planner: allocates the budget.
      objective: (degree of fairness, name of the weights) of the aligned optimum.
      options: fine print of the planner.
      align: a name of `ALIGNMENTS`.
      per_layer: alignment, and the choice of whole experts, stay inside the layer.
      cap: widest expert that policy "capped" allows.
      expert_rate: fraction of experts that policy "combined" removes outright.
      experts: bool, the experts that may stay; overrides the choice of "experts", "combined".
    """

    scores: ChannelScores
    budget: int
    reserved: np.ndarray  # [L, E]
    most: np.ndarray  # [L, E]
    least: int
    block: int
    planner: Planner
    objective: tuple[float, str] = (0.0, "equal")
    options: PlannerOptions = DEFAULTS
    align: str = "paper"
    per_layer: bool = False
    cap: int | None = None
    expert_rate: float = 0.0
    experts: np.ndarray | None = None  # [L, E]

    def of_layers(self, layers: np.ndarray, budget: int) -> "Problem":
        """The same problem for some of the layers and another budget."""
        per_layer = ("reserved", "most", "experts")
        parts: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[layers]
            for name in per_layer
        }
        scores = ChannelScores(
            channel=self.scores.channel[layers],
            expert=self.scores.expert[layers],
            layer=self.scores.layer[layers],
        )
        options = self.options
        if options.layer_weights is not None:
            chosen = tuple(np.asarray(options.layer_weights)[layers].tolist())
            options = dataclasses.replace(options, layer_weights=chosen)
        return dataclasses.replace(self, scores=scores, options=options, budget=budget, **parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Widths:
    """Channels kept per expert, and what the planner wanted before alignment."""

    counts: np.ndarray  # [L, E]
    unaligned: np.ndarray  # [L, E]
