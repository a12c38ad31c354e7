import numpy as np
import pytest

from moe_jax.errors import choose
from pruning.scores.channel_criteria import CHANNEL_CRITERIA
from pruning.scores.criteria import channel_scores, require_data_free
from pruning.scores.expert_criteria import EXPERT_CRITERIA, expert_criterion
from pruning.scores.statistics import DECLARED, GROUPS, field_shapes
from tests.support.synthetic import statistics

GRADIENT_CRITERIA = ("taylor", "abs_taylor", "fisher", "heapr", "saliency", "wg")


def unrouted(stats, layer, expert):
    """The same sums with one expert that no token ever reached."""
    weights = ("down_norm", "up_norm", "gate_norm", "down_l1", "up_l1", "gate_l1", "noise")
    for name in field_shapes(2, 3, 4, 3, stats.groups):
        value = getattr(stats, name)
        # the router gives every expert some probability
        if value.ndim > 1 and name not in (*weights, "probability_mass"):
            value[layer, expert] = 0.0
    return stats


def test_channel_criteria_equal_their_definitions_on_explicit_tokens():
    rng = np.random.default_rng(3)
    tokens, channels = 7, 4
    h, p, g, dh = (rng.normal(size=(tokens, channels)) for _ in range(4))
    w = rng.random(tokens)
    down, up, gate = (rng.random((channels, 5)) for _ in range(3))
    s = h * dh
    stats = statistics(
        1,
        1,
        channels,
        hidden_square=(h**2).sum(0)[None, None],
        up_square=(p**2).sum(0)[None, None],
        gate_square=(g**2).sum(0)[None, None],
        weighted_square=((w[:, None] * h) ** 2).sum(0)[None, None],
        down_norm=np.linalg.norm(down, axis=1)[None, None],
        up_norm=np.linalg.norm(up, axis=1)[None, None],
        gate_norm=np.linalg.norm(gate, axis=1)[None, None],
        taylor=s.sum(0)[None, None],
        abs_taylor=np.abs(s).sum(0)[None, None],
        fisher=(s**2).sum(0)[None, None],
        total_tokens=float(tokens),
    )
    norms = [[np.linalg.norm(x[:, c]) for c in range(channels)] for x in (h, p, g)]
    contributions = [np.outer(w * h[:, c], down[c]) for c in range(channels)]
    expected = {
        "act": np.mean(norms, axis=0),
        "hidden": norms[0],
        "weight": [
            (np.linalg.norm(down[c]) + np.linalg.norm(up[c]) + np.linalg.norm(gate[c])) / 3
            for c in range(channels)
        ],
        "amp": [np.linalg.norm(x) for x in contributions],
        "taylor": np.abs(s.mean(0)),
        "abs_taylor": np.abs(s).mean(0),
        "fisher": (s**2).mean(0),
    }
    for name, value in expected.items():
        got = channel_scores(stats, criterion=name).channel[0, 0]
        np.testing.assert_allclose(got, value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("criterion", CHANNEL_CRITERIA)
@pytest.mark.parametrize("attribution", ["ala", "nll_grad"])
def test_scores_are_finite_non_negative_and_double_precision(criterion, attribution):
    scores = channel_scores(statistics(2, 3, 4), criterion=criterion, attribution=attribution)
    for array, shape in (
        (scores.channel, (2, 3, 4)),
        (scores.expert, (2, 3)),
        (scores.layer, (2,)),
    ):
        assert array.shape == shape
        assert array.dtype == np.float64
        assert np.isfinite(array).all() and (array >= 0.0).all()


@pytest.mark.parametrize(
    "criterion", sorted(n for n, c in CHANNEL_CRITERIA.items() if not c.data_free)
)
def test_a_never_routed_expert_is_ranked_by_weight_below_every_routed_channel(criterion):
    stats = unrouted(statistics(2, 3, 6), 1, 2)
    # Positive, so that "shapley" clamps nothing to zero.
    stats.shapley[:] = np.where(stats.hidden_square > 0.0, np.abs(stats.shapley) + 0.1, 0.0)
    channel = channel_scores(stats, criterion=criterion).channel
    weight = (stats.down_norm + stats.up_norm + stats.gate_norm)[1, 2]
    np.testing.assert_allclose(channel[1, 2] / channel[1, 2].sum(), weight / weight.sum())
    routed = np.delete(channel.reshape(6, 6), 5, axis=0)
    assert channel[1, 2].max() == pytest.approx(0.5 * routed.min()) and (channel[1, 2] > 0.0).all()


@pytest.mark.parametrize("criterion", CHANNEL_CRITERIA)
@pytest.mark.parametrize("norm", ["down_norm", "up_norm", "gate_norm"])
def test_a_channel_without_weights_scores_exactly_zero(criterion, norm):
    stats = unrouted(statistics(2, 3, 4), 0, 1)
    getattr(stats, norm)[:, :, 2] = 0.0
    assert (channel_scores(stats, criterion=criterion).channel[:, :, 2] == 0.0).all()


@pytest.mark.parametrize("name", EXPERT_CRITERIA)
def test_a_never_routed_expert_has_finite_attribution(name):
    stats = unrouted(statistics(2, 3, 4, end_to_end=True), 0, 1)
    expert = channel_scores(stats, attribution=name).expert
    assert (expert[0, 1] > 0.0) == (EXPERT_CRITERIA[name].data_free or name == "router")


def test_second_order_attribution_is_the_loss_of_removing_an_expert_from_the_scaled_model():
    # Two experts' outputs on three tokens; the loss is quadratic, so the identity is exact.
    rng = np.random.default_rng(0)
    u = rng.normal(size=(2, 3, 5))  # [E, T, D]
    y = u.sum(0)
    q = rng.random(3)
    stats = statistics(
        1,
        2,
        4,
        phi=np.einsum("t,etd,td->e", q, u, y)[None],
        kappa=np.einsum("t,etd,etd->e", q, u, u)[None],
        total_tokens=3.0,
    )

    def loss(scales):
        error = np.einsum("e,etd->td", np.array(scales), u) - y
        return (q * (error**2).sum(1)).sum() / 3.0

    removed = [loss([0.0, 0.9]) - loss([0.9, 0.9]), loss([0.9, 0.0]) - loss([0.9, 0.9])]
    np.testing.assert_allclose(EXPERT_CRITERIA["ala2"](stats)[0], removed, rtol=1e-12)


def test_norm_averages_divide_by_routed_tokens():
    stats = statistics(1, 2, 4, tokens=np.array([[4.0, 10.0]]))
    for name, field in (
        ("reap", "weighted_output_norm"),
        ("man", "output_norm"),
        ("msan", "output_square"),
    ):
        expected = getattr(stats, field) / [[4.0, 10.0]]
        np.testing.assert_allclose(channel_scores(stats, attribution=name).expert, expected)


def test_one_output_does_not_vary():
    output = np.array([[[3.0, -1.0], [2.0, 4.0]]])
    stats = statistics(
        1, 2, 4, tokens=np.array([[1.0, 2.0]]), output_sum=output, total_tokens=3.0,
        output_coordinate_square=np.array([[[9.0, 1.0], [4.0, 16.0]]]),
        probability_mass=np.array([[0.5, 1.5]]),
    )  # fmt: skip
    # Of two tokens the means are 1 and 2, of their squares 2 and 8: variances of 1 and 4.
    expected = [[0.0, np.sqrt(5.0) * 1.5 / 3.0]]
    np.testing.assert_allclose(EXPERT_CRITERIA["mone"](stats), expected, rtol=1e-12)


def test_without_any_routed_channel_weights_rank_all():
    stats = unrouted(statistics(1, 1, 4), 0, 0)
    channel = channel_scores(stats, criterion="act").channel[0, 0]
    weight = (stats.down_norm + stats.up_norm + stats.gate_norm)[0, 0]
    np.testing.assert_allclose(channel, weight / weight.max())


def test_gate_gradient_is_minus_the_sum_of_signed_taylor_terms_clamped_at_zero():
    stats = statistics(1, 2, 2, taylor=np.array([[[1.0, -4.0], [3.0, 2.0]]]))
    np.testing.assert_allclose(EXPERT_CRITERIA["nll_grad"](stats), [[0.03, -0.05]])
    scores = channel_scores(stats, attribution="nll_grad")
    np.testing.assert_allclose(scores.expert, [[0.03, 0.0]])


def test_an_expert_of_zeros_has_no_rms_over_its_mean():
    nothing = {f"{part}_{kind}": np.array([[[0.0] * 4, [1.0, 2.0, 0.5, 1.0]]])
               for part in ("down", "up", "gate") for kind in ("norm", "l1")}  # fmt: skip
    found = EXPERT_CRITERIA["aimer"](statistics(1, 2, 4, **nothing))
    np.testing.assert_allclose(found, [[0.0, np.sqrt(3 * 6.25) / 13.5]], rtol=1e-12)


def test_a_layer_is_worth_its_energy_per_token_of_a_text_of_one_token_too():
    stats = statistics(2, 3, 4, total_tokens=1.0)
    np.testing.assert_array_equal(channel_scores(stats).layer, stats.layer_energy)


def test_random_scores_depend_on_the_seed_alone():
    one, two = (channel_scores(statistics(2, 3, 4, seed=s), criterion="random") for s in (0, 1))
    np.testing.assert_array_equal(one.channel, two.channel)
    other = channel_scores(statistics(2, 3, 4), criterion="random", seed=1)
    assert (one.channel != other.channel).all()


@pytest.mark.parametrize("criterion", GRADIENT_CRITERIA)
def test_gradient_criteria_refuse_statistics_without_gradients(criterion):
    with pytest.raises(ValueError, match=r"was not collected.*--(weight-)?gradients"):
        channel_scores(statistics(2, 3, 4, gradients=False), criterion=criterion)


def test_noise_is_refused_where_a_text_was_scored_and_clamped_at_zero_where_none_was():
    with pytest.raises(ValueError, match=r"'noise' was not collected.* --weights-only or choose"):
        channel_scores(statistics(2, 3, 4, noise=None), criterion="noise")
    noise = np.array([[[3.0, -1.0, 0.5]]])
    found = channel_scores(statistics(1, 1, 3, noise=noise), criterion="noise").channel
    np.testing.assert_array_equal(found, [[[3.0, 0.0, 0.5]]])


def test_gradient_attribution_refuses_statistics_without_gradients():
    with pytest.raises(ValueError, match="--gradients"):
        channel_scores(statistics(2, 3, 4, gradients=False), attribution="nll_grad")


def test_an_unknown_criterion_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"criterion='enrgy'.*did you mean 'energy'.*act, hidden"):
        channel_scores(statistics(1, 2, 2), criterion="enrgy")
    with pytest.raises(ValueError, match="attribution='zzz' is unknown; choose one of: ala"):
        channel_scores(statistics(1, 2, 2), attribution="zzz")


