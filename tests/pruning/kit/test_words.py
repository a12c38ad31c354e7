"""Sizes, shares and times read the same wherever they stand."""

import pytest

from pruning.kit.words import amount, duration, megabytes, millions, percent


def test_bytes_are_decimal_megabytes_and_small_ones_kilobytes():
    assert megabytes(16_317_800) == "16.3" and megabytes(2_500_000_000) == "2,500.0"
    assert amount(16_317_800) == "16.3 MB" and amount(5_320_000) == "5320.0 kB"


def test_counts_and_shares():
    assert millions(8_145_664) == "8.15 M"
    assert percent(0.8354) == "83.5%" and percent(0.5, 0) == "50%" and percent(None) == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2.0 minutes"), (7199, "120.0 minutes"),
     (7200, "2.0 hours"), (200_000, "2.3 days")],
)  # fmt: skip
def test_a_time_has_the_largest_unit_of_which_there_are_two(seconds, words):
    assert duration(seconds) == words
