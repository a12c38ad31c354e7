"""Statistics survive their files, and damaged files are refused."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pruning.scores.own import STATISTICS, Statistic
from pruning.scores.statistics import (
    ChannelStatistics,
    field_shapes,
    load_statistics,
    save_statistics,
)
from tests.support.synthetic import statistics


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "statistics.safetensors"
    save_statistics(path, statistics(2, 3, 4), {"model_hash": "abc", "texts": ["a", "ü"]})
    return path


@pytest.mark.parametrize("details", [True, False])
def test_every_sum_and_the_provenance_come_back(tmp_path, details):
    saved = statistics(2, 3, 4, gradients=details, expert_details=details)
    path = tmp_path / "statistics.safetensors"
    save_statistics(path, saved, {"model_hash": "abc", "texts": ["a", "ü"]})
    loaded, provenance = load_statistics(path)
    assert loaded.groups == saved.groups
    for field in dataclasses.fields(saved):
        if getattr(saved, field.name) is None:
            assert getattr(loaded, field.name) is None
            continue
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(saved, field.name))
        # comparing broadcasts, so that a scalar which came back as a vector would pass
        assert np.shape(getattr(loaded, field.name)) == np.shape(getattr(saved, field.name))
    assert float(loaded.total_tokens) == 100.0
    assert loaded.hidden_square.dtype == np.float64
    assert loaded.shape == (2, 3, 4) and ("gradients" in loaded.groups) is details
    assert provenance["model_hash"] == "abc" and provenance["texts"] == ["a", "ü"]
    assert {file.name for file in tmp_path.iterdir()} == {
        "statistics.safetensors", "statistics.json",
    }  # fmt: skip


def test_saving_again_replaces_both_files(path):
    save_statistics(path, statistics(1, 2, 3, seed=1), {"model_hash": "def"})
    loaded, provenance = load_statistics(path)
    assert loaded.shape == (1, 2, 3) and provenance["model_hash"] == "def"


def test_arrays_that_are_not_contiguous_are_saved_by_value(tmp_path):
    saved = statistics(2, 3, 4)
    turned = saved.replace(energy=saved.energy.transpose(0, 2, 1).copy().transpose(0, 2, 1))
    assert not turned.energy.flags.c_contiguous
    save_statistics(tmp_path / "s.safetensors", turned, {})
    loaded, _ = load_statistics(tmp_path / "s.safetensors")
    np.testing.assert_array_equal(loaded.energy, saved.energy)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_missing_file_is_named_with_the_command_that_writes_it(path, suffix):
    gone = path.with_suffix(suffix)
    gone.unlink()
    with pytest.raises(
        ValueError, match=rf"statistics\{suffix} does not exist.*moe-compress score"
    ):
        load_statistics(path)


def test_notes_that_are_not_json_are_refused(path):
    notes = path.with_suffix(".json")
    notes.write_text(notes.read_text(encoding="utf-8")[:20], encoding="utf-8")
    with pytest.raises(ValueError):
        load_statistics(path)


@pytest.mark.parametrize("format", [None, 0, 1, "2"])
def test_another_format_is_refused(path, format):
    notes = path.with_suffix(".json")
    header = json.loads(notes.read_text(encoding="utf-8"))
    notes.write_text(json.dumps(header | {"format": format}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"format=.*expected 2; score again"):
        load_statistics(path)


def test_missing_and_unexpected_arrays_are_named(path):
    arrays = load_file(path)
    del arrays["energy"]
    save_file(arrays | {"surplus": np.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"missing \['energy'\], unexpected \['surplus'\]"):
        load_statistics(path)


def test_the_announced_shapes_are_fields_of_the_statistics():
    groups = ("gradients", "expert-details", "weight-gradients", "obs")
    groups += ("nll-ig", "nll-ablate", "nll-grad2", "weights-only")
    shapes = field_shapes(2, 3, 4, 5, groups)
    fields = {field.name for field in dataclasses.fields(ChannelStatistics)}
    assert shapes.keys() == fields - {"extra"}
    sums = field_shapes(2, 3, 4, 5, groups, finished=False)
    # what is left over is no sum over tokens
    left = FINISHED | FIRST
    assert shapes.keys() - sums.keys() == left
    assert shapes["energy"] == (2, 3, 4) and shapes["output_sum"] == (2, 3, 5)
    assert shapes["output_gram"] == (2, 3, 3) and shapes["total_tokens"] == ()


def two_texts(**changes):
    """Statistics of two texts under one model, whose norms they share."""
    one = statistics(2, 3, 4)
    norms = {name: getattr(one, name) for name in NORMS}
    return one, statistics(2, 3, 4, seed=1, **{**norms, **changes})


# Of the weights, the same for every text; no sums; what the first text has stands for both.
NORMS = {"down_norm", "up_norm", "gate_norm", "down_l1", "up_l1", "gate_l1"}
FINISHED = {"wanda_up", "wanda_gate", "routed_wanda_up", "routed_wanda_gate",
            "weight_gradient", "elimination"}  # fmt: skip
FIRST = {"similarity", "noise"}


def test_merged_statistics_are_the_sums_of_both_and_keep_what_is_of_the_weights():
    one, two = two_texts()
    both = one.merge(two)
    for name in {field.name for field in dataclasses.fields(one)} - {"extra"}:
        mine, other, found = (getattr(each, name) for each in (one, two, both))
        if name in FINISHED or mine is None:
            assert found is None, name
        elif name in NORMS | FIRST:
            np.testing.assert_array_equal(found, mine)
        else:
            np.testing.assert_array_equal(found, mine + other, err_msg=name)


def test_statistics_of_two_models_or_modes_are_not_merged():
    one, two = two_texts()
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\).*cannot be merged.*\(2, 3, 5\)"):
        one.merge(statistics(2, 3, 5))
    with pytest.raises(ValueError, match="cannot be merged"):
        one.merge(statistics(2, 3, 4, gradients=False))
    for name in sorted(NORMS):
        _, other = two_texts(**{name: getattr(two, name) + 1.0})
        with pytest.raises(ValueError, match="other model weights"):
            one.merge(other)


def test_an_array_of_ones_own_is_announced_under_its_prefix(monkeypatch):
    monkeypatch.setitem(STATISTICS, "peak", Statistic(lambda rows: rows.weight, "LE"))
    shapes, known = field_shapes(2, 3, 4), {f.name for f in dataclasses.fields(ChannelStatistics)}
    assert {name: shape for name, shape in shapes.items() if name not in known} == {
        "extra.peak": (2, 3)
    }


def test_more_than_was_asked_for_covers_it_and_less_does_not(monkeypatch):
    found = statistics(1, 2, 3, expert_details=False)
    assert found.covers(()) and found.covers(("gradients",)) and found.covers(iter(found.groups))
    assert not found.covers(("gradients", "nll-ig"))
    extra = {"mine": np.ones((1, 2)), "older": np.ones((1, 2))}
    assert found.replace(extra=extra).covers(())
    monkeypatch.setitem(STATISTICS, "mine", STATISTICS.get("mine"))
    assert not found.covers(()) and found.replace(extra=extra).covers(())


def test_details_of_an_earlier_version_that_lack_a_sum_do_not_count():
    found = statistics(1, 2, 3)
    assert found.covers(("expert-details",))
    earlier = found.replace(weighted_input_square=None, routed_wanda_up=None)
    assert earlier.groups == found.groups - {"expert-details"}
    # What is made of the sums in the end parts of a text do not have.
    assert found.replace(wanda_up=None).groups == found.groups


def test_long_damage_is_told_in_short(path):
    header = json.dumps({"energy": {"dtype": "X" * 3000, "shape": [], "data_offsets": [0, 0]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(ValueError, match=r"is damaged \(.*\); remove it and score again") as error:
        load_statistics(path)
    told = str(error.value).partition("is damaged (")[2].rpartition("); remove it")[0]
    assert len(told) == 1000
