"""The options of the planner through the command line, on a tiny model."""

import shutil

import numpy as np
import pytest

from convert.checkpoint import open_checkpoint
from pruning.budget.outliers import super_channels
from pruning.budget.plan import PruningPlan
from pruning.scores.statistics import load_statistics
from tests.support.command import run
from tests.support.plans import plan_of
from tests.support.synthetic import statistics

WIDTH, EXPERTS, LAYERS = 64, 8, 2


@pytest.fixture
def out(scored, tmp_path):
    return shutil.copytree(scored, tmp_path / "out")


def planned(out, *flags) -> PruningPlan:
    assert run("--quiet", "plan", out, *flags) == 0
    return PruningPlan.load(out)


@pytest.mark.parametrize(
    "flags",
    [
        ["--weights", "equal", "--planner", "linear"],
        ["--rho-max", 0.9, "--smoothing", "huber", "--passes", 4],
        ["--layer-loss", "attribution", "--planner", "paper"],
        ["--align", "dp", "--per-layer"],
        ["--align", "hull", "--planner", "fair2"],
        ["--align", "paper_scores", "--block", 8, "--minimum", 8],
    ],
)
def test_planner_options_reach_the_plan_and_keep_the_budget(out, flags):
    plan = planned(out, "--prune-rate", 0.5, *flags)
    assert plan.counts.sum() == LAYERS * EXPERTS * WIDTH // 2
    said, asked = {**plan.provenance, **plan.provenance["planner_options"]}, {}
    for flag, value in zip(flags, [*flags[1:], None], strict=True):
        if str(flag).startswith("--"):
            wanted = True if value is None else value
            assert said[flag[2:].replace("-", "_")] == wanted
            asked[flag[2:].replace("-", "_")] = wanted
    statistics, _ = load_statistics(out / "statistics.safetensors")
    given = {name: plan.provenance[name] for name in ("block", "minimum", "experts_per_token")}
    same = plan_of(statistics, prune_rate=0.5, **given | asked)
    np.testing.assert_array_equal(plan.keep, same.keep)
    plain = plan_of(statistics, prune_rate=0.5, **given)
    assert (plan.keep != plain.keep).any(), "options that change nothing tell nothing"
    assert said["coverage_aligned"] <= said["coverage_optimum"] + 1e-12


def test_every_width_policy_does_what_it_is_called(out):
    capped = planned(out, "--prune-rate", 0.5, "--width", "capped", "--cap", 48, "--block", 16)
    assert capped.counts.max() <= 48
    layer = planned(out, "--prune-rate", 0.5, "--width", "layer", "--block", 16)
    assert all(len(set(row)) == 1 for row in layer.counts.tolist())
    experts = planned(out, "--prune-rate", 0.5, "--width", "experts")
    assert set(experts.counts.flat) == {0, WIDTH} and experts.counts.sum() == 512
    both = planned(out, "--prune-rate", 0.5, "--width", "combined", "--expert-rate", 0.25,
                   "--block", 16)  # fmt: skip
    assert (both.counts == 0).sum() >= 4 and both.counts.sum() == 512


def test_layers_are_left_alone_or_pruned_at_their_own_rate(out):
    plan = planned(out, "--prune-rate", 0.25, "--skip-layers", 1)
    assert (plan.counts[1] == WIDTH).all() and plan.counts[0].sum() == 256
    plan = planned(out, "--prune-rate", 0.25, "--layer-rate", "0=0.125")
    assert plan.counts.sum(axis=1).tolist() == [448, 320]


@pytest.mark.parametrize("width", [[], ["--width", "layer"], ["--width", "experts"]])
def test_a_size_is_met_by_the_written_export(out, width):
    dense = planned(out, "--prune-rate", 0)
    assert dense.keep.all()
    assert run("--quiet", "export", out, "--overwrite") == 0
    (file,) = (out / "exports" / "ragged-bf16").glob("*.safetensors")
    # a third of the experts' bytes fewer: three matrices of D = 32 columns, two bytes each
    target = file.stat().st_size - 1024 * 3 * 32 * 2 // 3
    plan = planned(out, "--target-bytes", target, "--block", 16, *width)
    assert run("--quiet", "export", out, "--overwrite") == 0
    (file,) = (out / "exports" / "ragged-bf16").glob("*.safetensors")
    step = {"experts": WIDTH, "layer": 16 * EXPERTS}.get(width[-1] if width else "", 16)
    assert file.stat().st_size == plan.provenance["cost"]
    assert 0 <= target - file.stat().st_size < step * 3 * 32 * 2 + 1024


