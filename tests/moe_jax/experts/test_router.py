"""Routing rules against plain Python, expert by expert."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_jax.config import MoEConfig
from moe_jax.experts.router import route, router_probability

SIZES = {"num_experts": 12, "experts_per_token": 3, "d_expert": 4}
RULES = {
    "softmax": MoEConfig(**SIZES, renormalize=False, routed_scale=2.0),
    "best expert of a group": MoEConfig(
        **SIZES, renormalize=False, num_groups=4, groups_per_token=2
    ),
    "two best of a group, biased sigmoid": MoEConfig(
        **SIZES, renormalize=True, score="sigmoid", correction_bias=True, num_groups=3,
        groups_per_token=1, group_score="top2", routed_scale=1.5,
    ),
}  # fmt: skip


def plain_route(logits: list[float], bias: list[float], config: MoEConfig) -> dict[int, float]:
    """Expert -> weight of one token; ties go to the lower index, among groups too."""
    if config.score == "softmax":
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    choice = [float(np.float32(s) + np.float32(b)) for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // config.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.num_groups)]
    best = 1 if config.group_score == "max" else 2
    rated = sorted(groups, key=lambda g: -sum(sorted((choice[e] for e in g), reverse=True)[:best]))
    allowed = sorted(e for group in rated[: config.groups_per_token] for e in group)
    chosen = sorted(allowed, key=lambda e: -choice[e])[: config.experts_per_token]
    total = sum(scores[e] for e in chosen) if config.renormalize else 1.0
    return {e: config.routed_scale * scores[e] / total for e in chosen}


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=50)  # the first example compiles
@given(st.data())
def test_experts_and_weights_equal_those_of_plain_python(rule, data):
    config = RULES[rule]
    # Eighths are far enough apart that rounding reorders none, and often tie. Of one sign, as
    # sigmoid(x) + sigmoid(-x) = 1 would make groups tie but for rounding.
    eighths = hnp.arrays(np.int32, (2, 12), elements=st.integers(1, 24))
    logits = data.draw(eighths).astype(np.float32) / 8
    bias = np.zeros(12, np.float32)
    if config.correction_bias:
        bias = data.draw(hnp.arrays(np.int32, 12, elements=st.integers(-4, 4))) / np.float32(4)
    weight, expert = route(jnp.asarray(logits), config, jnp.asarray(bias))
    # a choice made before is only weighed again
    turned, kept = route(jnp.asarray(logits), config, jnp.asarray(bias), expert[:, ::-1])
    np.testing.assert_array_equal(kept, expert[:, ::-1])
    np.testing.assert_allclose(turned, weight[:, ::-1], rtol=1e-6)
    for token in range(2):
        found = dict(
            zip(np.asarray(expert[token]).tolist(), np.asarray(weight[token]), strict=True)
        )
        wanted = plain_route(logits[token].tolist(), bias.tolist(), config)
        assert sorted(found.values()) == pytest.approx(sorted(wanted.values()), rel=1e-5)
        if not config.correction_bias:  # sums of score and bias may tie but for rounding
            assert found == pytest.approx(wanted, rel=1e-5)


def test_a_probability_is_a_share_of_the_scores_whatever_the_score():
    logits = np.array([[-2.0, 0.0, 3.0]], np.float32)
    for score, scores in (("softmax", np.exp(logits)), ("sigmoid", 1 / (1 + np.exp(-logits)))):
        found = router_probability(jnp.asarray(logits), score)
        np.testing.assert_allclose(found, scores / scores.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 5}, "num_groups=5 must divide num_experts=12"),
        ({"num_groups": 6, "groups_per_token": 1}, "groups_per_token=1 of 6 groups of 2"),
        (
            {"num_groups": 12, "groups_per_token": 4, "group_score": "top2"},
            "num_groups=12 leaves one expert per group",
        ),
    ],
)
def test_groups_that_cannot_serve_a_token_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**SIZES, renormalize=False, **change)
