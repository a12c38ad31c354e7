"""The pruning plan: which channels stay, and how that was decided."""

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pruning.alignment import (
    best_channels,
    check_block,
    legal_minimum,
    redistribute,
    uniform_counts,
)
from pruning.criteria import EXPERT_CRITERIA, ChannelScores, channel_scores, choose
from pruning.files import replace_file, replace_text
from pruning.planners import PLANNERS, Planner, random_counts

if TYPE_CHECKING:
    from pruning.statistics import ChannelStatistics

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class PruningPlan:
    """Channels to keep in every expert of every MoE layer.

    `layer_indices` are the positions of the L MoE layers in the model; `provenance` says which
    statistics, criterion, planner and budget led here.
    """

    keep: np.ndarray  # [L, E, F], bool
    layer_indices: tuple[int, ...]
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.keep.ndim != 3 or self.keep.dtype != np.bool_ or 0 in self.keep.shape:
            raise ValueError(
                f"keep is {self.keep.dtype}{list(self.keep.shape)}, expected bool [L, E, F] with "
                "at least one layer, expert and channel"
            )
        indices = list(self.layer_indices)
        if len(indices) != len(self.keep) or indices != sorted(set(indices)) or indices[0] < 0:
            raise ValueError(
                f"layer_indices={self.layer_indices} must be {len(self.keep)} different model "
                "layers in ascending order"
            )

    @property
    def counts(self) -> np.ndarray:  # [L, E], int64
        """Channels kept per expert."""
        return self.keep.sum(axis=2)

    def expert_coverage(self, channel: np.ndarray) -> np.ndarray:  # [L, E, F] -> [L, E]
        """Share of each expert's channel score that the plan keeps, in [0, 1]."""
        return _share(channel, self.keep, axis=(2,))

    def layer_coverage(self, channel: np.ndarray) -> np.ndarray:  # [L, E, F] -> [L]
        """Share of each layer's channel score, all experts pooled, that the plan keeps."""
        return _share(channel, self.keep, axis=(1, 2))

    def require_model(self, model_hash: str) -> None:
        """Refuse to prune a model that the plan was not made for.

        Args:
          model_hash: identity of the model at hand.

        Raises:
          ValueError: the plan's provenance names another one.
        """
        planned = self.provenance.get("model_hash")
        if planned is not None and planned != model_hash:
            raise ValueError(
                f"the plan was made for model {planned}, this model is {model_hash}; "
                "score this model and plan again"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write `plan.json` and `plan.safetensors`, each atomically.

        Args:
          path: a folder, made if missing; or a file name whose stem both files get.
        """
        description, tensors = _files(path)
        description.parent.mkdir(parents=True, exist_ok=True)
        named = {
            f"keep.{index}": np.ascontiguousarray(keep)
            for index, keep in zip(self.layer_indices, self.keep, strict=True)
        }
        content = {
            "format_version": FORMAT_VERSION,
            "layer_indices": list(self.layer_indices),
            "d_expert": self.keep.shape[2],
            "counts": self.counts.tolist(),
            "provenance": dict(self.provenance),
        }
        text = json.dumps(content, indent=1, default=_plain) + "\n"
        replace_file(tensors, lambda partial: save_file(named, partial))
        replace_text(description, text)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PruningPlan":
        """Read what `save` wrote.

        Args:
          path: the folder, or either file.

        Returns:
          The plan.

        Raises:
          FileNotFoundError: one of the two files is missing.
          ValueError: a file is damaged, or the two do not belong together.
        """
        description, tensors = _files(path)
        for file in (description, tensors):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; make it with `moe-compress plan`")
        try:
            content = json.loads(description.read_text(encoding="utf-8"))
            version, indices = content["format_version"], content["layer_indices"]
            counts, provenance = np.asarray(content["counts"]), content["provenance"]
            named = load_file(tensors)
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{description.parent} holds no readable plan ({error})") from error
        if version != FORMAT_VERSION:
            raise ValueError(f"{description} has format {version}, expected {FORMAT_VERSION}")
        expected = {f"keep.{index}" for index in indices}
        if set(named) != expected or len({keep.shape for keep in named.values()}) != 1:
            raise ValueError(
                f"{tensors} holds {sorted(named)}, expected {sorted(expected)} of one shape"
            )
        keep = np.stack([named[f"keep.{index}"] for index in indices])
        plan = cls(keep, tuple(indices), provenance)
        if not np.array_equal(plan.counts, counts):
            raise ValueError(f"{description} and {tensors} are of different plans; plan again")
        return plan


def plan_pruning(
    statistics: "ChannelStatistics",
    *,
    prune_rate: float,
    criterion: str = "act",
    attribution: str = "ala",
    planner: str = "paper",
    width: Literal["free", "uniform"] = "free",
    block: int = 1,
    minimum: int | None = None,
    experts_per_token: int,
    layer_indices: Sequence[int] | None = None,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> PruningPlan:
    """Decide which channels of the routed experts stay.

    Args:
      statistics: sums of a calibration sweep.
      prune_rate: fraction of routed-expert channels to remove, in [0, 1).
      criterion: how channels are ranked, a name of `CHANNEL_CRITERIA`.
      attribution: how experts are weighted, a name of `EXPERT_CRITERIA`.
      planner: how the budget is allocated, a name of `PLANNERS`; unused by uniform width.
      width: "free" lets every expert have its own width; "uniform" gives all experts of the model
        the budget's width, rounded down to a block.
      block: widths are multiples of it; must divide the expert width.
      minimum: least width of a kept expert, rounded up to a block; default one block.
      experts_per_token: experts per layer that keep at least `minimum` channels, so that every
        token finds its experts; those of largest attribution.
      layer_indices: the model's layer number of each MoE layer; default 0, 1, 2, ...
      seed: of criterion and planner "random".
      provenance: more to record, for example model_hash, statistics_hash and calibration.

    Returns:
      The plan. Its provenance records the choices, the budget and the channels actually kept.

    Raises:
      ValueError: an option is out of range, unknown, or infeasible for this budget.
    """
    shape = statistics.hidden_square.shape
    allocate = choose(PLANNERS, planner, "planner")
    if planner == "random":
        allocate = functools.partial(random_counts, seed=seed)
    choose({"free": 0, "uniform": 1}, width, "width")
    budget = _budget(prune_rate, math.prod(shape))
    check_block(block, shape[2])
    least = legal_minimum(block if minimum is None else minimum, block, shape[2])
    _check_floor(experts_per_token, shape, least, budget)
    uniform = uniform_counts(shape, budget, block, least) if width == "uniform" else None
    scores = channel_scores(statistics, criterion=criterion, attribution=attribution, seed=seed)
    counts = uniform
    if counts is None:
        counts = _free_counts(scores, allocate, budget, experts_per_token, least, block)
    attributed = choose(EXPERT_CRITERIA, attribution, "attribution")(statistics)
    # A source tree that was never installed has no version.
    installed = importlib.metadata.distributions(name="moe-jax")
    tool_version = next((package.version for package in installed), "source tree")
    record = {
        "criterion": criterion,
        "attribution": attribution,
        "planner": planner if width == "free" else None,
        "width": width,
        "prune_rate": prune_rate,
        "block": block,
        "minimum": least,
        "experts_per_token": experts_per_token,
        "seed": seed,
        "budget": budget,
        "kept": int(counts.sum()),
        "unspent": budget - int(counts.sum()),
        "emptied_experts": int((counts == 0).sum()),
        "harmful_experts": int((attributed < 0.0).sum()),
        "tool_version": tool_version,
    }
    indices = tuple(range(shape[0]) if layer_indices is None else map(int, layer_indices))
    keep = best_channels(scores.channel, counts)
    return PruningPlan(keep, indices, {**record, **(provenance or {})})


def _free_counts(
    scores: ChannelScores,
    allocate: Planner,
    budget: int,
    experts_per_token: int,
    least: int,
    block: int,
) -> np.ndarray:  # [L, E]
    # The experts of largest attribution are reserved, ties to the lower index.
    rank = np.argsort(np.argsort(-scores.expert, axis=1, kind="stable"), axis=1)
    reserved = rank < experts_per_token
    counts = allocate(scores, budget, np.where(reserved, least, 0))
    if least == 1:
        return counts
    return redistribute(
        counts,
        d_expert=scores.channel.shape[2],
        block=block,
        minimum=least,
        attribution=scores.expert,
        reserved=reserved,
    )


def _budget(prune_rate: float, channels: int) -> int:
    if not 0.0 <= prune_rate < 1.0:
        raise ValueError(f"prune_rate={prune_rate} must lie in [0, 1); choose e.g. 0.25")
    return round((1.0 - prune_rate) * channels)


def _check_floor(
    experts_per_token: int, shape: tuple[int, int, int], least: int, budget: int
) -> None:
    layers, experts, _ = shape
    if not 1 <= experts_per_token <= experts:
        raise ValueError(
            f"experts_per_token={experts_per_token} must lie in [1, num_experts={experts}]"
        )
    needed = layers * experts_per_token * least
    if needed > budget:
        raise ValueError(
            f"the budget of {budget} channels is below the {needed} that {experts_per_token} "
            f"experts of {least} channels in each of {layers} layers need; "
            "lower the prune rate, the minimum or the block"
        )


def _share(channel: np.ndarray, keep: np.ndarray, axis: tuple[int, ...]) -> np.ndarray:
    # A group without any score counts channels instead.
    total = channel.sum(axis=axis)
    kept = np.where(keep, channel, 0.0).sum(axis=axis)
    return np.divide(kept, total, out=keep.mean(axis=axis), where=total > 0.0)


def _files(path: str | os.PathLike) -> tuple[Path, Path]:
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path / "plan"
    return stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".safetensors")


def _plain(value: Any) -> Any:
    # numpy scalars and arrays, and paths, as JSON.
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)