def test_choose_returns_the_entry_of_the_name():
    assert choose({"a": 1, "b": 2}, "b", "letter") == 2


def test_non_finite_sums_are_refused_with_their_place():
    stats = statistics(2, 3, 4)
    stats.hidden_square[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match=r"channel score at \(1, 2, 3\).*not finite"):
        channel_scores(stats, criterion="act")
    stats.hidden_square[0, 1, 2:] = np.inf  # of several the first
    with pytest.raises(ValueError, match=r"channel score at \(0, 1, 2\)"):
        channel_scores(stats, criterion="act")


def test_statistics_without_tokens_are_refused():
    with pytest.raises(ValueError, match=r"total_tokens=0\.0 must be positive"):
        channel_scores(statistics(1, 2, 2, total_tokens=0.0))


def test_scoring_leaves_the_statistics_untouched():
    stats = unrouted(statistics(2, 3, 4), 0, 0)
    before = {name: np.copy(value) for name, value in vars(stats).items()}
    for criterion in CHANNEL_CRITERIA:
        channel_scores(stats, criterion=criterion)
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(stats, name), value, err_msg=name)


@pytest.mark.parametrize("registry", [CHANNEL_CRITERIA, EXPERT_CRITERIA], ids=["c", "e"])
def test_a_criterion_reads_what_it_says_it_needs_and_nothing_else(registry):
    everything = statistics(2, 3, 4, end_to_end=True)
    for name, criterion in registry.items():
        assert criterion.about and criterion.needs in (None, *GROUPS), name
        others = {
            n for n, facts in DECLARED.items() if facts["group"] not in ("always", criterion.needs)
        }
        criterion(everything.replace(**dict.fromkeys(others)))
        if criterion.needs:
            lacking = dict.fromkeys(n for n, f in DECLARED.items() if f["group"] == criterion.needs)
            with pytest.raises(ValueError, match=f"not collected.*--{criterion.needs}"):
                criterion(everything.replace(**lacking))


