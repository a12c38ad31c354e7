"""Channel scores: one function of the statistics each, non-negative, [L, E, F].

A new score is one function and one line of the registry, which a user's own code can add as well.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pruning.scores.statistics import ChannelStatistics


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A score of channels [L, E, F], non-negative, or of experts [L, E], of any sign.

    Attributes:
      score: statistics -> scores, float64; higher is worth more.
      needs: what has to be collected for it beyond the forward sums, a name of
        `pruning.scores.statistics.GROUPS`.
      whole_text: reads what only finished statistics have, so that parts of a text cannot be
        ranked by it.
      data_free: reads weights alone: every channel has a score whether or not a token ever reached
        its expert.
      chance: `score` takes a `seed` too. Such a score is a baseline, which nothing guards.
      about: what it is and where it comes from, one line.
    """

    score: Callable[..., np.ndarray]
    needs: str | None = None
    whole_text: bool = False
    data_free: bool = False
    chance: bool = False
    about: str = ""

    def __call__(self, statistics: "ChannelStatistics", seed: int = 0) -> np.ndarray:
        """The scores; raises InputError if what they are made of was not collected."""
        return self.score(statistics, seed=seed) if self.chance else self.score(statistics)


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
    return np.maximum(statistics["noise"], 0.0)


def energy(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Squared output that the channel adds, sum over tokens of q w^2 h^2 |v|^2, per token."""
    return statistics.energy / statistics.total_tokens


def amplitude(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Norm of what the channel adds to the residual stream, routing weight included."""
    return np.sqrt(statistics.weighted_square) * statistics.down_norm


def shapley(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """The channel's share of its expert's attribution per token, clamped at zero.

    That is sum over tokens of q w h <v, y> (see `ChannelStatistics`), which the sweep collects in
    `pruning.scores.expert_sums`.
    """
    return np.maximum(statistics.shapley, 0.0) / statistics.total_tokens


def taylor(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """|sum over tokens of h dL/dh| per token. Source: arXiv 1906.10771."""
    return np.abs(statistics["taylor"]) / statistics.total_tokens


def abs_taylor(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Sum over tokens of |h dL/dh| per token: no cancellation between tokens."""
    return statistics["abs_taylor"] / statistics.total_tokens


def fisher(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Sum over tokens of (h dL/dh)^2 per token."""
    return statistics["fisher"] / statistics.total_tokens


def saliency(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Mean over the three projections of |activation x its gradient|, per token.

    At the up projection that is |h dL/dh| once more, because h is linear in it.
    """
    hidden = statistics["abs_taylor"]
    gate = statistics["gate_saliency"]
    return (2.0 * hidden + gate) / (3.0 * statistics.total_tokens)


def heapr(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Mean of h^2 times v^T M v, M the second moment of the gradient at the expert's output.

    <v, dL/dz> is dL/dh, so that the form is the mean of (dL/dh)^2. Source: repository LLIKKE/HEAPr.
    """
    square = statistics["gradient_square"]
    routed = np.maximum(statistics.tokens, 1.0)[:, :, None]
    return statistics.hidden_square / routed * (square / routed)


def wanda(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Mean over the three projections of sum |W| x norm of its input. Source: arXiv 2306.11695."""
    down = statistics.down_l1 * np.sqrt(statistics.hidden_square)
    up = statistics["wanda_up"]
    return (down + up + statistics["wanda_gate"]) / 3.0


def moe_pruner(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """`wanda` with every token's inputs times the expert's routing weight for it.

    The paper removes single weights by |W_ij| |w x_j|, x the input of the matrix, which ranks
    weights of one output; that of a channel, which is removed as a whole, is the sum over its
    weights in a matrix, and the mean over the three. Source: arXiv 2410.12013.
    """
    down = statistics.down_l1 * np.sqrt(statistics.weighted_square)
    up = statistics["routed_wanda_up"]
    return (down + up + statistics["routed_wanda_gate"]) / 3.0


def weight_times_gradient(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """Mean over the three projections of sum |W dL/dW|, the gradient of the whole text."""
    return statistics["weight_gradient"] / 3.0


def surgeon(statistics: "ChannelStatistics") -> np.ndarray:  # [L, E, F]
    """What the expert's output loses with the channel when those kept make up for it, per token.

    Sources: Hassibi and Stork 1993; for layers, arXiv 2208.11580.
    """
    return statistics["elimination"] / statistics.total_tokens


def random_channels(statistics: "ChannelStatistics", *, seed: int = 0) -> np.ndarray:  # [L, E, F]
    """Independent uniform scores in (0, 1]: the baseline every criterion must beat."""
    return 1.0 - np.random.default_rng(seed).random(statistics.hidden_square.shape)


CHANNEL_CRITERIA: dict[str, Criterion] = {
    "act": Criterion(mean_norm, about="mean of three activation norms, arXiv 2606.18304"),
    "hidden": Criterion(hidden_norm, about="norm of the activation"),
    "weight": Criterion(weight_norm, data_free=True, about="norms of the weights, no data"),
    "noise": Criterion(
        noise, needs="weights-only", data_free=True, about="share of the output on noise, no data"
    ),
    "energy": Criterion(energy, about="squared gated output of the channel, ours"),
    "amp": Criterion(amplitude, about="gated output norm, ours"),
    "shapley": Criterion(shapley, about="the channel's share of the attribution, ours"),
    "taylor": Criterion(taylor, needs="gradients", about="|sum of h dL/dh|, arXiv 1906.10771"),
    "abs_taylor": Criterion(
        abs_taylor, needs="gradients", about="sum of |h dL/dh|, after arXiv 1906.10771"
    ),
    "fisher": Criterion(
        fisher, needs="gradients", about="sum of (h dL/dh)^2, after arXiv 1906.10771"
    ),
    "heapr": Criterion(
        heapr,
        needs="gradients",
        about="activation times output gradient, repository LLIKKE/HEAPr",
    ),
    "saliency": Criterion(
        saliency, needs="gradients", about="activation times gradient, arXiv 2606.18304"
    ),
    "wanda": Criterion(
        wanda,
        needs="expert-details",
        whole_text=True,
        about="weights times input norm, arXiv 2306.11695",
    ),
    "moe_pruner": Criterion(
        moe_pruner,
        needs="expert-details",
        whole_text=True,
        about="weights times routed input norm, after arXiv 2410.12013",
    ),
    "wg": Criterion(
        weight_times_gradient,
        needs="weight-gradients",
        whole_text=True,
        about="weight times weight gradient",
    ),
    "obs": Criterion(
        surgeon,
        needs="obs",
        whole_text=True,
        about="energy lost beyond what others take over, after arXiv 2208.11580",
    ),
    "random": Criterion(
        random_channels, data_free=True, chance=True, about="chance, which every score must beat"
    ),
}
