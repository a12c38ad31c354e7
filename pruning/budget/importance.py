"""How much each expert and each layer counts in an objective, and the options that decide it."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from moe_jax.errors import InputError, choose
from pruning.budget.smoothing import SMOOTHINGS, smooth_layer_loss
from pruning.scores.criteria import ChannelScores

# Smallest weight of an expert, as a share of the layer's mean weight.
WEIGHT_FLOOR = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannerOptions:
    """Fine print of a planner; the defaults are the paper's.

    Attributes:
      rho_max: coverage beyond which a channel counts as worth nothing, in (0, 1]; channels
        beyond it come after all others but before those without any score.
      weights: a name of `WEIGHTS`; default the planner's own.
      smoothing: a name of `SMOOTHINGS`, applied to the layer losses.
      passes: how often the smoothing is applied; 1 is the paper's figure, 4 its release.
      layer_loss: "energy" is the share of the residual stream that the layer's experts write, the
        paper's local loss; "attribution" adds up the experts' attribution, which is end to end
        where the attribution is; "nll_ig" is the end-to-end loss of the layer's experts together,
        which needs statistics with `nll_ig`.
      loss_scale: factor on the layer loss; only the logarithmic smoothings see it. 0.01 times the
        tokens per sequence gives the unit of the paper's figures.
      layer_weights: one positive weight per layer instead of the smoothed loss, for example a
        prior from `pruning.budget.clusters`.
    """

    rho_max: float = 1.0
    weights: str | None = None
    smoothing: str = "sqrt"
    passes: int = 1
    layer_loss: Literal["energy", "attribution", "nll_ig"] = "energy"
    loss_scale: float = 1.0
    layer_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.rho_max <= 1.0:
            raise InputError(f"rho_max={self.rho_max} must lie in (0, 1]; the paper uses 1")
        if self.weights is not None:
            choose(WEIGHTS, self.weights, "weights")
        choose(SMOOTHINGS, self.smoothing, "smoothing")
        choose(LAYER_LOSSES, self.layer_loss, "layer_loss")
        if not self.passes >= 0:
            raise InputError(f"passes={self.passes} must be 0 or more; the paper uses 1")
        if not 0.0 < self.loss_scale < np.inf:
            raise InputError(f"loss_scale={self.loss_scale} must be positive and finite")
        given = np.array(() if self.layer_weights is None else self.layer_weights)
        if not (np.isfinite(given) & (given > 0.0)).all():
            raise InputError(f"layer_weights={self.layer_weights} must be positive and finite")


Weights = Callable[[ChannelScores, PlannerOptions], np.ndarray]


def _end_to_end_loss(scores: ChannelScores) -> np.ndarray:  # [L]
    if scores.layer_nll is None:
        raise InputError(
            "layer_loss='nll_ig' needs statistics with nll_ig; score the model again with "
            "--nll-ig 4, or use 'energy'"
        )
    return scores.layer_nll


LAYER_LOSSES: dict[str, Callable[[ChannelScores], np.ndarray]] = {
    "energy": lambda scores: scores.layer,
    "attribution": lambda scores: scores.expert.sum(axis=1),
    "nll_ig": _end_to_end_loss,
}


def layer_weights(scores: ChannelScores, options: PlannerOptions) -> np.ndarray:  # [L]
    """Weight of each layer: the smoothed layer loss, or what the options say instead.

    Raises:
      InputError: the options hold weights for another number of layers, or ask for a loss that was
        not measured.
    """
    if options.layer_weights is not None:
        given = np.asarray(options.layer_weights, np.float64)
        if given.shape != scores.layer.shape:
            raise InputError(
                f"layer_weights has {given.size} entries, the model has {scores.layer.size} layers "
                "with experts; give one weight for each of them"
            )
        return given
    loss = LAYER_LOSSES[options.layer_loss](scores)
    return smooth_layer_loss(options.loss_scale * loss, options.smoothing, options.passes)


def share_weights(attribution: np.ndarray) -> np.ndarray:  # [L, E] -> [L, E]
    """Each expert's share of its layer, summing to 1 before a floor of 1e-3 / E.

    A layer without positive attribution gets equal shares.
    """
    experts = attribution.shape[1]
    total = attribution.sum(axis=1, keepdims=True)
    equal = np.full_like(attribution, 1.0 / experts)
    share = np.divide(attribution, total, out=equal, where=total > 0.0)
    return np.maximum(share, WEIGHT_FLOOR / experts)


def paper_weights(scores: ChannelScores, options: PlannerOptions) -> np.ndarray:  # [L, E]
    """Smoothed layer loss times the expert's share by square-root attribution."""
    return layer_weights(scores, options)[:, None] * share_weights(np.sqrt(scores.expert))


def attribution_weights(scores: ChannelScores, options: PlannerOptions) -> np.ndarray:  # [L, E]
    """The attribution itself, floored inside its layer."""
    del options
    return scores.expert.sum(axis=1, keepdims=True) * share_weights(scores.expert)


def mass_weights(scores: ChannelScores, options: PlannerOptions) -> np.ndarray:  # [L, E]
    """The sum of the expert's own channel scores: coverage counts in units of the score."""
    del options
    return scores.channel.sum(axis=2)


def normalized_mass_weights(scores: ChannelScores, options: PlannerOptions) -> np.ndarray:  # [L, E]
    """The sum of the expert's channel scores over the layer's mean score."""
    return mass_weights(scores, options) * inverse_layer_mean(scores, options)


def equal_weights(scores: ChannelScores, options: PlannerOptions) -> np.ndarray:  # [L, E]
    """Weight 1 for every expert."""
    del options
    return np.ones_like(scores.expert)


def inverse_layer_mean(scores: ChannelScores, options: PlannerOptions) -> np.ndarray:  # [L, E]
    """One over the layer's mean channel score: the paper's normalisation for pooled channels."""
    del options
    mean = scores.channel.mean(axis=(1, 2))[:, None]  # [L, 1]
    inverse = np.divide(1.0, mean, out=np.ones_like(mean), where=mean > 0.0)
    return np.broadcast_to(inverse, scores.expert.shape)


WEIGHTS: dict[str, Weights] = {
    "paper": paper_weights,
    "attribution": attribution_weights,
    "mass": mass_weights,
    "normalized_mass": normalized_mass_weights,
    "equal": equal_weights,
}
