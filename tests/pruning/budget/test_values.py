"""The widths of every planner, width policy and alignment, and every weight, by brute force.

The registries are covered: a new entry without an oracle here fails.
"""

import functools
import itertools
import math

import numpy as np
import pytest

from pruning.budget.importance import (
    IMPORTANCE,
    LAYER_LOSSES,
    SMOOTHINGS,
    PlannerOptions,
    layer_weights,
    smooth_layer_loss,
)
from pruning.budget.planners import PLANNERS
from pruning.budget.widths import ALIGNMENTS, WIDTHS
from pruning.scores.criteria import ChannelScores, channel_scores
from tests.pruning.budget.test_alignment import plain_redistribution
from tests.support.plans import plan_of, planned
from tests.support.synthetic import statistics

L, E, F = 2, 3, 4
SEEDS = range(4)


def scores_of(seed: int, width: int = F) -> ChannelScores:
    rng = np.random.default_rng(seed)
    return ChannelScores(
        channel=rng.lognormal(size=(L, E, width)),
        expert=rng.lognormal(sigma=1.5, size=(L, E)),
        layer=rng.lognormal(size=L),
        layer_nll=rng.lognormal(size=L),
    )


# --- oracles ---


@functools.cache
def splits(groups: int, width: int) -> np.ndarray:
    return np.array(list(itertools.product(range(width + 1), repeat=groups)))


def coverages(row, rho: float = 1.0) -> list[float]:
    """Share of the score in the best 0, 1, ... channels; of what satisfies, a share `rho`."""
    ranked = sorted(row, reverse=True)
    shares = [sum(ranked[:n]) / sum(ranked) for n in range(len(ranked) + 1)]
    return [min(share, rho) / rho for share in shares] if rho < 1.0 else shares


def values_of(rows, weights, degree, rho) -> list[list[float]]:
    """Weighted utility of every group by its channels.

    A channel beyond satisfaction adds nothing: it comes after all that do, the ranks of all groups
    in turn, which a vanishing price says.
    """
    found = []
    for group, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        covered = coverages(row, rho)
        beyond = [1 + n + group / 100 if covered[n] == 1.0 else 0.0 for n in range(len(row))]
        prices = itertools.accumulate(beyond, initial=0.0)
        found.append(
            [weight * utility(degree)(r) - 1e-8 * price
             for r, price in zip(covered, prices, strict=True)]
        )  # fmt: skip
    return found


def best_split(values, total, floor, most) -> np.ndarray:
    """Counts of the largest sum of values[group][count] that spend the total, by trying all."""
    groups, width = len(values), len(values[0]) - 1
    every = splits(groups, width)
    allowed = (every >= floor).all(1) & (every <= most).all(1) & (every.sum(1) == total)
    every = every[allowed]
    worth = sum(np.asarray(values[g])[every[:, g]] for g in range(groups))
    return every[worth.argmax()]


def by_level(priority, total, floor, most) -> np.ndarray:
    """Counts by giving one channel at a time to the group of least priority(group, count)."""
    counts = np.array(floor)
    while counts.sum() < total:
        open_ = [g for g in range(len(counts)) if counts[g] < most[g]]
        counts[min(open_, key=lambda g: (priority(g, counts[g]), g))] += 1
    return counts


def utility(degree: float):
    if degree == 1.0:
        return lambda r: math.log(r + 1e-4)
    shift = 1e-4 if degree > 1.0 else 0.0
    return lambda r: (r + shift) ** (1.0 - degree) / (1.0 - degree)


def smoothed(scores: ChannelScores, how=math.sqrt) -> list[float]:
    """One pass of the paper's smoothing."""
    root = [how(value) for value in scores.layer]
    mean = sum(root) / L
    spread = math.sqrt(sum((value - mean) ** 2 for value in root) / (L - 1))
    cut = [min(max(value, mean - spread), mean + spread) for value in root]
    return [value * L / sum(cut) for value in cut]


