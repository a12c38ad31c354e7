"""How much each expert and each layer counts in an objective, and the options that decide it."""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import numpy as np

from moe_jax.errors import InputError, choose
from pruning.recipe.group import About, Options, about
from pruning.recipe.options import LayerLoss, PlanOptions, fields_of
from pruning.recipe.values import check_share
from pruning.scores.criteria import ChannelScores

# Smallest weight of an expert, as a share of the layer's mean weight.
WEIGHT_FLOOR = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannerOptions(Options):
    """Fine print of a planner; the defaults are the paper's.

    What `PlanOptions` says under the same names, and what only Python can say: `layer_weights`,
    one positive weight per layer instead of the smoothed loss, for example a prior from
    `pruning.budget.clusters`; and `loss_scale`, which only the logarithmic smoothings see: 0.01
    times the tokens per sequence gives the unit of the paper's figures.

    Raises:
      InputError: a name is unknown or a number out of range.
    """

    rho_max: Annotated[float, about(PlanOptions, "rho_max")] = 1.0
    weights: Annotated[str | None, about(PlanOptions, "weights")] = None
    smoothing: Annotated[str, about(PlanOptions, "smoothing")] = "sqrt"
    passes: Annotated[int, about(PlanOptions, "passes")] = 1
    layer_loss: Annotated[LayerLoss, about(PlanOptions, "layer_loss")] = "energy"
    loss_scale: Annotated[float, About("factor on the layer loss")] = 1.0
    layer_weights: Annotated[
        tuple[float, ...] | None, About("of each layer, instead of its smoothed loss")
    ] = None

    def check(self) -> None:
        """Raise InputError if a name is unknown or a number out of range."""
        check_share("rho_max", self.rho_max, "the paper uses 1")
        if self.weights is not None:
            choose(IMPORTANCE, self.weights, "weights")
        choose(SMOOTHINGS, self.smoothing, "smoothing")
        if not 0.0 < self.loss_scale < np.inf:
            raise InputError(f"loss_scale={self.loss_scale} must be positive and finite")
        given = np.array(() if self.layer_weights is None else self.layer_weights)
        if not (np.isfinite(given) & (given > 0.0)).all():
            raise InputError(f"layer_weights={self.layer_weights} must be positive and finite")

    @classmethod
    def of(cls, options: PlanOptions) -> "PlannerOptions":
        """The fine print in the options of a plan."""
        shared = set(fields_of(PlanOptions)) & set(fields_of(cls))
        return cls(**{name: getattr(options, name) for name in shared})


def huber_tail(loss: np.ndarray) -> np.ndarray:  # [L] -> [L]
    """Losses above mean + half a deviation grow like a root, those below are left as they are.

    The value is the root of twice the Huber loss: continuous with slope 1 where the two meet.
    """
    delta = loss.mean() + 0.5 * loss.std(ddof=1)
    return np.where(loss <= delta, loss, np.sqrt(delta * np.maximum(2.0 * loss - delta, 0.0)))


def clip_to_spread(loss: np.ndarray, deviations: float) -> np.ndarray:  # [L] -> [L]
    """Clip to mean +- this many sample standard deviations."""
    spread = deviations * loss.std(ddof=1)
    return np.clip(loss, loss.mean() - spread, loss.mean() + spread)


# Every entry is non-decreasing and maps non-negative losses to non-negative ones.
SMOOTHINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sqrt": np.sqrt,
    "identity": lambda loss: loss,
    "power0.25": lambda loss: loss**0.25,
    "power0.75": lambda loss: loss**0.75,
    "log5": lambda loss: np.log1p(5.0 * loss),
    "log20": lambda loss: np.log1p(20.0 * loss),
    "clip": lambda loss: clip_to_spread(loss, 0.5),
    "huber": huber_tail,
}


def smooth_layer_loss(
    loss: np.ndarray,  # [L]
    how: str = "sqrt",
    passes: int = 1,
) -> np.ndarray:  # [L]
    """Compress the spread of the layer losses, so that no layer takes the whole budget.

    One pass applies the function, then clips to mean +- one sample standard deviation.

    Args:
      loss: non-negative loss per layer; its unit matters for the logarithms only.
      how: a name of `SMOOTHINGS`.
      passes: how often; 0 only normalises. The paper's curve is one pass, its release does four.

    Returns:
      Layer weights with mean 1; all ones when the losses do not differ.

    Raises:
      InputError: the name is unknown or passes is negative.

    Source: arXiv 2606.18304, section 4.2.
    """
    if passes < 0:
        raise InputError(f"passes={passes} must be 0 or more; the paper uses 1")
    compress = choose(SMOOTHINGS, how, "smoothing")
    loss = np.asarray(loss, np.float64)
    if loss.size < 2 or np.ptp(loss) == 0.0:
        return np.ones_like(loss)
    for _ in range(passes):
        loss = clip_to_spread(compress(loss), 1.0)
    return loss / loss.mean()


Importance = Callable[[ChannelScores, PlannerOptions], np.ndarray]


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


IMPORTANCE: dict[str, Importance] = {
    "paper": paper_weights,
    "attribution": attribution_weights,
    "mass": mass_weights,
    "normalized_mass": normalized_mass_weights,
    "equal": equal_weights,
}

DEFAULTS = PlannerOptions()
