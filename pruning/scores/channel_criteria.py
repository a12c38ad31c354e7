"""Channel scores: one function of the statistics each, non-negative, [L, E, F].

A new score is one function and one line of the registry.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from moe_jax.errors import InputError

if TYPE_CHECKING:
    from pruning.scores.statistics import ChannelStatistics

Criterion = Callable[["ChannelStatistics"], np.ndarray]


def collected(statistics: "ChannelStatistics", name: str, group: str) -> np.ndarray:
    """A field of the statistics that is there only if its group was asked for.

    Raises:
      InputError: it was not collected; names the flag that collects it.
    """
    value = getattr(statistics, name)
    if value is None:
        raise InputError(
            f"{name!r} was not collected in these statistics; score the model again with --{group} "
            "or choose a criterion that needs none, e.g. 'weight'"
        )
    return value


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


def noise(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """The channel's share of its expert's output on noise, clamped at zero; needs no data."""
    return np.maximum(collected(statistics, "noise", "weights-only"), 0.0)


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
    return np.abs(collected(statistics, "taylor", "gradients")) / statistics.total_tokens


def abs_taylor(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Sum over tokens of |h dL/dh| per token: no cancellation between tokens."""
    return collected(statistics, "abs_taylor", "gradients") / statistics.total_tokens


def fisher(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Sum over tokens of (h dL/dh)^2 per token."""
    return collected(statistics, "fisher", "gradients") / statistics.total_tokens


def saliency(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Mean over the three projections of |activation x its gradient|, per token.

    At the up projection that is |h dL/dh| once more, because h is linear in it.
    """
    hidden = collected(statistics, "abs_taylor", "gradients")
    gate = collected(statistics, "gate_saliency", "gradients")
    return (2.0 * hidden + gate) / (3.0 * statistics.total_tokens)


def heapr(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Mean of h^2 times v^T M v, M the second moment of the gradient at the expert's output.

    <v, dL/dz> is dL/dh, so that the form is the mean of (dL/dh)^2. Source: repository LLIKKE/HEAPr.
    """
    square = collected(statistics, "gradient_square", "gradients")
    routed = np.maximum(statistics.tokens, 1.0)[:, :, None]
    return statistics.hidden_square / routed * (square / routed)


def wanda(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Mean over the three projections of sum |W| x norm of its input. Source: arXiv 2306.11695."""
    down = statistics.down_l1 * np.sqrt(statistics.hidden_square)
    up = collected(statistics, "wanda_up", "expert-details")
    return (down + up + collected(statistics, "wanda_gate", "expert-details")) / 3.0


def weight_times_gradient(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Mean over the three projections of sum |W dL/dW|, the gradient of the whole text."""
    return collected(statistics, "weight_gradient", "weight-gradients") / 3.0


def random_channels(statistics: "ChannelStatistics", *, seed: int = 0) -> np.ndarray:  # [L, E, F]
    """Independent uniform scores in (0, 1]: the baseline every criterion must beat."""
    return 1.0 - np.random.default_rng(seed).random(statistics.hidden_square.shape)


CHANNEL_CRITERIA: dict[str, Criterion] = {
    "act": mean_norm,
    "hidden": hidden_norm,
    "weight": weight_norm,
    "noise": noise,
    "energy": energy,
    "amp": amplitude,
    "shapley": shapley,
    "taylor": taylor,
    "abs_taylor": abs_taylor,
    "fisher": fisher,
    "heapr": heapr,
    "saliency": saliency,
    "wanda": wanda,
    "wg": weight_times_gradient,
    "random": random_channels,
}

# These need no text: they score every channel whether or not a token ever reached its expert.
DATA_FREE = frozenset({"noise", "weight", "random"})
