"""What planners and width policies read and return: one problem in, widths out."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.errors import InputError
from pruning.budget.importance import DEFAULTS, PlannerOptions
from pruning.scores.criteria import ChannelScores

Counts = np.ndarray  # int64 [L, E], channels kept


class Objective(NamedTuple):
    """What a planner would maximise if it could choose among aligned widths.

    The sum over experts of the fairness utility of a degree (0 is coverage itself), under the
    weights of a name of `IMPORTANCE`.
    """

    degree: float
    weights: str


@dataclasses.dataclass(frozen=True)
class Planner:
    """Decides the widths of all experts of a model.

    Attributes:
      counts: the problem -> channels kept, at least its `floor`, at most its `most`, summing to
        its budget.
      objective: what it would maximise among aligned widths; without one only the paper's
        alignment can follow it.
      about: what it is and where it comes from, one line.
    """

    counts: Callable[["Problem"], Counts]
    objective: Objective | None = None
    about: str = ""

    def __call__(self, problem: "Problem") -> Counts:
        """Channels kept, int64 [L, E]."""
        return self.counts(problem)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """How much of what is to be kept.

    Attributes:
      scores: of channels, experts and layers.
      budget: channels to keep.
      floor: int, channels that an expert keeps in any case.
      most: int, most channels of each expert.
      planner: allocates the budget.
      least: smallest width of a kept expert, a multiple of `block`.
      block: every width is a multiple of it, and it divides F.
      options: fine print of the planner.
      align: a name of `ALIGNMENTS`.
      per_layer: alignment, and the choice of whole experts, stay inside the layer.
      cap: widest expert that policy "capped" allows.
      expert_rate: fraction of experts that policy "combined" removes outright.
      experts: bool, the experts that may stay; overrides the choice of "experts", "combined".
      seed: of planners that draw at random.
    """

    scores: ChannelScores
    budget: int
    floor: np.ndarray  # [L, E]
    most: np.ndarray  # [L, E]
    planner: Planner
    least: int = 1
    block: int = 1
    options: PlannerOptions = DEFAULTS
    align: str = "paper"
    per_layer: bool = False
    cap: int | None = None
    expert_rate: float = 0.0
    experts: np.ndarray | None = None  # [L, E]
    seed: int = 0

    @property
    def reserved(self) -> np.ndarray:  # bool [L, E]
        """Experts that stay in any case."""
        return self.floor > 0

    @property
    def objective(self) -> Objective:
        """The planner's, or the plain mean of coverage."""
        return self.planner.objective or Objective(0.0, "equal")

    def of_layers(self, layers: np.ndarray, budget: int) -> "Problem":
        """The same problem for some of the layers and another budget."""
        per_layer = ("floor", "most", "experts")
        parts: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[layers]
            for name in per_layer
        }
        scores = jax.tree.map(lambda values: values[layers], self.scores)
        options = self.options
        if options.layer_weights is not None:
            chosen = tuple(np.asarray(options.layer_weights)[layers].tolist())
            options = dataclasses.replace(options, layer_weights=chosen)
        return dataclasses.replace(self, scores=scores, options=options, budget=budget, **parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """Channels kept per expert, and what the planner wanted before alignment."""

    counts: np.ndarray  # [L, E]
    unaligned: np.ndarray  # [L, E]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Limits:
    """What a plan may not choose, beside its options.

    Attributes:
      within: int, most channels of each expert, for example the counts of a larger plan.
      experts: bool; experts that the widths "experts" and "combined" keep, instead of those of
        largest attribution.
      layer_shares: share of the budget of every layer, for example from
        `pruning.budget.clusters.layer_prior`.
    """

    within: np.ndarray | None = None  # [L, E]
    experts: np.ndarray | None = None  # [L, E]
    layer_shares: np.ndarray | None = None  # [L]

    def most(self, shape: tuple[int, int], d_expert: int) -> np.ndarray:  # int64 [L, E]
        """Most channels of each expert; InputError if `within` does not suit the model."""
        within = self.within
        if within is None:
            return np.full(shape, d_expert)
        if within.shape != shape or within.min() < 0 or within.max() > d_expert:
            raise InputError(
                f"within is {list(within.shape)} in [{within.min()}, {within.max()}], expected "
                f"{list(shape)} in [0, {d_expert}]; take the counts of a plan of this model"
            )
        return within.astype(np.int64)

    def check_experts(self, shape: tuple[int, int], experts_per_token: int) -> None:
        """Raise InputError if a choice of experts does not suit the model and its tokens."""
        experts = self.experts
        if experts is None:
            return
        if experts.shape != shape or experts.dtype != np.bool_:
            found = f"{experts.dtype}{list(experts.shape)}"
            raise InputError(f"experts is {found}, expected bool{shape}")
        fewest = int(experts.sum(axis=1).min())
        if fewest < experts_per_token:
            raise InputError(
                f"experts keeps {fewest} in one layer, every token needs {experts_per_token}; keep "
                "more"
            )
