"""Expert scores: one function of the statistics each, [L, E], higher is worth more."""

import re
from collections.abc import Callable

import numpy as np

from moe_jax.errors import InputError, choose
from pruning.scores.channel_criteria import (
    Criterion,
    abs_taylor,
    energy,
    fisher,
    shapley,
    weight_norm,
)
from pruning.scores.statistics import ChannelStatistics

Score = Callable[[ChannelStatistics], np.ndarray]

# Scale of the expert outputs at which the paper differentiates its reconstruction loss.
LOCAL_SCALE = 0.9


def second_order(statistics: ChannelStatistics) -> np.ndarray:  # [L, E]
    """True local loss of removing the expert from the model scaled by `LOCAL_SCALE`."""
    a = LOCAL_SCALE
    sums = 2.0 * a * (1.0 - a) * statistics.phi + a * a * statistics.kappa
    return sums / statistics.total_tokens


def clipped_attribution(statistics: ChannelStatistics) -> np.ndarray:  # [L, E]
    """`ala` with the largest 1 % of each coordinate clipped, as the paper's release does.

    It forgets experts that matter on few tokens, and depends on the batches.
    """
    return statistics["clipped_phi"] / statistics.total_tokens


def gate_gradient(statistics: ChannelStatistics) -> np.ndarray:  # [L, E]
    """First-order loss increase when the expert's output is scaled down; noisy at an optimum."""
    return -statistics["taylor"].sum(axis=2) / statistics.total_tokens


def family(b: float, alpha: float, beta: float) -> Score:
    """S(b, alpha, beta) = n^-b sum over routed tokens of w^alpha |z|^beta, n the routed tokens.

    Raises:
      InputError: this pair (alpha, beta) is not collected.

    Source: arXiv 2606.15716.
    """
    fields: dict[tuple[float, float], str] = {
        (0, 0): "tokens", (1, 0): "gate_mass", (0, 1): "output_norm", (0, 2): "output_square",
        (1, 1): "weighted_output_norm", (1, 2): "weighted_output_square",
    }  # fmt: skip
    if (alpha, beta) not in fields:
        raise InputError(
            f"S({b:g},{alpha:g},{beta:g}): (alpha, beta) must be one of {sorted(fields)}"
        )
    field = fields[alpha, beta]
    # A never-routed expert has a zero numerator; dividing by 1 keeps it at 0.
    return lambda statistics: getattr(statistics, field) / np.maximum(statistics.tokens, 1.0) ** b


def aimer(statistics: ChannelStatistics) -> np.ndarray:  # [L, E]
    """rms over mean magnitude of the expert's weights, no data. Source: arXiv 2603.18492.

    The paper removes the experts of highest mean / rms; a width in the weights' own unit cancels.
    """
    weights = [
        (statistics.down_norm, statistics.down_l1),
        (statistics.up_norm, statistics.up_l1),
        (statistics.gate_norm, statistics.gate_l1),
    ]
    square = sum(np.square(norm).sum(axis=2) for norm, _ in weights)
    mass = sum(mass.sum(axis=2) for _, mass in weights)
    return np.sqrt(square) / np.where(mass > 0.0, mass, 1.0)


def mone(statistics: ChannelStatistics) -> np.ndarray:  # [L, E]
    """Norm of the outputs' standard deviation times the mean routing score.

    An expert with a nearly constant output can be replaced by that constant.
    Source: arXiv 2507.00390.
    """
    routed = np.maximum(statistics.tokens, 1.0)
    mean = statistics["output_sum"] / routed[:, :, None]
    square = statistics["output_coordinate_square"] / routed[:, :, None]
    variance = np.maximum(square - np.square(mean), 0.0)
    return np.sqrt(variance.sum(axis=2)) * statistics.probability_mass / statistics.total_tokens


def _per_token(field: str) -> Score:
    return lambda statistics: statistics[field] / statistics.total_tokens


def _channel_mass(criterion: Score) -> Score:
    return lambda statistics: criterion(statistics).sum(axis=2)


def _end_to_end(field: str, about: str) -> Criterion:
    """Loss increase per token without the expert, as measured by the sweep of that name."""
    flag = field.replace("_", "-")
    return Criterion(_per_token(field), needs=flag, whole_text=True, about=about)


# `ala` is the paper's attribution in closed form (method 2(b)); `energy`, `shapley`, `abs_taylor`
# and `fisher` add up the channel score of that name.
EXPERT_CRITERIA: dict[str, Criterion] = {
    "ala": Criterion(_per_token("phi"), about="attribution, arXiv 2606.18304"),
    "ala_clipped": Criterion(
        clipped_attribution,
        needs="expert-details",
        about="attribution with 1 % clipped, as released",
    ),
    "ala2": Criterion(second_order, about="local loss without the expert, exact to second order"),
    "self": Criterion(_per_token("kappa"), about="squared output share, no interaction"),
    "nll_grad": Criterion(
        gate_gradient, needs="gradients", about="end-to-end loss without the expert, first order"
    ),
    "nll_grad2": _end_to_end("nll_grad2", "end-to-end loss without the expert, second order"),
    "nll_ig": _end_to_end("nll_ig", "end-to-end loss without the expert, integrated gradients"),
    "nll_ablate": _end_to_end("nll_ablate", "end-to-end loss without the expert, exact"),
    "usage": Criterion(_per_token("tokens"), about="routed tokens"),
    "router": Criterion(_per_token("probability_mass"), about="mean router probability"),
    "seer": Criterion(_per_token("gate_mass"), about="summed routing weight, arXiv 2606.15716"),
    "ean": Criterion(_per_token("output_norm"), about="summed output norm, arXiv 2606.15716"),
    "reap": Criterion(family(1, 1, 1), about="mean weighted output norm, arXiv 2510.13999"),
    "man": Criterion(family(1, 0, 1), about="mean output norm, arXiv 2606.15716"),
    "msan": Criterion(family(1, 0, 2), about="mean squared output norm, arXiv 2606.15716"),
    "mone": Criterion(
        mone,
        needs="expert-details",
        about="spread of the output times routing score, arXiv 2507.00390",
    ),
    "energy": Criterion(_channel_mass(energy), about="sum of the channels' energy"),
    "shapley": Criterion(_channel_mass(shapley), about="sum of the channels' shapley"),
    "abs_taylor": Criterion(
        _channel_mass(abs_taylor), needs="gradients", about="sum of the channels' abs_taylor"
    ),
    "fisher": Criterion(
        _channel_mass(fisher), needs="gradients", about="sum of the channels' fisher"
    ),
    "aimer": Criterion(
        aimer, data_free=True, about="rms over mean weight, no data, arXiv 2603.18492"
    ),
    "weight": Criterion(
        _channel_mass(weight_norm), data_free=True, about="sum of the channels' weight norms"
    ),
    "uniform": Criterion(
        lambda statistics: np.ones_like(statistics.phi), data_free=True, about="all alike"
    ),
}

_FAMILY = re.compile(r"S\(([\d.]+),([\d.]+),([\d.]+)\)")


def expert_criterion(name: str) -> Criterion:
    """The criterion of this name, or the member "S(b,alpha,beta)" of the norm family.

    Raises:
      InputError: the name is unknown, or the member's sums are not collected.
    """
    member = _FAMILY.fullmatch(name.replace(" ", ""))
    if member:
        return Criterion(family(*map(float, member.groups())))
    return choose(EXPERT_CRITERIA, name, "attribution")
