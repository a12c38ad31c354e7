"""Size bounds, warnings and rehearsed plans hold whatever the statistics turn out to be."""

import dataclasses
import itertools
import re
import shutil

import numpy as np
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from convert import find_family
from convert.checkpoint import open_checkpoint
from convert.export import Export
from convert.export_format import FLOAT8, MIXED, ExportFormat
from pruning.budget.plan import PruningPlan
from pruning.budget.planners import PLANNERS
from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe, load_recipe
from pruning.scores.channel_criteria import CHANNEL_CRITERIA
from pruning.scores.expert_criteria import EXPERT_CRITERIA
from pruning.stages import preflight
from pruning.stages.job import open_job, resolved
from pruning.stages.remarks import say_texts
from pruning.stages.scoring_sizes import statistics_bytes
from pruning.stages.size_bounds import most_bytes
from tests.support.command import given, run

LAYERS, EXPERTS, WIDTH = 2, 8, 64
# Of blocks of 128 channels, and of bits that a plan says.
OTHERS = (FLOAT8, MIXED)
EXPORTS = [name for name in find_family("qwen2_moe").formats if name not in OTHERS]


def recipe(model, **changes) -> CompressionRecipe:
    c = open_checkpoint(model).config
    whole = CompressionRecipe(model=str(model), output="o", **changes)
    return whole.resolved(c.moe.d_expert, c.d_model, c.max_position)


