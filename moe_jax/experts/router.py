"""From router logits to chosen experts and their weights."""

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.config import MoEConfig, Score

# Keeps 0 / 0 out of renormalisation where every selected score underflowed.
TINY = 1e-20
SCORE_ROUNDING = 4 * 2.0**-23  # of a score in float32, relative


def router_scores(logits: Array, score: Score) -> Array:  # [T, E] -> [T, E]
    """Scores in (0, 1), 0 at a logit of -inf; they sum to one over experts for "softmax" only."""
    if score == "sigmoid":
        return jax.nn.sigmoid(logits)
    # The softmax of a row without any expert would be 0 / 0.
    return jnp.where(logits == -jnp.inf, 0.0, jax.nn.softmax(logits, axis=-1))


def router_probability(logits: Array, score: Score) -> Array:  # [T, E] -> [T, E]
    """Scores divided by their sum over experts."""
    scores = router_scores(logits, score)
    return scores / (scores.sum(axis=-1, keepdims=True) + TINY)


def limit_to_groups(choice: Array, config: MoEConfig) -> Array:
    """Rule out the experts of all but a token's best groups.

    Args:
      choice: float32 [T, E], what experts are selected by; -inf for those that are not there.
      config: its groups.

    Returns:
      [T, E], -inf in the other groups.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.2.2 (max); DeepSeek-V3, arXiv:2412.19437,
    section 2.1.2 (top2).
    """
    grouped = choice.reshape(len(choice), config.num_groups, -1)
    best = 1 if config.group_score == "max" else 2
    leaders = jax.lax.top_k(grouped, best)[0]  # [T, groups, best]
    rating = jnp.where(leaders == -jnp.inf, 0.0, leaders).sum(axis=-1)  # [T, groups]
    rating = jnp.where(leaders[..., 0] == -jnp.inf, -jnp.inf, rating)
    chosen = jax.lax.top_k(rating, config.groups_per_token)[1]
    allowed = jax.nn.one_hot(chosen, config.num_groups, dtype=bool).any(axis=1)
    return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(choice.shape)


def route(
    logits: Array, config: MoEConfig, bias: Array | None = None, expert: Array | None = None
) -> tuple[Array, Array]:
    """Choose experts by score.

    Args:
      logits: float32 [T, E]; experts at -inf are chosen last, with weight 0.
      config: how scores, groups and weights are made.
      bias: float32 [E], added to the scores for the selection alone.
      expert: int32 [T, k], a choice made before, which is only weighed again.

    Returns:
      (weight float32 [T, k], expert int32 [T, k]), best first; ties go to the lower index.
    """
    scores = router_scores(logits, config.score)
    if expert is None:
        expert = _best(_choice(logits, config, bias), config)
    weight = jnp.take_along_axis(scores, expert, axis=-1)
    if config.renormalize:
        weight /= weight.sum(axis=-1, keepdims=True) + TINY
    return weight * config.routed_scale, expert


def is_settled(logits: Array, config: MoEConfig, change: Array, bias: Array | None = None) -> Array:
    """Whether a token's experts stay the same however rounding changes its logits and scores.

    Args:
      logits: float32 [T, E].
      config: how scores, groups and weights are made.
      change: float32 [T], how far each logit may move; scores move by `SCORE_ROUNDING` besides.
      bias: float32 [E], added to the scores for the selection alone.

    Returns:
      bool [T]; False for a token near a tie, be it between groups that no expert is taken from.
    """

    def choice(sign: Array) -> Array:  # [T, E] -> [T, E]
        moved = logits + sign * change[:, None]
        value = _choice(moved, config, bias)
        rounding = SCORE_ROUNDING * (router_scores(moved, config.score) + jnp.abs(value))
        return jnp.where(value == -jnp.inf, value, value + sign * rounding)

    def stays(selected) -> Array:
        # The worst change: all that is selected loses, all else gains.
        before = selected(choice(jnp.zeros_like(logits)))
        return (before == selected(choice(jnp.where(before, -1.0, 1.0)))).all(axis=-1)

    def experts(choice: Array) -> Array:  # [T, E] -> bool [T, E]
        return jax.nn.one_hot(_best(choice, config), config.num_experts, dtype=bool).any(axis=1)

    def groups(choice: Array) -> Array:  # [T, E] -> bool [T, E]
        return limit_to_groups(choice, config) > -jnp.inf

    return stays(experts) & stays(groups) if config.num_groups > 1 else stays(experts)


def _choice(logits: Array, config: MoEConfig, bias: Array | None) -> Array:
    """What experts are selected by, [T, E], before groups."""
    scores = router_scores(logits, config.score)
    choice = scores if bias is None else scores + bias[None]
    return jnp.where(logits == -jnp.inf, -jnp.inf, choice)  # a bias must not bring it back


def _best(choice: Array, config: MoEConfig) -> Array:
    """The selected experts, int32 [T, k], best first."""
    if config.num_groups > 1:
        choice = limit_to_groups(choice, config)
    return jax.lax.top_k(choice, config.experts_per_token)[1]