def root_shares(experts) -> list[float]:
    roots = [math.sqrt(value) for value in experts]
    return [max(root / sum(roots), 1e-3 / E) for root in roots]


WEIGHTS = {
    "paper": lambda s: [
        [smooth * share for share in root_shares(s.expert[layer])]
        for layer, smooth in enumerate(smoothed(s))
    ],
    "attribution": lambda s: [
        [max(value, 1e-3 / E * sum(layer)) for value in layer] for layer in s.expert
    ],
    "mass": lambda s: [[sum(s.channel[layer, e]) for e in range(E)] for layer in range(L)],
    "normalized_mass": lambda s: [
        [sum(s.channel[layer, e]) * s.channel[layer].size / s.channel[layer].sum()
         for e in range(E)] for layer in range(L)
    ],
    "equal": lambda s: [[1.0] * E] * L,
}  # fmt: skip


def separable(degree: float, weights: str, rho: float):
    """All experts at once, the sum of weighted utilities of their coverage."""

    def counts(scores, total, floor, most):
        weight = np.asarray(WEIGHTS[weights](scores)).ravel()
        values = values_of(scores.channel.reshape(L * E, -1), weight, degree, rho)
        return best_split(values, total, floor.ravel(), most.ravel()).reshape(L, E)

    return counts


def level_of(rows, weights, rho):
    """Covered before the channel over the weight; a first channel ranks by its weighted gain, and
    one beyond satisfaction after all others by its place."""
    covered = [coverages(row, rho) for row in rows]

    def priority(g, n):
        if covered[g][n] == 1.0:
            return 1e9 + n
        return covered[g][n] / weights[g] if n else -covered[g][1] * weights[g]

    return priority


def max_min(rho: float):
    def counts(scores, total, floor, most):
        weight = np.asarray(WEIGHTS["paper"](scores)).ravel()
        level = level_of(scores.channel.reshape(L * E, -1), weight, rho)
        return by_level(level, total, floor.ravel(), most.ravel()).reshape(L, E)

    return counts


def two_levels(solve):
    """Layers share by their smoothed loss, then the experts of each by their root shares."""

    def counts(scores, total, floor, most):
        pools = scores.channel.reshape(L, -1)
        totals = solve(pools, smoothed(scores), total, floor.sum(1), most.sum(1))
        return np.stack(
            [solve(scores.channel[at], root_shares(scores.expert[at]), totals[at], floor[at],
                   most[at]) for at in range(L)]
        )  # fmt: skip

    return counts


def by_max_min(rho: float):
    def solve(rows, weights, total, floor, most):
        return by_level(level_of(rows, weights, rho), total, floor, most)

    return solve


def by_utility(degree: float, rho: float):
    def solve(rows, weights, total, floor, most):
        return best_split(values_of(rows, weights, degree, rho), total, floor, most)

    return solve


def in_proportion(scores, total, floor, most):
    """Widths nearest to the importance of the layer, then of the expert in it."""

    def share(weights, width, *bounds):
        return by_level(lambda g, n: (n + 0.5) / width / weights[g], *bounds)

    layers = share(scores.expert.sum(1), E * F, total, floor.sum(1), most.sum(1))
    return np.stack(
        [share(scores.expert[at], F, layers[at], floor[at], most[at]) for at in range(L)]
    )


def one_width(scores, total, floor, most):
    return by_level(lambda g, n: n, total, floor.ravel(), most.ravel()).reshape(L, E)


def each_layer_alike(rho: float):
    def counts(scores, total, floor, most):
        found = []
        for at in range(L):
            part = total // L + (at < total % L)
            mass = [sum(row) * np.array(coverages(row, rho)) for row in scores.channel[at]]

            def level(g, n, mass=mass):
                return mass[g][n] - mass[g][n + 1] or 1e9 + n

            found.append(by_level(level, part, floor[at], most[at]))
        return np.stack(found)

    return counts


