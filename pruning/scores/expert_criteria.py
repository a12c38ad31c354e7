"""Expert scores: one function of the statistics each, [L, E], higher is worth more."""

import re

import numpy as np

from moe_jax.errors import InputError, choose
from pruning.scores.channel_criteria import (
    Criterion,
    abs_taylor,
    collected,
    energy,
    fisher,
    shapley,
    weight_norm,
)
from pruning.scores.statistics import ChannelStatistics

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
    return collected(statistics, "clipped_phi", "expert-details") / statistics.total_tokens


def gate_gradient(statistics: ChannelStatistics) -> np.ndarray:  # [L, E]
    """First-order loss increase when the expert's output is scaled down; noisy at an optimum."""
    return -collected(statistics, "taylor", "gradients").sum(axis=2) / statistics.total_tokens


def family(b: float, alpha: float, beta: float) -> Criterion:
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
    mean = collected(statistics, "output_sum", "expert-details") / routed[:, :, None]
    square = (
        collected(statistics, "output_coordinate_square", "expert-details") / routed[:, :, None]
    )
    variance = np.maximum(square - np.square(mean), 0.0)
    return np.sqrt(variance.sum(axis=2)) * statistics.probability_mass / statistics.total_tokens


def _end_to_end(field: str) -> Criterion:
    """Loss increase per token without the expert, as measured by the sweep of that name."""
    flag = field.replace("_", "-")
    return lambda statistics: collected(statistics, field, flag) / statistics.total_tokens


def _per_token(field: str) -> Criterion:
    return lambda statistics: getattr(statistics, field) / statistics.total_tokens


def _channel_mass(criterion: Criterion) -> Criterion:
    return lambda statistics: criterion(statistics).sum(axis=2)


# `ala` is the paper's attribution in closed form (method 2(b)); `energy`, `shapley`, `abs_taylor`
# and `fisher` add up the channel score of that name.
EXPERT_CRITERIA: dict[str, Criterion] = {
    "ala": _per_token("phi"),
    "ala_clipped": clipped_attribution,
    "ala2": second_order,
    "self": _per_token("kappa"),
    "nll_grad": gate_gradient,
    "nll_grad2": _end_to_end("nll_grad2"),
    "nll_ig": _end_to_end("nll_ig"),
    "nll_ablate": _end_to_end("nll_ablate"),
    "usage": _per_token("tokens"),
    "router": _per_token("probability_mass"),
    "seer": _per_token("gate_mass"),
    "ean": _per_token("output_norm"),
    "reap": family(1, 1, 1),
    "man": family(1, 0, 1),
    "msan": family(1, 0, 2),
    "mone": mone,
    "energy": _channel_mass(energy),
    "shapley": _channel_mass(shapley),
    "abs_taylor": _channel_mass(abs_taylor),
    "fisher": _channel_mass(fisher),
    "aimer": aimer,
    "weight": _channel_mass(weight_norm),
    "uniform": lambda statistics: np.ones_like(statistics.phi),
}

# These need no calibration text.
DATA_FREE_EXPERTS = frozenset({"aimer", "weight", "uniform"})

_FAMILY = re.compile(r"S\(([\d.]+),([\d.]+),([\d.]+)\)")


def expert_criterion(name: str) -> Criterion:
    """The criterion of this name, or the member "S(b,alpha,beta)" of the norm family.

    Raises:
      InputError: the name is unknown, or the member's sums are not collected.
    """
    member = _FAMILY.fullmatch(name.replace(" ", ""))
    if member:
        return family(*map(float, member.groups()))
    return choose(EXPERT_CRITERIA, name, "attribution")
