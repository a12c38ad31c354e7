"""Repair in whole runs of the command line: what compress, export, verify and apply do with it."""

import dataclasses
import json
import shutil
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from moe_jax.errors import InputError
from pruning import apply_plan, estimate
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe, load_recipe
from pruning.report.compression import CompressionReport
from pruning.stages import repair as repair_stage
from pruning.stages import verify as verifying
from pruning.stages.client import Answer
from pruning.stages.job import open_job
from pruning.stages.made_by import MADE_BY
from tests.support.command import given, refused, run

EXPORT = "ragged-bf16"
WORDS = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs! "


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = np.random.default_rng(0)
    words = WORDS.split()
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(rng.choice(words, 400)))
    return path


@pytest.fixture(scope="module", autouse=True)
def _without_transformers():
    """Other tests ask it about exports, at ten seconds each."""
    patch = pytest.MonkeyPatch()
    patch.setattr(verifying, "client_answer", lambda *_: Answer(undone="of no interest here"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def out(models, text, tmp_path_factory):
    """A run that repairs as by default."""
    out = tmp_path_factory.mktemp("repaired") / "out"
    arguments = (*arguments_of(models, text, out), "--repair", "layer")
    assert run(*arguments, "--bits", 16) == 0
    return out


def arguments_of(models, text, out) -> tuple:
    return (
        "compress", models / "single", *given(text.parent, out, text.name), "--prune-rate", 0.5,
        "--window", 32,
    )  # fmt: skip


def stored(folder) -> dict[str, np.ndarray]:
    """All weights."""
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.slow
def test_a_run_repairs_by_default_and_says_so(out, models, text, tmp_path):
    report = CompressionReport.load(out / "report.json")
    found = report.repair
    assert found["mode"] == "layer" and 0 < found["changed"] <= found["experts"]
    assert found["tokens"] == report.calibration["tokens"]
    assert found["expert"] + found["layer"] > 0
    words = f"repaired on {found['tokens']:,} tokens"
    folder = out / "exports" / EXPORT
    for page in (out / "report.html", folder / "README.md"):
        assert words in " ".join(page.read_text().split()), page
    assert all(check["ok"] for check in report.verification)
    assert json.loads((out / "plan.json").read_text())["provenance"]["repair"] == "layer"
    asked = CompressionRecipe(model="m", output="o")
    assert asked.repair is None and asked.resolved(64, 64, 64).repair == "layer"


def test_what_is_measured_is_the_repaired_model_in_memory_and_on_disk(out, text):
    report = CompressionReport.load(out / "report.json")
    (models_,) = report.quality.values()
    np.testing.assert_allclose(models_["pruned"]["nll"], models_[EXPORT]["nll"], rtol=1e-5)


def test_a_repeated_run_ends_like_the_first(out, models, text, tmp_path):
    again = shutil.copytree(out, tmp_path / "out")
    arguments = (*arguments_of(models, text, again), "--repair", "layer", "--bits", 16)
    before = {path: path.read_bytes() for path in (again / "repair").iterdir()}
    (again / "report.json").unlink()
    shutil.rmtree(again / "exports")
    assert run(*arguments) == 0
    assert {path: path.read_bytes() for path in (again / "repair").iterdir()} == before
    one, two = (stored(folder / "exports" / EXPORT) for folder in (out, again))
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)


def test_exports_and_their_verification_use_the_repair_that_is_there(out, tmp_path, capsys):
    again = shutil.copytree(out, tmp_path / "out")
    repaired = stored(again / "exports" / EXPORT)
    assert run("export", again, "--export", EXPORT, "--repair", "none", "--overwrite") == 0
    plain = stored(again / "exports" / EXPORT)
    differ = {name for name in plain if plain[name].tobytes() != repaired[name].tobytes()}
    assert plain.keys() == repaired.keys()
    assert differ and all("down_proj" in name for name in differ)
    said = [
        " ".join((one / "exports" / EXPORT / "README.md").read_text().split())
        for one in (again, out)
    ]
    assert ["not otherwise changed" in one for one in said] == [True, False]
    assert run("export", again, "--export", "ragged-int4") == 0
    told = [yaml.safe_load((again / "exports" / name / MADE_BY).read_text())
            for name in (EXPORT, "ragged-int4")]  # fmt: skip
    assert "repair" not in told[0] and len(told[1]["repair"]) == 64
    assert run("verify", again) == 0
    # Without what it was made of, it cannot be compared.
    shutil.rmtree(again / "repair")
    capsys.readouterr()
    assert run("verify", again) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "ragged-int4: this export was made by an older plan" in shown
    assert f"{EXPORT}: this" not in shown


@pytest.mark.parametrize("said", [{"tokens": "9"}, {"mode": None}, {"tokens": ...}])
def test_a_repair_that_says_something_else_of_itself_is_refused(out, tmp_path, capsys, said):
    again = shutil.copytree(out, tmp_path / "out")
    summary = again / "repair" / "repair.json"
    found = json.loads(summary.read_text())
    found["provenance"] |= said
    found["provenance"] = {n: v for n, v in found["provenance"].items() if v is not ...}
    summary.write_text(json.dumps(found))
    message = refused(capsys, again, "export", again, "--export", EXPORT, "--overwrite")
    assert f"{next(iter(said))} in {summary} hold something else" in message
    assert "--repair layer` repairs again" in message


def test_a_plan_made_anew_is_not_exported_with_the_repair_of_another(out, tmp_path):
    again = shutil.copytree(out, tmp_path / "out")
    assert run("plan", again, "--prune-rate", 0.25) == 0
    assert run("export", again, "--export", EXPORT, "--overwrite") == 0
    assert "repair" not in yaml.safe_load((again / "exports" / EXPORT / MADE_BY).read_text())
    assert run("export", again, "--export", EXPORT, "--repair", "expert", "--overwrite") == 0
    said = json.loads((again / "repair" / "repair.json").read_text())["provenance"]
    assert said["mode"] == "expert"
    assert run("verify", again) == 0


def test_gptq_chooses_the_codes_of_repaired_weights(out, tmp_path, capsys):
    again = shutil.copytree(out, tmp_path / "out")
    recipe = yaml.safe_load((again / "recipe.yaml").read_text())
    recipe |= {"bits": 4, "export": ["ragged-int4"], "quantizer": "gptq", "group_size": 32}
    (again / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run("export", again) == 0
    said = json.loads((again / "gptq" / "gptq.json").read_text())["provenance"]
    assert said["repair"] == sha256((out / "repair" / "repair.json").read_bytes()).hexdigest()
    assert run("verify", again) == 0
    # Codes of weights without repair take their place: what was made of the others stays right.
    assert run("export", again, "--export", "padded-int4", "--repair", "none") == 0
    capsys.readouterr()
    assert run("verify", again, "--json", "-") == 0
    checks = json.loads(capsys.readouterr().out)
    undone = {
        check["export"]: check["detail"] for check in checks if check["check"] == "4-bit codes"
    }
    assert undone.keys() == {"ragged-int4"}
    assert "of another plan, repair or text" in undone["ragged-int4"]


def test_apply_repeats_the_repair_on_the_same_text_and_says_if_it_lacks_it(
    out, models, text, tmp_path, capsys
):
    plan, model = out / "plan.json", models / "single"
    given_ = ("--bits", 16, "--output")
    assert run("apply", plan, model, *given_, tmp_path / "without") == 0
    assert "not repaired: the plan names repair='layer'" in capsys.readouterr().err
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("plan.json", "plan.safetensors"):
        shutil.copy(out / name, alone)
    words = ("apply", alone, model, "--calibration", text, *given_, tmp_path / "with")
    assert run(*words) == 0
    assert "is not the one" not in capsys.readouterr().err
    first, same, without = (
        stored(folder / "exports" / EXPORT)
        for folder in (out, tmp_path / "with", tmp_path / "without")
    )
    assert all(first[name].tobytes() == same[name].tobytes() for name in first)
    assert any(first[name].tobytes() != without[name].tobytes() for name in first)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    assert run("apply", plan, model, "--calibration", other, *given_, tmp_path / "other") == 0
    assert "the text is not the one that the plan was made on" in capsys.readouterr().err
    with pytest.raises(InputError, match="repair='layer' needs text"):
        apply_plan(plan, str(model), tmp_path / "x", bits=16, repair="layer")


def test_without_enough_windows_or_text_or_anything_removed_nothing_is_repaired(
    out, models, text, tmp_path, capsys
):
    plan = PruningPlan.load(out)
    options: dict[str, Any] = {"model": str(models / "single"), "output": str(tmp_path / "out")}
    words = {"calibration": (str(text),), "evaluation": (str(text),), "window": 32}
    job = open_job(CompressionRecipe(**options, **words, max_tokens=64))
    assert repair_stage.repair(job, plan, Steps()) is None
    assert "not repaired: that takes 3 windows" in " ".join(capsys.readouterr().err.split())
    whole = PruningPlan(np.ones_like(plan.keep), plan.layer_indices)
    job = open_job(CompressionRecipe(**options, **words))
    assert repair_stage.repair(job, whole, Steps()) is None
    assert not (tmp_path / "out").exists()
    recipe = CompressionRecipe(model="m", output="o", weights_only=True)
    assert recipe.resolved(64, 64, 64).repair == "none"
    with pytest.raises(InputError, match="repair='layer' needs"):
        CompressionRecipe(model="m", output="o", weights_only=True, repair="layer")


def test_codes_that_are_taken_over_are_not_repaired_unless_rounded_anew():
    recipe = CompressionRecipe(model="m", output="o")
    assert recipe.resolved(64, 64, 64, native=32).repair == "none"
    again = CompressionRecipe(model="m", output="o", requantize=True)
    assert again.resolved(64, 64, 64, native=32).repair == "layer"
    asked = CompressionRecipe(model="m", output="o", repair="expert")
    with pytest.raises(InputError, match="add --requantize to round a second time"):
        asked.resolved(64, 64, 64, native=32)


def test_the_stored_recipe_says_what_was_done(out):
    assert load_recipe(out / "recipe.yaml").repair == "layer"


def test_an_estimate_counts_it(out, tmp_path):
    recipe = load_recipe(out / "recipe.yaml", output=str(tmp_path / "new"))
    with_it, without = (
        estimate(dataclasses.replace(recipe, repair=mode), probe=False)[0]
        for mode in ("layer", "none")
    )
    assert with_it["memory"]["repair"] > 0 == without["memory"]["repair"]
    assert "repair" not in without["disk"]["parts"]
    written = sum(path.stat().st_size for path in (out / "repair").iterdir())
    assert written < with_it["disk"]["parts"]["repair"]