def by_chance(scores, total, floor, most):
    drawn = np.sort(np.random.default_rng(9).random((L * E, F)), axis=1)
    return by_level(lambda g, n: drawn[g, n], total, floor.ravel(), most.ravel()).reshape(L, E)


def condensed(scores, total, floor, most):
    """Always-on experts, then layers of largest loss first, in each the best experts first."""
    layers = sorted(range(L), key=lambda at: -scores.layer[at])
    order = [
        (at, e) for at in layers for e in sorted(range(E), key=lambda e: -scores.expert[at, e])
    ]
    always_on = [place for place in np.ndindex(L, E) if floor[place] > 0]
    counts = floor.copy()
    for place in always_on + [place for place in order if place not in always_on]:
        counts[place] += min(most[place] - counts[place], total - counts.sum())
    return counts


def oracles(rho: float = 1.0) -> dict:
    """(scores, channels kept, floor, most) -> counts of every planner under `rho_max`."""
    return {
        "paper": two_levels(by_max_min(rho)),
        "fair_two_level": two_levels(by_utility(1.0, rho)),
        "linear_two_level": two_levels(by_utility(0.0, rho)),
        "maxmin": max_min(rho),
        "fair": separable(1.0, "attribution", rho),
        "fair0.5": separable(0.5, "attribution", rho),
        "fair2": separable(2.0, "attribution", rho),
        "linear": separable(0.0, "attribution", rho),
        "uniform": one_width,
        "random": by_chance,
        "global_topk": separable(0.0, "mass", rho),
        "normalized_topk": separable(0.0, "normalized_mass", rho),
        "layer_topk": each_layer_alike(rho),
        "moe_i2": in_proportion,
        "cd_moe": condensed,
    }


COUNTS = oracles()
# What the recorded coverage is weighted by.
OBJECTIVES = {
    "paper": "paper", "fair_two_level": "paper", "linear_two_level": "paper", "maxmin": "paper",
    "fair": "attribution", "fair0.5": "attribution", "fair2": "attribution",
    "linear": "attribution", "uniform": "equal", "random": "equal", "global_topk": "mass",
    "normalized_topk": "normalized_mass", "layer_topk": "equal", "moe_i2": "equal",
    "cd_moe": "equal",
}  # fmt: skip


# --- tests ---


def test_every_entry_has_its_oracle():
    assert set(COUNTS) == set(OBJECTIVES) == set(PLANNERS)
    assert set(WEIGHTS) == set(IMPORTANCE)
    assert set(SMOOTHED) == set(SMOOTHINGS)
    assert set(POLICIES) == set(WIDTHS)
    assert set(ALIGNED) == set(ALIGNMENTS)
    assert set(DEGREES) == {name for name, entry in PLANNERS.items() if entry.objective}
    assert set(LAYER_LOSSES) == {"energy", "attribution", "nll_ig"}


BOUNDS = {
    "open": (np.zeros((L, E), np.int64), np.full((L, E), F)),
    "bounded": (np.array([[1, 0, 0], [0, 0, 2]]), np.array([[4, 4, 3], [2, 4, 3]])),
}


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("name", PLANNERS)
def test_a_planner_keeps_what_its_oracle_keeps_at_every_budget(name, bounds):
    floor, most = BOUNDS[bounds]
    if name == "cd_moe":  # its always-on experts are those with a floor, and whole
        floor = np.array([[0, 0, 1], [1, 0, 0]]) if bounds == "open" else floor
    # layer_topk splits evenly, as far as the fullest layer has room
    last = 2 * most.sum(1).min() if name == "layer_topk" else most.sum()
    first = max(floor.sum(), L * floor.sum(1).max() if name == "layer_topk" else 0)
    for seed in SEEDS:
        scores = scores_of(seed)
        for budget in range(first, last + 1):
            found = planned(name, scores, budget, floor, most, seed=9)
            expected = COUNTS[name](scores, budget, floor, most)
            np.testing.assert_array_equal(found, expected, err_msg=f"seed {seed}, {budget} kept")


