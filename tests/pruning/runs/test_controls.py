"""What a comparison by bytes measures, and how many channels a size leaves each rule."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from convert.checkpoint import open_checkpoint
from convert.export import Export
from convert.export_format import ExportFormat
from moe_jax.errors import InputError
from pruning.budget.rules import RULES
from pruning.recipe.recipe import CompressionRecipe
from pruning.report.compared import AUTO
from pruning.runs.calibration_sets import drawn
from pruning.runs.compared_sizes import most_channels, rounded_recipe
from pruning.runs.compared_task import Task
from pruning.runs.controls import Controls, tasks
from pruning.shrink.fewer_experts import Fewer
from pruning.stages.job import Job, resolved
from pruning.stages.sizes import folder_bytes
from pruning.text.calibration import TokenBatch
from tests.pruning.runs.test_native import kimi
from tests.support import tiny

DIGITS = 200  # bytes, a tenth of a block of channels
RULE_NAMES = ("fair-shapley", "uniform-act", "experts-ala", "experts-ala-layer")


@pytest.fixture(scope="module")
def job(models) -> Any:
    base = open_checkpoint(models / "single")
    recipe = CompressionRecipe(model=str(models / "single"), output="o", bits=16, planner="fair",
                               repair="none", block=32)  # fmt: skip
    return SimpleNamespace(base=base, recipe=resolved(recipe, base.about))


def bytes_of(job, form: str, counts: np.ndarray) -> int:
    widths, rows = [], iter(counts.tolist())
    for own in job.base.about.widths:
        widths.append(tuple(next(rows)) if own else ())
    return Export(job.base.about, tuple(widths), ExportFormat(form, 32)).nbytes


@pytest.mark.parametrize("form", ["ragged-bf16", "ragged-int4"])
@pytest.mark.parametrize("step", [32, 64, 1024])
def test_a_size_holds_as_many_channels_as_any_plan_of_them_fits_in(job, form, step):
    c = job.base.config
    layers, experts, width = len(c.moe_layers), c.moe.num_experts, c.moe.d_expert
    total = layers * experts * width

    def spread(channels: int) -> np.ndarray:  # over as many experts as there can be: most headers
        blocks = np.arange(layers * experts) < channels // 32
        more = np.arange(layers * experts) < channels // 32 - layers * experts
        return (32 * (blocks.astype(int) + more)).reshape(layers, experts)

    sizes = {n: bytes_of(job, form, spread(n)) for n in range(step, total + 1, step)}
    for channels, size in sizes.items():
        if channels // 32 < layers * c.moe.experts_per_token:
            continue  # fewer experts than a token needs is no plan
        # The bound is told before there is a plan: numbers in headers may have more digits.
        assert most_channels(job, form, size + DIGITS, step) == channels
        assert most_channels(job, form, size - 1, step) < channels
    assert most_channels(job, form, 10**9, step) == total
    assert most_channels(job, form, 100, step) == 0


def test_every_rule_has_a_row_for_each_of_the_bits_and_one_without_pruning_for_fewer(job):
    controls = Controls(rates=(0.5,), bits=(16, 4), repair="expert")
    found = tasks(job, ("uniform-act", "fair-act"), controls)
    whole, half = 2 * 8 * 64, 8 * 64
    assert found == {
        Task("unpruned", 0.0, bits=4): whole,
        **{Task(name, 0.5, 0, how, bits): half
           for how in ("", "expert") for name in ("uniform-act", "fair-act") for bits in (16, 4)},
    }  # fmt: skip
    fewer = Controls(bits=(16, 4), top_k=(1, 1), skip_below=(0.5,))
    assert tasks(job, ("uniform-act",), fewer) == {
        Task("unpruned", 0.0, bits=bits, top_k=k, skip_below=share): whole
        for k, share in ((0, 0.0), (1, 0.0), (2, 0.5)) for bits in (16, 4)
    }  # fmt: skip
    merging = Controls(rates=(0.5,), bits=(16, 4), merges=("ream", "hc-smoe"), draws=2)
    merges = {task: kept for task, kept in tasks(job, (), merging).items() if task.is_merged}
    assert merges == {Task(name, 0.5, bits=bits): half  # of the calibration text itself alone
                      for name in ("ream", "hc-smoe") for bits in (16, 4)}  # fmt: skip
    names, cut = ("fair-act", "experts-ala", "mone"), Controls(rates=(0.5,), repair="layer",
                                                               cut_router=True)  # fmt: skip
    assert [(t.rule, t.repair) for t in tasks(job, names, cut) if t.cut] == [("experts-ala", "")]
    seeds = {task.seed for task in tasks(job, ("random",), Controls(rates=(0.5,)))}
    assert seeds == set(RULES["random"].seeds)


def test_each_layer_has_bits_of_its_own_at_sizes_alone_and_of_rules_that_are_not_of_chance(job):
    controls = Controls(rates=(0.5,), bits=(AUTO, 16), target_bytes=[7], repair="layer")
    assert controls.stored == (16, 8, 4)
    found = tasks(job, ("uniform-act", "random"), controls)
    assert {task for task in found if task.bits == AUTO} == {
        Task("uniform-act", 0.0, 0, how, AUTO, 7) for how in ("", "layer")
    }
    assert {task.target for task in found if task.bits == AUTO} == {7}
    assert Task("uniform-act", 0.5) in found


def test_at_a_size_each_rule_removes_what_its_bits_leave_it_to_remove(job):
    dense = folder_bytes(job.base.about.folder)
    empty = np.zeros((2, 8), int)
    target = sum(bytes_of(job, "ragged-int4", empty + width) for width in (32, 64)) // 2
    found = tasks(job, RULE_NAMES, Controls(bits=(4,), target_bytes=[target]))
    kept = {task.rule: budget for task, budget in found.items() if task.target}
    assert {task.rule for task in found if not task.target} == {"unpruned"}
    assert kept["uniform-act"] == 8 * 64 and kept["fair-shapley"] > 8 * 64
    assert kept["experts-ala"] % 64 == 0 and kept["experts-ala-layer"] % 128 == 0
    for task, budget in found.items():
        assert task.rate == round(1 - budget / (2 * 8 * 64), 6)
    # A size that rounding alone keeps to needs no rule, one below all plans leaves none.
    large = tasks(job, RULE_NAMES, Controls(bits=(4,), target_bytes=[dense]))
    assert set(large) == {Task("unpruned", 0.0, bits=4), Task("unpruned", 0.0, 0, "", 4, dense)}
    small = tasks(job, ("uniform-act",), Controls(target_bytes=[1000]))
    assert small == {Task("uniform-act", 1.0, 0, "", 16, 1000): 0}
    assert Controls(target_factors=[2.0, 4.0], target_bytes=[7]).targets(job) == [
        7, dense // 2, dense // 4
    ]  # fmt: skip


def test_a_draw_has_as_many_windows_some_of_them_twice(job, tmp_path):
    tokens = np.arange(60, dtype=np.int32).reshape(12, 5)
    text = TokenBatch(tokens, tokens >= 0, ({"path": "a", "sha256": "x"},), tokens % 2 > 0,
                      np.arange(12) % 3)  # fmt: skip
    recipe = dataclasses.replace(job.recipe, output=str(tmp_path), seed=7)
    whole = Job(recipe, job.base, job.base, text, {})
    assert drawn(whole, 0) is whole
    one, again, other = (drawn(whole, draw) for draw in (1, 1, 2))
    assert one.output == tmp_path / "draws" / "1" and other.output == tmp_path / "draws" / "2"
    for found in (one, other):
        rows = found.calibration.tokens[:, 0] // 5
        assert len(rows) == 12 > len(set(rows.tolist())) > 4
        for part in ("tokens", "valid", "counted", "files"):
            wanted = getattr(text, part)[rows]
            np.testing.assert_array_equal(getattr(found.calibration, part), wanted)
    np.testing.assert_array_equal(one.calibration.tokens, again.calibration.tokens)
    assert (one.calibration.tokens != other.calibration.tokens).any()
    assert one.calibration.sources == ({"path": "a", "sha256": "x", "drawn": [7, 1]},)
    found = tasks(job, ("uniform-act",), Controls(rates=(0.5,), bits=(16, 4), draws=2))
    assert [(t.rule, t.draw, t.bits) for t in found] == [
        ("unpruned", 0, 4),
        *(("uniform-act", draw, bits) for draw in (0, 1, 2) for bits in (16, 4)),
    ]


@pytest.mark.parametrize(("given", "message"), [
    ({"bits": (4, AUTO)}, "'auto' are those of the least loss within a size; give one with --targ"),
    ({"bits": (AUTO,), "target_bytes": (9,), "draws": 3}, "measured on one calibration text"),
    ({"draws": 1}, r"draws=1 must lie in \[2, 100\]"), ({"draws": -1}, "draws=-1 must lie"),
    ({"bits": (5,)}, r"bits=\[5\] must be some of"), ({"bits": ()}, "must be some of"),
    ({"target_bytes": (0,)}, "target_bytes=0 must be at least 1"),
    ({"target_factors": (float("nan"),)}, r"target_factor=nan must lie in \[1, 1000\]"),
    ({"rates": (1.0,)}, r"prune_rate=1\.0"), ({"skip_below": (0.0,)}, "skip_below=0 skips no"),
    ({"top_k": (1, 0)}, "top_k=0 must be at least 1"),
    ({"merges": ("ream",), "target_bytes": (9,)}, "merged at prune rates; add --prune-rate"),
    ({"skip_below": (0.5, 2.0)}, r"skip_below=2\.0 must lie in \(0, 1\]"),
])  # fmt: skip
def test_what_is_out_of_range_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Controls(**given)


def test_as_many_experts_as_a_token_goes_to_are_not_fewer():
    for k in (4, 5):
        with pytest.raises(InputError, match=rf"top_k={k} must lie in \[1, 3\].* goes to 4 exp"):
            Controls(top_k=(1, k)).fewer(4)
    with pytest.raises(InputError, match="goes to one expert, so --skip-below skips none"):
        Controls(skip_below=(0.5,)).fewer(1)
    found = Controls(top_k=(3, 1), skip_below=(0.5, 1.0)).fewer(4)
    assert found == [Fewer(3), Fewer(1), Fewer(4, 0.5), Fewer(4, 1.0)]


def test_fewer_bits_take_blocks_of_whole_groups_and_models_whose_codes_are_not_their_own(
    job, models, tmp_path
):
    recipe = CompressionRecipe(model=str(models / "single"), output="o", bits=16, planner="fair",
                               repair="none")  # fmt: skip
    found = rounded_recipe(job, recipe, (16, 4))
    assert (found.group_size, found.block, found.minimum, found.bits) == (32, 32, 32, 16)
    with pytest.raises(InputError, match=r"block=8 must be a multiple of group_size=32"):
        rounded_recipe(job, dataclasses.replace(recipe, block=8), (4,))
    for name, folder, message in (
        ("gpt_oss", tiny.save(tiny.tiny_model("gpt_oss"), tmp_path / "oss"), "bits=4 is no format"),
        ("kimi", kimi(tmp_path / "kimi"), "whose codes ragged-int4 takes over"),
    ):
        base = open_checkpoint(folder)
        own = dataclasses.replace(recipe, model=str(folder))
        other: Any = SimpleNamespace(base=base, recipe=resolved(own, base.about))
        with pytest.raises(InputError, match=message):
            rounded_recipe(other, own, (16, 4))
        assert name
