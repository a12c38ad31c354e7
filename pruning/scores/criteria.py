"""From statistics to scores: what a channel, an expert and a layer are worth.

A criterion is one function of `ChannelStatistics`. Scores are non-negative and live in float64,
because a float32 prefix sum over 1e5 channels loses the digits that decide a tie.
"""

import functools
from collections.abc import Mapping

import flax.struct
import numpy as np

from moe_jax.errors import InputError, choose
from pruning.scores.channel_criteria import CHANNEL_CRITERIA, Criterion, weight_norm
from pruning.scores.expert_criteria import EXPERT_CRITERIA, expert_criterion
from pruning.scores.statistics import ChannelStatistics


@flax.struct.dataclass
class ChannelScores:
    """What a planner reads; non-negative float64 throughout.

    `channel` ranks channels, inside an expert and pooled; `expert` is the attribution clamped at
    zero; `layer` is the raw layer loss, before any smoothing; `layer_nll`, which needs `nll_ig`,
    the end-to-end loss of the layer's experts together, clamped at zero.
    """

    channel: np.ndarray  # [L, E, F]
    expert: np.ndarray  # [L, E]
    layer: np.ndarray  # [L]
    layer_nll: np.ndarray | None = None  # [L]


def channel_scores(
    statistics: ChannelStatistics,
    *,
    criterion: str = "shapley",
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
      attribution: a name of `EXPERT_CRITERIA` or "S(b,alpha,beta)"; negative values count as 0.
      seed: only read by scores of chance, such as "random".

    Returns:
      Scores; `layer` is the mean relative energy of the layer's routed output, which is the
      paper's layer loss up to a constant factor.

    Raises:
      InputError: a name is unknown, the statistics lack gradients or tokens, or a score is not
        finite.
    """
    score = choose(CHANNEL_CRITERIA, criterion, "criterion")
    attribute = expert_criterion(attribution)
    layer = statistics.layer_energy / np.maximum(statistics.total_tokens, 1.0)
    if not statistics.total_tokens > 0:
        if not (score.data_free and attribute.data_free):
            raise InputError(
                f"total_tokens={statistics.total_tokens} must be positive for criterion "
                f"{criterion!r} with attribution {attribution!r}; collect statistics on text, or "
                f"use {_data_free(CHANNEL_CRITERIA)} with {_data_free(EXPERT_CRITERIA)}"
            )
        layer = np.ones_like(layer)  # nothing without text says how much a layer adds
    channel = np.where(_dead(statistics), 0.0, score(statistics, seed))
    scores = ChannelScores(
        channel=_rank_unscored_by_weight(channel, statistics),
        expert=np.maximum(attribute(statistics, seed), 0.0),
        layer=layer,
        layer_nll=_layer_nll(statistics),
    )
    _check_finite(scores)
    return scores


def require_data_free(criterion: str, attribution: str) -> None:
    """Raise InputError unless weights alone give both scores; names those that do."""
    for name, value, entry, known in (
        ("criterion", criterion, choose(CHANNEL_CRITERIA, criterion, "criterion"),
         CHANNEL_CRITERIA),
        ("attribution", attribution, expert_criterion(attribution), EXPERT_CRITERIA),
    ):  # fmt: skip
        if not entry.data_free:
            raise InputError(
                f"{name}={value!r} needs calibration text, weights_only reads none; choose among "
                f"{_data_free(known)}, or give --calibration instead of --weights-only"
            )


def _data_free(registry: Mapping[str, Criterion]) -> str:
    return ", ".join(sorted(name for name, entry in registry.items() if entry.data_free))


def _layer_nll(statistics: ChannelStatistics) -> np.ndarray | None:  # [L]
    if statistics.nll_ig is None:
        return None
    return np.maximum(statistics.nll_ig.sum(axis=1), 0.0) / statistics.total_tokens


def _dead(statistics: ChannelStatistics) -> np.ndarray:  # [L, E, F]
    norms = (statistics.down_norm, statistics.up_norm, statistics.gate_norm)
    return functools.reduce(np.logical_or, (norm == 0.0 for norm in norms))


def _rank_unscored_by_weight(
    channel: np.ndarray,  # [L, E, F]
    statistics: ChannelStatistics,
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


def _check_finite(scores: ChannelScores) -> None:
    for name in ("channel", "expert", "layer"):
        finite = np.isfinite(getattr(scores, name))
        if not finite.all():
            where = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise InputError(
                f"{name} score at {where} (layer, expert, channel) is not finite; "
                "check the checkpoint and the calibration text, then collect statistics again"
            )