@pytest.mark.parametrize("name", PLANNERS)
def test_a_planner_counts_nothing_beyond_the_coverage_that_satisfies(name):
    rho, open_ = 0.6, BOUNDS["open"]
    capped, moved = oracles(rho)[name], 0
    for seed, budget in itertools.product(SEEDS[:2], range(2, L * E * F, 2)):
        scores = scores_of(seed)
        found = planned(name, scores, budget, *open_, seed=9, rho_max=rho)
        expected = capped(scores, budget, *open_)
        np.testing.assert_array_equal(found, expected, err_msg=f"seed {seed}, {budget} kept")
        moved += not np.array_equal(expected, COUNTS[name](scores, budget, *open_))
    assert (moved > 0) == (name not in ("uniform", "random", "moe_i2", "cd_moe"))


@pytest.mark.parametrize("name", IMPORTANCE)
def test_a_weight_is_its_formula(name):
    for seed in SEEDS:
        scores = scores_of(seed)
        scores.expert[0, 1] = 1e-12 * seed  # below the floor of a share
        found = IMPORTANCE[name](scores, PlannerOptions())
        expected = np.broadcast_to(WEIGHTS[name](scores), (L, E))
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def bent(loss):
    mean = sum(loss) / len(loss)
    bend = mean + 0.5 * math.sqrt(sum((v - mean) ** 2 for v in loss) / (len(loss) - 1))
    return [v if v <= bend else math.sqrt(bend * (2 * v - bend)) for v in loss]


def cut(loss, deviations):
    mean = sum(loss) / len(loss)
    spread = deviations * math.sqrt(sum((v - mean) ** 2 for v in loss) / (len(loss) - 1))
    return [min(max(v, mean - spread), mean + spread) for v in loss]


SMOOTHED = {
    "sqrt": lambda loss: [v**0.5 for v in loss],
    "identity": lambda loss: loss,
    "power0.25": lambda loss: [v**0.25 for v in loss],
    "power0.75": lambda loss: [v**0.75 for v in loss],
    "log5": lambda loss: [math.log(1 + 5 * v) for v in loss],
    "log20": lambda loss: [math.log(1 + 20 * v) for v in loss],
    "clip": lambda loss: cut(loss, 0.5),
    "huber": bent,
}


@pytest.mark.parametrize("passes", [0, 1, 2])
@pytest.mark.parametrize("how", SMOOTHINGS)
def test_a_smoothing_is_its_formula(how, passes):
    loss = np.random.default_rng(2).lognormal(sigma=1.2, size=9).tolist()
    expected = loss
    for _ in range(passes):
        expected = cut(SMOOTHED[how](expected), 1.0)
    expected = np.array(expected) * 9 / sum(expected)
    np.testing.assert_allclose(smooth_layer_loss(np.array(loss), how, passes), expected, rtol=1e-12)


def test_a_layer_loss_is_what_its_name_says():
    scores = scores_of(1)
    for name, loss in (
        ("energy", scores.layer), ("attribution", scores.expert.sum(1)),
        ("nll_ig", scores.layer_nll),
    ):  # fmt: skip
        found = layer_weights(scores, PlannerOptions(layer_loss=name, passes=0))
        np.testing.assert_allclose(found, loss * L / sum(loss), rtol=1e-12)


# --- plans: one block, one reserved expert a layer ---


def floors(scores: ChannelScores, least: int) -> np.ndarray:
    floor = np.zeros((L, E), np.int64)
    for at in range(L):
        floor[at, max(range(E), key=lambda e: scores.expert[at, e])] = least
    return floor


def free(scores, budget):
    return COUNTS["linear"](scores, budget, floors(scores, 1), np.full((L, E), F))


def capped(scores, budget):
    return COUNTS["linear"](scores, budget, floors(scores, 1), np.full((L, E), 3))


