"""Differences of two models on the same documents, and what chance would do."""

import json

import numpy as np
import pytest
import scipy.stats

from pruning.measure.paired import compare_results, mcnemar


@pytest.mark.parametrize("gained", [0, 1, 3, 8, 40])
@pytest.mark.parametrize("lost", [0, 1, 2, 8, 55])
def test_the_probability_is_that_of_an_exact_test_of_both_sides(gained, lost):
    expected = 1.0
    if gained + lost:
        expected = scipy.stats.binomtest(gained, gained + lost, 0.5).pvalue
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-12)


def results(values, metric="acc", kind="none", **more) -> dict:
    """As the harness has them, of one task with these values by document."""
    samples = [
        {"doc_id": document, "filter": kind, metric: value} for document, value in values.items()
    ]
    numbers = [value for value in values.values() if not isinstance(value, tuple)]
    mean = float(np.mean(numbers)) if numbers else 2.5
    found = {"alias": "t", "sample_len": len(values), f"{metric},{kind}": mean,
             f"{metric}_stderr,{kind}": "N/A", **more}  # fmt: skip
    return {"results": {"t": found}, "samples": {"t": samples}}


def test_documents_are_paired_by_their_number_in_any_order():
    first = {number: number % 2 for number in range(20)}
    second = {number: int(number % 2 or number < 5) for number in reversed(range(20))}
    (row,) = compare_results(results(first), results(second))
    change = np.array([second[n] - first[n] for n in range(20)])
    assert (row.documents, row.gained, row.lost) == (20, 3, 0)
    assert row.difference == pytest.approx(0.15) and row.first == 0.5
    assert row.error == pytest.approx(scipy.stats.sem(change)) and row.first_error is None
    assert row.p == 0.25 and row.is_noise is True and row.to_dict()["within_noise"] is True


def test_a_difference_of_more_than_two_errors_is_no_noise_and_none_at_all_is():
    right = dict.fromkeys(range(30), 1)
    wrong = {number: int(number > 6) for number in right}
    (row,) = compare_results(results(right), results(wrong))
    assert row.lost == 7 and row.is_noise is False
    (same,) = compare_results(results(right), results(right))
    assert same.error == 0 and same.is_noise is True and same.p == 1


def test_measures_that_are_not_right_or_wrong_have_an_error_and_no_flips():
    first, second = {0: 0.25, 1: 0.5, 2: 1.0}, {0: 0.5, 1: 0.5, 2: 0.0}
    (row,) = compare_results(results(first, "f1", "strict"), results(second, "f1", "strict"))
    assert row.metric == "f1,strict" and row.documents == 3
    assert row.error == pytest.approx(scipy.stats.sem([0.25, 0, -1]))
    assert row.gained is row.lost is row.p is None


MADE = {
    "bits_per_byte": lambda total: -total / np.log(2),
    "byte_perplexity": lambda total: np.exp(-total),
    "word_perplexity": lambda total: np.exp(-total),
    "perplexity": lambda total: np.exp(-total),
}


@pytest.mark.parametrize("metric", MADE)
def test_the_error_of_a_perplexity_is_that_of_leaving_documents_out(metric):
    draw = np.random.default_rng(1)
    count, made = 400, MADE[metric]
    weight = np.ones(count) if metric == "perplexity" else draw.integers(20, 60, count)
    one = -weight * draw.uniform(0.8, 1.4, count)
    two = one - weight * draw.uniform(0.0, 0.1, count)

    def found(total) -> dict:
        rows = total if metric == "perplexity" else map(tuple, np.stack([total, weight], 1))
        known = results(dict(enumerate(rows)), metric)
        known["results"]["t"][f"{metric},none"] = float(made(total.sum() / weight.sum()))
        return known

    (row,) = compare_results(found(one), found(two))
    out = [
        made(np.delete(two, i).sum() / np.delete(weight, i).sum())
        - made(np.delete(one, i).sum() / np.delete(weight, i).sum())
        for i in range(count)
    ]
    expected = np.sqrt((count - 1) / count * np.sum(np.square(out - np.mean(out))))
    assert row.error == pytest.approx(expected, rel=0.01)
    assert row.documents == count and row.is_noise is False and row.gained is None


def test_a_measure_that_is_made_otherwise_stands_without_an_error():
    one = results({0: (-3.0, 5), 1: (-4.0, 6)}, "mcc")
    (row,) = compare_results(one, one)
    assert (row.documents, row.error, row.is_noise, row.difference) == (0, None, None, 0)
    median = results({0: 1.0, 1: 2.0, 2: 9.0}, **{"acc,none": 2.0})
    assert compare_results(median, median)[0].error is None


def test_numbers_of_numpy_become_plain_ones():
    one, two = (results({number: right for number in range(9)}) for right in (0, 1))
    for found in (one, two):
        values = found["results"]["t"]
        values |= {"acc,none": np.float64(values["acc,none"]), "acc_stderr,none": np.float64(0.1)}
    (row,) = compare_results(one, two)
    assert json.loads(json.dumps(row.to_dict()))["within_noise"] is False


def test_one_document_has_no_error_and_what_is_no_number_no_row():
    (row,) = compare_results(results({4: 1}), results({4: 0}))
    assert (row.documents, row.error, row.lost) == (1, None, 1)
    odd = results({0: 1, 1: 0}, **{"mcc,none": float("nan"), "note,none": "text"})
    assert [row.metric for row in compare_results(odd, odd)] == ["acc,none"]
