import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.budget.alignment import (
    best_channels,
    check_block,
    legal_minimum,
    of_groups,
    redistribute,
    uniform_counts,
)

SHAPE = (3, 4)


def plain_redistribution(counts, attribution, *, d_expert, block, minimum, lost=None):
    """Steps 1-5 of the redistribution as loops over a flat list; needs block | d_expert.

    `lost` is what each loses by rounding, by which the order goes; default the channels.
    """
    least = min(-(-minimum // block) * block, d_expert)
    kept = []
    for n in counts:
        n_trimmed = 0 if n < minimum else n
        down = n_trimmed // block * block
        kept.append(0 if down < least else down)
    blocks = (sum(counts) - sum(kept)) // block
    places = range(len(counts))
    lost = lost or [counts[e] - kept[e] for e in places]
    order = sorted(places, key=lambda e: (-lost[e], -attribution[e], e))

    def hand_out(blocks):
        while blocks and any(0 < kept[e] < d_expert for e in order):
            for e in order:
                if blocks and 0 < kept[e] < d_expert:
                    kept[e] += block
                    blocks -= 1
        return blocks

    blocks = hand_out(blocks)
    by_value = sorted((e for e in places if kept[e] == 0), key=lambda e: (-attribution[e], e))
    for e in by_value:
        if blocks * block >= least:
            kept[e] = least
            blocks -= least // block
    hand_out(blocks)
    return kept


cases = st.tuples(
    st.lists(st.integers(0, 24), min_size=12, max_size=12),
    st.lists(st.integers(0, 4), min_size=12, max_size=12),
    st.integers(1, 24),
)


@settings(max_examples=300, deadline=None)
@given(cases, st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
def test_redistribution_equals_the_papers_steps_written_as_loops(case, block):
    counts, attribution, minimum = case
    got = redistribute(
        np.reshape(counts, SHAPE),
        d_expert=24,
        block=block,
        minimum=minimum,
        attribution=np.reshape(attribution, SHAPE) * 1.0,
    )
    expected = plain_redistribution(counts, attribution, d_expert=24, block=block, minimum=minimum)
    assert got.reshape(-1).tolist() == expected


@settings(max_examples=300, deadline=None)
@given(
    cases,
    st.integers(1, 24),
    st.booleans(),
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.booleans(),
)
def test_widths_are_legal_within_budget_and_nothing_is_wasted(
    case, block, per_layer, reserved, by_score
):
    counts, attribution, minimum = case
    counts, reserved = np.reshape(counts, SHAPE), np.reshape(reserved, SHAPE)
    budget, least = counts.sum(), legal_minimum(minimum, block, 24)
    reserved = reserved & (reserved.sum() * least <= budget)
    best_first = np.sort(np.random.default_rng(0).random((*SHAPE, 24)))[..., ::-1]
    got = redistribute(
        counts,
        d_expert=24,
        block=block,
        minimum=minimum,
        attribution=np.reshape(attribution, SHAPE) * 1.0,
        reserved=reserved,
        per_layer=per_layer,
        best_first=best_first if by_score else None,
    )
    assert ((got == 0) | ((got >= least) & (got % block == 0)) | (got == 24)).all()
    assert (got[reserved] >= least).all()
    left = budget - got.sum()
    assert left >= 0
    active_full = ((got == 0) | (got == 24)).all()
    assert left < block or (active_full and (left < least or (got == 24).all()))
    if 24 % block == 0 and not active_full:
        assert got.sum() == budget // block * block


@settings(max_examples=100, deadline=None)
@given(cases)
def test_block_one_without_a_minimum_changes_nothing(case):
    counts = np.reshape(case[0], SHAPE)
    got = redistribute(counts, d_expert=24, block=1, attribution=np.ones(SHAPE))
    np.testing.assert_array_equal(got, counts)


def test_freed_blocks_go_to_the_experts_that_lost_most():
    # Rounding frees 3 + 7 + 2 + 6 = 18 channels: two blocks of 8, for experts 1 and 3.
    got = redistribute(
        np.array([[11, 15, 10, 14]]), d_expert=32, block=8, attribution=np.ones((1, 4))
    )
    assert got.tolist() == [[8, 16, 8, 16]]


def test_lost_score_can_decide_instead_of_lost_channels():
    # Expert 0 loses 3 channels worth 9 each, expert 1 loses 7 worth almost nothing.
    best_first = np.array([[[9.0] * 16, [9.0] * 8 + [0.1] * 8]])
    options = {"d_expert": 16, "block": 8, "attribution": np.ones((1, 2))}
    counts = np.array([[11, 15]])
    assert redistribute(counts, **options).tolist() == [[8, 16]]
    assert redistribute(counts, best_first=best_first, **options).tolist() == [[16, 8]]


def test_trimmed_experts_are_revived_by_attribution_when_all_others_are_full():
    got = redistribute(
        np.array([[16, 7, 7, 7]]),
        d_expert=16,
        block=4,
        minimum=8,
        attribution=np.array([[1.0, 0.1, 0.3, 0.2]]),
    )
    # 21 channels are left: two experts of 8, then one block of 4 to the first of them in order.
    assert got.tolist() == [[16, 0, 12, 8]]


def test_reserved_experts_are_lifted_at_the_expense_of_the_least_important():
    got = redistribute(
        np.array([[8, 8, 1, 0]]),
        d_expert=8,
        block=4,
        attribution=np.array([[3.0, 1.0, 9.0, 0.0]]),
        reserved=np.array([[False, False, True, False]]),
    )
    assert got[0, 2] >= 4
    assert got.sum() == 16
    assert got[0, 0] == 8


def test_layer_scope_keeps_each_layers_budget_where_it_can():
    counts = np.array([[7, 7, 7], [5, 5, 5]])
    got = redistribute(counts, d_expert=16, block=4, attribution=np.ones((2, 3)), per_layer=True)
    # 21 and 15 channels pay for 5 and 3 blocks; the remainders 1 + 3 pay for one more.
    assert sorted(got.sum(axis=1) - [20, 12]) == [0, 4]


def test_the_smaller_last_block_of_a_width_that_is_no_multiple_is_usable():
    got = redistribute(np.array([[10, 10, 10]]), d_expert=10, block=4, attribution=np.ones((1, 3)))
    assert got.tolist() == [[10, 10, 10]]
    got = redistribute(np.array([[9, 9, 2]]), d_expert=10, block=4, attribution=np.ones((1, 3)))
    assert got.tolist() == [[10, 10, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 0}, r"block=0 must lie in \[1, d_expert=8\]"),
        ({"block": 9}, r"block=9 must lie"),
        ({"counts": np.array([[9, 0]])}, r"must lie in \[0, d_expert=8\]"),
        ({"minimum": 9}, r"minimum=9 must lie in \[1, 8\]"),
        ({"reserved": np.array([[True, True]])}, "2 reserved experts.*the budget is 5"),
    ],
)
def test_bad_arguments_name_value_and_expectation(change, message):
    options = {"d_expert": 8, "block": 4, "attribution": np.ones((1, 2))} | change
    counts = options.pop("counts", np.array([[5, 0]]))
    with pytest.raises(ValueError, match=message):
        redistribute(counts, **options)


def test_a_block_that_does_not_divide_names_those_that_do():
    check_block(6, 12)
    with pytest.raises(ValueError, match=r"block=5 .* width 12.*\[1, 2, 3, 4, 6, 12\]"):
        check_block(5, 12)


def test_uniform_width_is_rounded_down_to_a_block():
    assert uniform_counts((2, 3, 16), 60, 4, 4).tolist() == [[8] * 3] * 2
    assert uniform_counts((2, 3, 16), 96, 4, 4).tolist() == [[16] * 3] * 2
    with pytest.raises(ValueError, match="uniform width of 0 of 16, at least 4"):
        uniform_counts((2, 3, 16), 23, 4, 4)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=24, max_size=24),
    st.lists(st.integers(0, 6), min_size=4, max_size=4),
)
def test_best_channels_are_those_of_a_stable_sort(values, counts):
    scores, counts = np.reshape(values, (2, 2, 6)) * 1.0, np.reshape(counts, (2, 2))
    keep = best_channels(scores, counts)
    for place in np.ndindex(2, 2):
        order = sorted(range(6), key=lambda c: (-scores[place][c], c))
        assert np.flatnonzero(keep[place]).tolist() == sorted(order[: counts[place]])


def test_what_a_layer_frees_it_hands_out_itself_if_asked():
    counts = np.array([[5, 5, 5, 5], [7, 7, 7, 7]])
    given = {"d_expert": 12, "block": 4, "attribution": np.zeros((2, 4))}
    alone = redistribute(counts, **given, per_layer=True)
    assert alone.tolist() == [[8, 4, 4, 4], [8, 8, 8, 4]]
    # Together those that lost most come first, wherever they are.
    assert redistribute(counts, **given).tolist() == [[4, 4, 4, 4], [8, 8, 8, 8]]


@pytest.mark.parametrize("size", [1, 2, 3, 12])
def test_groups_score_their_mean(size):
    scores = np.random.default_rng(0).random((2, 3, 12))
    found = of_groups(scores, size)
    for layer, expert, channel in np.ndindex(*scores.shape):
        first = channel // size * size
        wanted = sum(scores[layer, expert, first : first + size]) / size
        assert found[layer, expert, channel] == pytest.approx(wanted, rel=1e-15)