@for_all(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_plan_exceeds_the_bound_that_is_checked_against_the_disk(models, data):
    """Random widths within the budget; a bound is wrong if any of them is larger."""
    name = data.draw(st.sampled_from(EXPORTS))
    block = data.draw(st.sampled_from([32, 64] if "-int" in name else [1, 8, 32, 64]))
    rate = data.draw(st.floats(0, 0.95))
    options = recipe(
        models / "single", export=(name,), prune_rate=rate, block=block, width="free",
        bits=ExportFormat(name).bits if "-int" in name else 16,
    )  # fmt: skip
    base = open_checkpoint(models / "single")
    blocks = round((1 - rate) * LAYERS * EXPERTS * WIDTH) // block
    counts = np.zeros(LAYERS * EXPERTS, int)
    order = data.draw(st.permutations(range(LAYERS * EXPERTS)))
    for expert in order:
        most = min(WIDTH // block, blocks - counts.sum() // block)
        counts[expert] = block * data.draw(st.integers(0, most))
    widths = tuple(tuple(row) for row in counts.reshape(LAYERS, EXPERTS).tolist())
    assert Export(base.about, widths, ExportFormat(name, 32)).nbytes <= most_bytes(
        base.about, options, name
    )


@pytest.mark.parametrize("name", EXPORTS)
def test_the_bound_is_reached_by_some_plan(models, name):
    bits = ExportFormat(name).bits if "-int" in name else 16
    options = recipe(models / "single", export=(name,), prune_rate=0.5, width="free", bits=bits)
    base = open_checkpoint(models / "single")
    # half of every expert for ragged folders; one whole expert (per layer) suffices for others
    equal = ((32,) * EXPERTS,) * LAYERS
    uneven = ((WIDTH,) + (0,) * (EXPERTS - 1),) * LAYERS
    widths = equal if name.startswith("ragged") else uneven
    exact = Export(base.about, widths, ExportFormat(name, 32)).nbytes
    # headers are bounded apart: a few digits per tensor are allowed for
    assert exact <= most_bytes(base.about, options, name) < 1.01 * exact


def test_statistics_are_as_large_as_foretold(models, scored):
    size, base = (
        (scored / "statistics.safetensors").stat().st_size,
        open_checkpoint(models / "single"),
    )
    foretold = statistics_bytes(base.about, recipe(models / "single", planner="fair"))
    assert 0 < size - foretold < 8192
    # A rule that is open has repair's own score measured too.
    auto = statistics_bytes(base.about, recipe(models / "single"))
    moe = base.config.moe
    assert auto - foretold == 8 * len(base.config.moe_layers) * moe.num_experts * moe.d_expert


@pytest.mark.parametrize("planner", PLANNERS)
def test_every_rule_that_can_be_planned_is_let_through(models, texts, tmp_path, planner):
    """A rehearsal on made-up sums must not refuse what real sums would allow."""
    job = open_job(
        CompressionRecipe(
            model=str(models / "single"),
            output=str(tmp_path / "out"),
            calibration=[str(texts / "good.txt")],
            planner=planner,
            gradients=True,
            expert_details=True,
            weight_gradients=True,
            obs=True,
            nll_ig=4,
            nll_ablate=True,
            nll_grad2=True,
        )
    )
    rules = [("act", name) for name in EXPERT_CRITERIA]
    rules += [(name, "ala") for name in CHANNEL_CRITERIA if name != "noise"]
    for criterion, attribution in rules:
        one = dataclasses.replace(job.recipe, criterion=criterion, attribution=attribution)
        preflight.rehearsed_plan(one, job.base.about)
    folders = {"model": job.recipe.model, "output": job.recipe.output}
    asked = CompressionRecipe(**folders, planner=planner, weights_only=True)
    without = resolved(asked, job.base.about)
    free = ([n for n, entry in registry.items() if entry.data_free]
            for registry in (CHANNEL_CRITERIA, EXPERT_CRITERIA))  # fmt: skip
    for criterion, attribution in itertools.product(*free):
        one = dataclasses.replace(without, criterion=criterion, attribution=attribution)
        preflight.rehearsed_plan(one, job.base.about)


@pytest.mark.parametrize(
    ("width", "cap", "wasteful"),
    [("free", None, 64), ("capped", 50, 48), ("experts", None, 64), ("layer", None, 64),
     ("uniform", None, 64)],
)  # fmt: skip
def test_padding_uneven_widths_is_said_to_waste_before_any_work(
    models, texts, tmp_path, capsys, width, cap, wasteful
):
    job = open_job(
        CompressionRecipe(
            model=str(models / "single"),
            output=str(tmp_path / "out"),
            calibration=[str(texts / "good.txt")],
            export=["padded-bf16", "layered-bf16", "ragged-bf16"],
            width=width,
            cap=cap,
            block=16,
            bits=16,
            prune_rate=0.5,
        )
    )
    preflight.prepare(job, Steps())
    shown = re.sub(r"\s+", " ", capsys.readouterr().err)
    padding = {"padded-bf16": (r"the widest", "one expert", "uniform")}
    padding["layered-bf16"] = (r"the widest of its layer", "one expert of every layer", "layer")
    silent = {"layer": ["layered-bf16"], "uniform": list(padding)}.get(width, [])
    base = open_checkpoint(models / "single")
    unpruned = ", as without pruning" if wasteful == WIDTH else ""
    for name, (widest, one, cure) in padding.items():
        found = re.search(
            rf"{name} with --width {width} stores every expert as wide as {widest}: (\S+) kB if "
            rf"all have 32 channels, (\S+) kB if {one} keeps {wasteful}{unpruned}; "
            rf"--width {cure} ensures",
            shown,
        )
        assert (found is None) == (name in silent), shown
        for text, stored in zip(found.groups() if found else (), (32, wasteful), strict=False):
            exact = Export(base.about, ((stored,) * EXPERTS,) * LAYERS, ExportFormat(name)).nbytes
            assert float(text) == pytest.approx(exact / 1e3, abs=0.051)
    assert "ragged-bf16 with" not in shown


def test_exact_sizes_are_said_before_exporting(scored, tmp_path, capsys):
    out = shutil.copytree(scored, tmp_path / "out")
    assert run("export", out, "--export", "padded-bf16") == 0
    found = re.search(r"padded-bf16: (\S+) kB", capsys.readouterr().err)
    (file,) = (out / "exports" / "padded-bf16").glob("*.safetensors")
    assert found and abs(file.stat().st_size / 1e3 - float(found[1])) < 0.06


def test_an_export_that_saves_nothing_says_so_and_what_would(scored, tmp_path, capsys):
    out = shutil.copytree(scored, tmp_path / "out")

    def said(*flags) -> str:
        assert run("plan", out, "--prune-rate", 0.25, *flags) == 0
        capsys.readouterr()
        names = ("padded-bf16", "layered-bf16", "ragged-bf16")
        assert run("export", out, "--overwrite", "--export", *names) == 0
        return re.sub(r"\s+", " ", capsys.readouterr().err)

    (layer, *_) = open_checkpoint(load_recipe(out / "recipe.yaml").model).config.moe_layers
    shown = said("--skip-layers", layer, "--width", "layer")
    assert (
        "padded-bf16 is as large as without pruning: an expert of the model keeps all 64 channels, "
        "and padding makes the others as wide; export a ragged format, or plan with --width uniform"
    ) in shown
    assert "layered-bf16 is as large" not in shown and "ragged-bf16 is as large" not in shown
    assert "as large as" not in said("--width", "capped", "--cap", 63, "--block", 1)
    shown = said("--planner", "cd_moe", "--width", "free")  # whole experts in every layer
    assert "an expert of every layer keeps all 64 channels" in shown and "--width layer" in shown


@pytest.mark.slow
def test_little_text_and_nothing_to_evaluate_are_said_before_the_work(
    models, texts, tmp_path, capsys
):
    def said(*flags) -> str:
        capsys.readouterr()
        command = ("compress", models / "single", "--output", tmp_path / str(len(shown)))
        usual = ("--bits", 16, "--batch", 4, "--planner", "fair")  # as elsewhere: compiled once
        assert run(*command, *usual, *flags) == 0
        shown.append(capsys.readouterr().err)
        return re.sub(r"\s+", " ", shown[-1].partition("check weights")[0])

    shown: list[str] = []
    good = texts / "good.txt"
    few = said("--calibration", good, "--max-tokens", 128, "--window", 64)
    assert (
        "128 calibration tokens are little: an expert sees about 32 of them and has 64 channels, "
        "so scores are noisy; give 256 or more" in few
    )
    assert "nothing is evaluated: there is no --evaluation text" in few
    many = said("--calibration", good, "--max-tokens", 256, "--window", 64, "--evaluation", good)
    assert "are little" not in many and "nothing is evaluated" not in many


def test_the_demo_has_text_enough(capsys):
    say_texts(open_job(CompressionRecipe(model="demo", output="o")), Steps(), evaluates=True)
    assert capsys.readouterr().err == ""


def test_of_a_large_file_the_part_that_is_read_is_said(models, texts, capsys):
    job = open_job(CompressionRecipe(model=str(models / "single"), output="o",
                                     calibration=[str(texts / "good.txt")]))  # fmt: skip
    for part, words in (("beginning", "its first 256 MiB"), ("spread", "spread over all of it")):
        notes = ({**job.calibration.sources[0], "part": part},)
        calibration = dataclasses.replace(job.calibration, sources=notes)
        say_texts(dataclasses.replace(job, calibration=calibration), Steps(), evaluates=True)
        assert words in re.sub(r"\s+", " ", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("width", [[], ["--width", "free"], ["--width", "uniform"]])
@pytest.mark.parametrize("block", [[], ["--block", "32"], ["--minimum", "32"]])
def test_plans_and_exports_agree_under_every_mix_of_flags(scored, tmp_path, width, block):
    """Each export of each plan is written at the plan's widths, whichever flags were left out."""
    out = shutil.copytree(scored, tmp_path / "out")
    assert run("--quiet", "plan", out, "--prune-rate", 0.5, *width, *block) == 0
    plan = PruningPlan.load(out)
    assert plan.counts.sum() <= LAYERS * EXPERTS * WIDTH // 2
    if width == ["--width", "uniform"]:
        assert len(np.unique(plan.counts)) == 1
    assert run("--quiet", "export", out, "--overwrite", "--export", *EXPORTS) == 0
    widths = tuple(map(tuple, plan.counts.tolist()))
    shapes = {
        "ragged": widths,
        "layered": tuple((max(counts),) * EXPERTS for counts in widths),
        "padded": ((max(map(max, widths)),) * EXPERTS,) * LAYERS,
    }
    for name in EXPORTS:
        stored = open_checkpoint(out / "exports" / name).about.widths
        assert stored == shapes[name.partition("-")[0]], name


def test_several_rates_make_several_plans_and_one_rate_makes_one(scored, tmp_path):
    out = shutil.copytree(scored, tmp_path / "out")
    assert run("--quiet", "plan", out, "--prune-rate", 0, 0.25, "--prune-rate", 0.5) == 0
    kept = {p.name: PruningPlan.load(p).counts.sum() for p in (out / "plans").iterdir()}
    assert kept == {"0.0": 1024, "0.25": 768, "0.5": 512}
    # without a rate, that of the recipe
    assert run("--quiet", "plan", out) == 0
    assert PruningPlan.load(out).counts.sum() == 768


def test_gradients_scored_once_serve_the_criteria_that_need_them(models, texts, tmp_path):
    arguments = (models / "single", *given(texts, tmp_path / "out"), "--gradients")
    assert run("--quiet", "score", *arguments, "--criterion", "taylor") == 0
    assert run("--quiet", "plan", tmp_path / "out", "--criterion", "fisher") == 0


def test_verifying_lets_no_other_program_write_to_stderr(scored, tmp_path, capfd):
    from transformers.utils import logging

    out = shutil.copytree(scored, tmp_path / "out")
    assert run("--quiet", "export", out, "--export", "padded-int4") == 0
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    capfd.readouterr()
    try:
        assert run("--quiet", "verify", out) == 0
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(level)
        if not bars:
            logging.disable_progress_bar()
    shown = capfd.readouterr()
    assert shown.err == "" and "logits in transformers" in shown.out