def by_layer(scores, budget):
    """A layer's n-th channel is the sum of its experts' n-th best, its weight that of them all."""
    ranked = [
        [sum(sorted(row, reverse=True)[n] for row in layer) for n in range(F)]
        for layer in scores.channel
    ]
    values = [
        [weight * r for r in coverages(row)]
        for weight, row in zip(scores.expert.sum(1), ranked, strict=True)
    ]
    widths = best_split(values, budget // E, np.ones(L, int), np.full(L, F))
    return np.repeat(widths[:, None], E, axis=1)


def for_all(scores, budget):
    return np.full((L, E), budget // (L * E))


def chosen(scores, kept):
    """The best of each layer, then the best of the others."""
    best = floors(scores, 1) > 0
    others = sorted(
        (place for place in np.ndindex(L, E) if not best[place]), key=lambda p: -scores.expert[p]
    )
    for place in others[: kept - L]:
        best[place] = True
    return best


def whole(scores, budget):
    below = budget // F
    kept = below if budget - below * F < (below + 1) * F - budget else below + 1
    if budget % F == F // 2:  # as near to one as to the other: an even number
        kept = below + below % 2
    return np.where(chosen(scores, kept), F, 0)


def combined(scores, budget):
    stay = chosen(scores, 4)  # a third of six gone
    floor = floors(scores, 1) * stay
    return COUNTS["linear"](scores, budget, floor, np.where(stay, F, 0))


POLICIES = {
    "free": (free, range(2, 25)), "capped": (capped, range(2, 19)),
    "layer": (by_layer, range(6, 25)), "uniform": (for_all, range(6, 25)),
    "experts": (whole, range(8, 25)), "combined": (combined, range(2, 17)),
}  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_a_width_policy_keeps_what_its_oracle_keeps_at_every_budget(width):
    oracle, budgets = POLICIES[width]
    for seed in SEEDS:
        stats = statistics(L, E, F, seed=seed)
        scores = channel_scores(stats, criterion="act")
        for budget in budgets:
            plan = plan_of(
                stats, channels=budget, criterion="act", planner="linear", width=width, cap=3,
                expert_rate=1 / 3, experts_per_token=1,
            )  # fmt: skip
            np.testing.assert_array_equal(plan.counts, oracle(scores, budget), err_msg=str(budget))


@pytest.mark.parametrize("per_layer", [False, True])
def test_whole_experts_of_a_budget_that_does_not_divide_are_the_nearest_number(per_layer):
    stats = statistics(3, 4, 12)
    for budget, kept in ((6 * 12 + 5, 6), (6 * 12 + 7, 7), (7 * 12 - 1, 7), (5 * 12 + 1, 5)):
        plan = plan_of(
            stats, channels=budget, width="experts", per_layer=per_layer, experts_per_token=1
        )
        assert sorted(np.unique(plan.counts)) == [0, 12] and (plan.counts > 0).sum() == kept
        assert plan.provenance["kept"] == 12 * kept
        assert plan.provenance["unspent"] == budget - 12 * kept
        if per_layer:
            expected = [kept // 3 + (at < kept % 3) for at in range(3)]
            assert (plan.counts > 0).sum(axis=1).tolist() == expected


# --- alignments: blocks of two in eight channels, four the least ---

WIDE, BLOCK, LEAST = 8, 2, 4


def redistributed(by_score: bool):
    def counts(scores, budget, wanted):
        lost = None
        if by_score:
            lost = []
            for row, n in zip(scores.channel.reshape(L * E, -1), wanted.ravel(), strict=True):
                ranked, low = sorted(row, reverse=True), 0 if n < LEAST else n - n % BLOCK
                lost.append(sum(ranked[low:n]))
        found = plain_redistribution(
            wanted.ravel().tolist(), scores.expert.ravel().tolist(), d_expert=WIDE, block=BLOCK,
            minimum=LEAST, lost=lost,
        )  # fmt: skip
        return np.reshape(found, (L, E))

    return counts


def optimal(scores, budget, wanted):
    """The legal widths of largest weighted coverage within the budget, by trying all."""
    best, found = -1.0, None
    held = floors(scores, LEAST)
    covered = [coverages(row) for row in scores.channel.reshape(L * E, -1)]
    for split in itertools.product((0, *range(LEAST, WIDE + 1, BLOCK)), repeat=L * E):
        if sum(split) > budget or (np.reshape(split, (L, E)) < held).any():
            continue
        worth = sum(w * c[n] for w, c, n in zip(scores.expert.ravel(), covered, split, strict=True))
        if worth > best:
            best, found = worth, split
    return np.reshape(found, (L, E))


ALIGNED = {
    "paper": redistributed(by_score=False), "paper_scores": redistributed(by_score=True),
    "dp": optimal, "hull": optimal,
}  # fmt: skip


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_an_alignment_keeps_what_its_oracle_keeps(align):
    exact = 0
    for seed, budget in itertools.product(SEEDS, (17, 26, 35)):
        stats = statistics(L, E, WIDE, seed=seed)
        scores = channel_scores(stats, criterion="act")
        given = {"criterion": "act", "planner": "linear", "experts_per_token": 1}
        plan = plan_of(stats, channels=budget, align=align, block=BLOCK, minimum=LEAST, **given)
        wanted = planned("linear", scores, budget, floors(scores, LEAST))
        expected = ALIGNED[align](scores, budget, wanted)
        if align == "hull":  # not always the best where the least is more than a block
            exact += np.array_equal(plan.counts, expected)
        else:
            np.testing.assert_array_equal(plan.counts, expected, err_msg=f"{seed}, {budget}")
    assert align != "hull" or exact >= 9


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_the_exact_alignment_counts_nothing_beyond_the_coverage_that_satisfies(rho):
    moved = 0
    for seed, budget in itertools.product(SEEDS, (17, 26, 35)):
        stats = statistics(L, E, WIDE, seed=seed)
        scores = channel_scores(stats, criterion="act")
        given = {"criterion": "act", "planner": "linear", "experts_per_token": 1}
        given |= {"channels": budget, "align": "dp", "block": BLOCK, "minimum": BLOCK}
        plan, uncapped = plan_of(stats, rho_max=rho, **given), plan_of(stats, **given)
        covered = [coverages(row, rho)[::BLOCK] for row in scores.channel.reshape(L * E, -1)]
        values = [[w * r for r in row] for w, row in zip(scores.expert.flat, covered, strict=True)]

        def worth(counts, values=values):
            return sum(row[n // BLOCK] for row, n in zip(values, counts.flat, strict=True))

        held, most = floors(scores, BLOCK).ravel() // BLOCK, np.full(L * E, WIDE // BLOCK)
        best = best_split(values, budget // BLOCK, held, most)
        assert worth(plan.counts) == pytest.approx(worth(BLOCK * best), rel=1e-12)
        moved += worth(uncapped.counts) < worth(plan.counts) * (1 - 1e-9)
    assert moved


# What a planner maximises among aligned widths: the degree of fairness.
DEGREES = {
    "paper": 0, "fair_two_level": 1, "linear_two_level": 0, "maxmin": 0, "fair": 1, "fair0.5": 0.5,
    "fair2": 2, "linear": 0, "global_topk": 0, "normalized_topk": 0,
}  # fmt: skip
UTILITIES = {
    0: lambda r: r, 0.5: lambda r: 2 * math.sqrt(r), 1: lambda r: math.log(r + 1e-4),
    2: lambda r: -1 / (r + 1e-4),
}  # fmt: skip


@pytest.mark.parametrize("name", DEGREES)
def test_aligned_widths_are_the_best_of_all_by_what_the_planner_maximises(name):
    stats = statistics(L, E, WIDE, seed=1)
    scores = channel_scores(stats, criterion="act")
    weights = np.broadcast_to(WEIGHTS[OBJECTIVES[name]](scores), (L, E)).ravel()
    utility = UTILITIES[DEGREES[name]]
    assert PLANNERS[name].objective.degree == DEGREES[name]
    worth = [
        {n: w * utility(c[n]) for n in (0, *range(LEAST, WIDE + 1, BLOCK))}
        for w, c in zip(weights, map(coverages, scores.channel.reshape(L * E, -1)), strict=True)
    ]
    held = floors(scores, LEAST).ravel()
    legal = [[n for n in one if n >= low] for one, low in zip(worth, held, strict=True)]
    for budget in (18, 26, 35):
        plan = plan_of(stats, channels=budget, align="dp", block=BLOCK, minimum=LEAST,
                       criterion="act", planner=name, experts_per_token=1)  # fmt: skip
        found = sum(one[n] for one, n in zip(worth, plan.counts.ravel(), strict=True))
        best = max(
            sum(one[n] for one, n in zip(worth, split, strict=True))
            for split in itertools.product(*legal)
            if sum(split) <= budget
        )
        assert found == pytest.approx(best, rel=1e-9), budget


# --- what a plan says ---


@pytest.mark.parametrize("name", PLANNERS)
def test_recorded_coverages_are_means_under_the_planners_weights(name):
    stats = statistics(L, E, WIDE, seed=2)
    scores = channel_scores(stats, criterion="act")
    plan = plan_of(stats, channels=23, criterion="act", planner=name, block=BLOCK, minimum=BLOCK,
                   experts_per_token=1)  # fmt: skip
    weights = np.broadcast_to(WEIGHTS[OBJECTIVES[name]](scores), (L, E)).ravel()
    covered = np.array([coverages(row) for row in scores.channel.reshape(L * E, -1)])

    def mean(counts):
        return (weights * covered[np.arange(L * E), counts]).sum() / weights.sum()

    wanted = planned(name, scores, 23, floors(scores, BLOCK))
    assert plan.provenance["coverage_before"] == pytest.approx(mean(wanted.ravel()), rel=1e-12)
    aligned = mean(plan.counts.ravel())
    assert plan.provenance["coverage_aligned"] == pytest.approx(aligned, rel=1e-12)
    values = [w * c[::BLOCK] for w, c in zip(weights, covered, strict=True)]
    optimum = best_split(
        values, 23 // BLOCK, floors(scores, 1).ravel(), np.full(L * E, WIDE // BLOCK)
    )
    best = mean(optimum * BLOCK)
    assert plan.provenance["coverage_optimum"] == pytest.approx(best, rel=1e-12)


def test_coverage_of_experts_and_layers_of_unequal_totals_is_their_own_share():
    stats = statistics(L, E, WIDE, seed=3)
    channel = channel_scores(stats, criterion="act").channel * [[[1.0], [7.0], [0.2]]]
    plan = plan_of(stats, channels=21, criterion="act", experts_per_token=1)
    experts, layers = np.zeros((L, E)), np.zeros(L)
    for at in range(L):
        for e in range(E):
            kept = sum(channel[at, e, c] for c in range(WIDE) if plan.keep[at, e, c])
            experts[at, e] = kept / sum(channel[at, e])
            layers[at] += kept / channel[at].sum()
    np.testing.assert_allclose(plan.expert_coverage(channel), experts, rtol=1e-12)
    np.testing.assert_allclose(plan.layer_coverage(channel), layers, rtol=1e-12)
    assert np.abs(experts.mean(axis=1) - layers).min() > 0.01, "equal totals tell nothing apart"


def test_a_layer_without_attribution_or_score_counts_its_experts_alike():
    scores = scores_of(3)
    scores.expert[1], scores.channel[0] = 0.0, 0.0
    paper = IMPORTANCE["paper"](scores, PlannerOptions())
    np.testing.assert_allclose(paper[1], [smoothed(scores)[1] / E] * E, rtol=1e-12)
    normalized = IMPORTANCE["normalized_mass"](scores, PlannerOptions())
    assert normalized[0].tolist() == [0.0] * E and normalized[1].sum() == pytest.approx(E * F)