def test_data_free_criteria_see_no_text_and_whole_text_ones_no_part_of_it():
    bare = statistics(2, 3, 4, total_tokens=0.0, tokens=np.zeros((2, 3)))
    for name, registry in (("noise", CHANNEL_CRITERIA), ("aimer", EXPERT_CRITERIA)):
        for other, criterion in registry.items():
            names = {"criterion": "weight", "attribution": "uniform"}
            names["criterion" if name == "noise" else "attribution"] = other
            if criterion.data_free:
                channel_scores(bare, **names)
            else:
                with pytest.raises(ValueError, match=r"total_tokens=0\.0 must be positive"):
                    channel_scores(bare, **names)
    whole = {n for r in (CHANNEL_CRITERIA, EXPERT_CRITERIA) for n, c in r.items() if c.whole_text}
    assert whole == {"wanda", "moe_pruner", "wg", "obs", "nll_ig", "nll_ablate", "nll_grad2"}
    assert not expert_criterion("S(1,1,1)").whole_text


def test_without_text_only_what_weights_alone_give_is_let_through():
    require_data_free("weight", "uniform")
    for criterion, attribution, name in (
        ("act", "uniform", "criterion='act'"), ("weight", "ala", "attribution='ala'"),
    ):  # fmt: skip
        message = rf"{name} needs calibration text, .* choose among .*\b{'weight'}\b"
        with pytest.raises(ValueError, match=message):
            require_data_free(criterion, attribution)


def test_aimer_has_no_unit_and_is_zero_without_weights():
    stats = statistics(2, 3, 4)
    aimer = EXPERT_CRITERIA["aimer"]
    wanted = aimer(stats)
    names = [f"{part}_{fact}" for part in ("down", "up", "gate") for fact in ("norm", "l1")]
    for scale in (1e-3, 1e3):
        scaled = stats.replace(**{name: scale * getattr(stats, name) for name in names})
        np.testing.assert_allclose(aimer(scaled), wanted, rtol=1e-12)
    for name in names:
        getattr(stats, name)[1, 2] = 0.0
    assert aimer(stats)[1, 2] == 0.0