def test_a_factor_is_met_by_the_bytes_that_are_written(out, models):
    dense = sum(file.stat().st_size for file in (models / "single").glob("*.safetensors"))
    plan = planned(out, "--target-factor", 2.4, "--block", 16)
    assert run("--quiet", "export", out, "--overwrite") == 0
    (file,) = (out / "exports" / "ragged-bf16").glob("*.safetensors")
    assert 0 <= dense / 2.4 - file.stat().st_size < 16 * 3 * 32 * 2 + 1024
    assert plan.provenance["target"] == int(dense / 2.4)
    assert "target_factor: null" in (out / "recipe.yaml").read_text()  # bytes, whatever moves


def test_parameters_are_met_to_one_block(out, models):
    base = open_checkpoint(models / "single")
    plan = planned(out, "--target-parameters", "50000", "--block", 16)
    assert plan.provenance["target_unit"] == "parameters"
    assert 0 <= 50000 - plan.provenance["cost"] < 16 * 3 * base.config.d_model


def test_an_unreachable_size_names_the_nearest(out, capsys):
    assert run("--quiet", "plan", out, "--target-bytes", "1KB") == 2
    assert "the smallest feasible plan takes" in capsys.readouterr().err


def test_a_planted_super_channel_is_found_kept_and_named():
    stats = statistics(3, 4, 12)
    hidden = np.array(stats.hidden_square)
    # In the expert that any planner would empty first.
    hidden[1, 2, 5] *= 1e9
    expert = np.array(stats.phi)
    expert[1] = [5.0, 4.0, 0.0, 3.0]
    stats = stats.replace(hidden_square=hidden, phi=expert)
    for block in (1, 3):
        plan = plan_of(stats, criterion="act", prune_rate=0.8, experts_per_token=1, block=block)
        assert plan.provenance["super_channels"] == [[1, 2, 5]]
        assert plan.provenance["super_channels_removed"] == 0 and plan.keep[1, 2, 5]


@pytest.mark.parametrize("width", ["free", "uniform", "layer"])
def test_a_criterion_blind_to_outputs_still_keeps_the_channel_that_carries_a_layer(width):
    stats = statistics(3, 4, 12)
    energy, norm = np.array(stats.energy), np.array(stats.up_norm)
    energy[1, 2, 5] *= 1e9
    norm[1, 2, 5] *= 1e-3  # by its weights the least of all
    stats = stats.replace(energy=energy, up_norm=norm)
    given = {"prune_rate": 0.5, "experts_per_token": 1, "width": width}
    plan = plan_of(stats, criterion="weight", **given)
    assert plan.provenance["super_channels"] == [[1, 2, 5]] and plan.keep[1, 2, 5]
    bare = plan_of(stats.replace(energy=np.array(statistics(3, 4, 12).energy)),
                        criterion="weight", **given)  # fmt: skip
    assert not bare.keep[1, 2, 5] and bare.counts.sum() == plan.counts.sum()
    chance = plan_of(stats, criterion="random", **given)
    assert chance.provenance["super_channels"] == []


def test_heavy_tails_alone_make_no_super_channel():
    channel = np.random.default_rng(0).lognormal(sigma=1.5, size=(2, 16, 256))
    assert not super_channels(channel).any()
    assert not super_channels(np.zeros((1, 2, 3))).any()


def test_experts_that_saw_few_tokens_are_listed():
    stats = statistics(2, 4, 12)
    tokens = np.full((2, 4), 50.0)
    tokens[1, 3], tokens[0, 0] = 31.0, 0.0
    plan = plan_of(stats.replace(tokens=tokens), prune_rate=0.5, experts_per_token=1)
    assert plan.provenance["starved_experts"] == [[0, 0], [1, 3]]
    assert plan.provenance["starved_share"] == 0.25
