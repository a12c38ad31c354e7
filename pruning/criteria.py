"""From statistics to scores: what a channel, an expert and a layer are worth.

A criterion is one function of `ChannelStatistics`. Scores are non-negative and live in float64,
because a float32 prefix sum over 1e5 channels loses the digits that decide a tie.
"""

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import flax.struct
import numpy as np

if TYPE_CHECKING:
    from pruning.statistics import ChannelStatistics

Criterion = Callable[["ChannelStatistics"], np.ndarray]
Entry = TypeVar("Entry")

# Scale of the expert outputs at which the paper differentiates its reconstruction loss.
LOCAL_SCALE = 0.9


@flax.struct.dataclass
class ChannelScores:
    """What a planner reads; non-negative float64 throughout.

    `channel` ranks channels, inside an expert and pooled; `expert` is the attribution clamped at
    zero; `layer` is the raw layer loss, before any smoothing.
    """

    channel: np.ndarray  # [L, E, F]
    expert: np.ndarray  # [L, E]
    layer: np.ndarray  # [L]


def choose(registry: Mapping[str, Entry], name: str, what: str) -> Entry:
    """Look a name up in a registry.

    Args:
      registry: names to entries.
      name: what the user asked for.
      what: the parameter's name, for the message.

    Returns:
      The entry.

    Raises:
      ValueError: the name is unknown; the message has the nearest match and all names.
    """
    if name in registry:
        return registry[name]
    near = difflib.get_close_matches(str(name), registry, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{what}={name!r} is unknown; {hint}choose one of: {', '.join(registry)}")


def mean_norm(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Mean of the three L2 norms over routed tokens: down input, up output, gate output.

    Source: the default channel metric of arXiv 2606.18304. The three norms are not commensurate
    (the gate is taken before its nonlinearity); that is the paper's definition.
    """
    hidden, up = np.sqrt(statistics.hidden_square), np.sqrt(statistics.up_square)
    return (hidden + up + np.sqrt(statistics.gate_square)) / 3.0


def hidden_norm(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """L2 norm over routed tokens of the expert's intermediate channel."""
    return np.sqrt(statistics.hidden_square)


def weight_norm(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Mean L2 norm of the channel's down column, up row and gate row; needs no data."""
    return (statistics.down_norm + statistics.up_norm + statistics.gate_norm) / 3.0


def energy(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Squared output the channel contributes, routing weight included, per token."""
    return statistics.energy / statistics.total_tokens


def amplitude(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Norm of what the channel adds to the residual stream, routing weight included."""
    return np.sqrt(statistics.weighted_square) * statistics.down_norm


def shapley(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """The channel's share of its expert's attribution per token, clamped at zero."""
    return np.maximum(statistics.shapley, 0.0) / statistics.total_tokens


def taylor(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """|sum over tokens of h dL/dh| per token. Source: arXiv 1906.10771."""
    return np.abs(_gradient_sum(statistics, "taylor")) / statistics.total_tokens


def abs_taylor(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Sum over tokens of |h dL/dh| per token: no cancellation between tokens."""
    return _gradient_sum(statistics, "abs_taylor") / statistics.total_tokens


def fisher(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Sum over tokens of (h dL/dh)^2 per token."""
    return _gradient_sum(statistics, "fisher") / statistics.total_tokens


def random_channels(statistics: "ChannelStatistics", *, seed: int = 0) -> np.ndarray:  # [L, E, F]
    """Independent uniform scores in (0, 1]: the baseline every criterion must beat."""
    return 1.0 - np.random.default_rng(seed).random(statistics.hidden_square.shape)


CHANNEL_CRITERIA: dict[str, Criterion] = {
    "act": mean_norm,
    "hidden": hidden_norm,
    "weight": weight_norm,
    "energy": energy,
    "amp": amplitude,
    "shapley": shapley,
    "taylor": taylor,
    "abs_taylor": abs_taylor,
    "fisher": fisher,
    "random": random_channels,
}

# These score every channel whether or not a token ever reached its expert.
DATA_FREE = frozenset({"weight", "random"})


def second_order(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E]
    """True local loss of removing the expert from the model scaled by `LOCAL_SCALE`."""
    a = LOCAL_SCALE
    sums = 2.0 * a * (1.0 - a) * statistics.phi + a * a * statistics.kappa
    return sums / statistics.total_tokens


def gate_gradient(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E]
    """First-order loss increase when the expert's output is scaled down; noisy at an optimum."""
    return -_gradient_sum(statistics, "taylor").sum(axis=2) / statistics.total_tokens


def _per_token(field: str) -> Criterion:
    return lambda statistics: getattr(statistics, field) / statistics.total_tokens


def _per_routed_token(field: str) -> Criterion:
    # A never-routed expert has a zero numerator; dividing by 1 keeps it at 0.
    return lambda statistics: getattr(statistics, field) / np.maximum(statistics.tokens, 1.0)


def _channel_mass(criterion: Criterion) -> Criterion:
    return lambda statistics: criterion(statistics).sum(axis=2)


# Higher is worth more. `ala` is the paper's attribution in closed form (method 2(b)); `energy`,
# `abs_taylor` and `fisher` add up the channel score of that name.
EXPERT_CRITERIA: dict[str, Criterion] = {
    "ala": _per_token("phi"),
    "ala2": second_order,
    "self": _per_token("kappa"),
    "usage": _per_token("tokens"),
    "router": _per_token("gate_mass"),
    "ean": _per_token("output_norm"),
    "reap": _per_routed_token("weighted_output_norm"),
    "man": _per_routed_token("output_norm"),
    "msan": _per_routed_token("output_square"),
    "energy": _channel_mass(energy),
    "abs_taylor": _channel_mass(abs_taylor),
    "fisher": _channel_mass(fisher),
    "gate_gradient": gate_gradient,
    "uniform": lambda statistics: np.ones_like(statistics.phi),
}


def channel_scores(
    statistics: "ChannelStatistics",
    *,
    criterion: str = "act",
    attribution: str = "ala",
    seed: int = 0,
) -> ChannelScores:
    """Score channels, experts and layers from the sums of one sweep.

    A channel one of whose three weight vectors is zero computes nothing and scores exactly 0. An
    expert without any score (never routed, or all its channels clamped at 0) is ranked by
    `weight` instead, scaled below every positive score of the model: coverage, being a ratio
    inside the expert, does not see the scale, and a pooled ranking puts the expert last.

    Args:
      statistics: sums over the calibration tokens.
      criterion: a name of `CHANNEL_CRITERIA`.
      attribution: a name of `EXPERT_CRITERIA`; negative values count as 0.
      seed: only read by criterion "random".

    Returns:
      Scores; `layer` is the mean relative energy of the layer's routed output, which is the
      paper's layer loss up to a constant factor.

    Raises:
      ValueError: a name is unknown, the statistics lack gradients or tokens, or a score is not
        finite.
    """
    score = choose(CHANNEL_CRITERIA, criterion, "criterion")
    attribute = choose(EXPERT_CRITERIA, attribution, "attribution")
    if criterion == "random":
        score = functools.partial(random_channels, seed=seed)
    if not statistics.total_tokens > 0:
        raise ValueError(
            f"total_tokens={statistics.total_tokens} must be positive; collect statistics on text"
        )
    channel = np.where(_dead(statistics), 0.0, score(statistics))
    if criterion not in DATA_FREE:
        channel = _rank_unscored_by_weight(channel, statistics)
    scores = ChannelScores(
        channel=channel,
        expert=np.maximum(attribute(statistics), 0.0),
        layer=statistics.layer_energy / statistics.total_tokens,
    )
    _check_finite(scores)
    return scores


def _dead(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    norms = (statistics.down_norm, statistics.up_norm, statistics.gate_norm)
    return functools.reduce(np.logical_or, (norm == 0.0 for norm in norms))


def _rank_unscored_by_weight(
    channel: np.ndarray,  # [L, E, F]
    statistics: "ChannelStatistics",
) -> np.ndarray:  # [L, E, F]
    unscored = ~channel.any(axis=2)  # [L, E]
    if not unscored.any():
        return channel
    weight = np.where(_dead(statistics), 0.0, weight_norm(statistics))[unscored]  # [U, F]
    if not weight.any():
        return channel
    least = channel.min(where=channel > 0.0, initial=np.inf)
    # Not below 1e-200, so that no weight underflows to a zero score.
    ceiling = max(0.5 * least, 1e-200) if np.isfinite(least) else 1.0
    channel[unscored] = weight * (ceiling / weight.max())
    return channel


def _gradient_sum(statistics: "ChannelStatistics", name: str) -> np.ndarray:  # [L, E, F]
    if not statistics.has_gradients:
        raise ValueError(
            f"{name!r} needs gradients, but these statistics were collected without them; "
            "score the model again with gradients (--gradients) or choose e.g. 'act'"
        )
    return getattr(statistics, name)


def _check_finite(scores: ChannelScores) -> None:
    for name in ("channel", "expert", "layer"):
        finite = np.isfinite(getattr(scores, name))
        if not finite.all():
            where = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise ValueError(
                f"{name} score at {where} (layer, expert, channel) is not finite; "
                "check the checkpoint and the calibration text, then collect statistics again"
            )
