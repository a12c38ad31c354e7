"""A plan travels as two files and is applied to the weights elsewhere, or refused."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import pruning
from convert.checkpoint import open_checkpoint
from pruning.budget.plan import PruningPlan
from tests.pruning.stages.test_folder import set_free
from tests.support.command import given, poison, refused, run


@pytest.fixture
def travelled(scored, tmp_path):
    """The two files of a plan alone, as another machine gets them."""
    folder = tmp_path / "travelled"
    folder.mkdir()
    for name in ("plan.json", "plan.safetensors"):
        shutil.copy(scored / name, folder)
    return folder


@pytest.mark.parametrize("file", ["", "plan.json"])
def test_an_applied_plan_gives_the_bytes_that_exporting_it_at_home_gave(
    models, scored, travelled, tmp_path, capsys, file
):
    out = tmp_path / "out"
    arguments = (travelled / file, models / "single", "--export", "ragged-bf16", "--output", out)
    assert run("apply", *arguments, "--json", "-") == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    target = out / "exports" / "ragged-bf16"
    (size,) = found["exports"].values()
    assert size == (target / "model.safetensors").stat().st_size
    names = {check["check"] for check in found["checks"]}
    assert {"logits in JAX", "logits in transformers"} <= names
    assert all(check["ok"] and check["done"] for check in found["checks"])
    assert re.search(r"ragged-bf16: \S+ kB", shown.err)
    home = scored / "exports" / "ragged-bf16"
    assert {path.name for path in target.iterdir()} == {path.name for path in home.iterdir()}
    for path in home.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in out.iterdir()} == {
        "recipe.yaml", "model.json", "plan.json", "plan.safetensors", "exports",
    }  # fmt: skip
    for name in ("plan.json", "plan.safetensors"):
        assert (out / name).read_bytes() == (scored / name).read_bytes()


def test_the_kept_channels_of_a_packed_export_are_those_of_the_plan(models, travelled, tmp_path):
    checks = pruning.apply_plan(
        travelled, str(models / "single"), tmp_path / "out", export=["padded-int4", "ragged-int4"]
    )
    assert all(check.ok for check in checks) and len(checks) >= 4
    keep = load_file(travelled / "plan.safetensors")
    stored = open_checkpoint(tmp_path / "out" / "exports" / "ragged-int4").about.widths
    assert stored == tuple(tuple(keep[f"keep.{i}"].sum(axis=1).tolist()) for i in range(2))


def test_a_padded_folder_of_an_odd_plan_is_as_wide_as_grouped_products_run(models, tmp_path):
    """`--block 1`, or a plan of another program: torch wants rows of whole 16 bytes."""
    base = open_checkpoint(models / "single")
    moe, layers = base.config.moe, base.config.moe_layers
    keep = np.arange(moe.d_expert) < np.arange(moe.num_experts)[:, None] % 14  # 13 at most
    keep = np.broadcast_to(keep, (len(layers), *keep.shape))
    (tmp_path / "plan").mkdir()
    PruningPlan(keep, layers, {"model_hash": base.fingerprint}).save(tmp_path / "plan")
    assert keep.sum(axis=-1).max() % 8 and moe.num_experts > 5
    checks = pruning.apply_plan(
        tmp_path / "plan", str(models / "single"), tmp_path / "out", export=["padded-bf16"]
    )
    assert all(check.ok and check.done for check in checks)
    folder = tmp_path / "out" / "exports" / "padded-bf16"
    assert json.loads((folder / "config.json").read_text())["moe_intermediate_size"] % 8 == 0
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        assert loaded(torch.arange(8)[None]).logits.isfinite().all()


def test_later_commands_take_the_folder(models, texts, travelled, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("apply", travelled, models / "single", "--bits", 16, "--output", out) == 0
    assert run("verify", out) == 0
    assert run("export", out, "--export", "padded-bf16") == 0
    capsys.readouterr()
    arguments = ("--text", texts / "good.txt", "--json", "-")
    assert run("eval", out / "exports" / "padded-bf16", *arguments) == 0
    assert json.loads(capsys.readouterr().out)["texts"]


def test_the_recipe_says_what_the_plan_was_made_with(models, travelled, tmp_path):
    """Without a recipe beside the plan, its own record is all there is."""
    description = json.loads((travelled / "plan.json").read_text())
    description["provenance"] |= {
        "criterion": "energy", "attribution": "self", "planner": "fair", "block": 16,
        "minimum": 16, "layer_rates": {"1": 0.5},
    }  # fmt: skip
    (travelled / "plan.json").write_text(json.dumps(description))
    out = tmp_path / "out"
    assert run("apply", travelled, models / "single", "--bits", 16, "--output", out) == 0
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    said = {"criterion": "energy", "attribution": "self", "planner": "fair", "block": 16,
            "prune_rate": 0.5, "layer_rate": ["1=0.5"], "export": ["ragged-bf16"],
            "model": str(models / "single"), "output": str(out)}  # fmt: skip
    assert {name: recipe[name] for name in said} == said


def test_a_recipe_beside_the_plan_is_kept_where_the_plan_says_nothing(models, scored, tmp_path):
    out = tmp_path / "out"
    assert run("apply", scored, models / "single", "--bits", 16, "--output", out) == 0
    ours, theirs = (
        yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in (out, scored)
    )
    assert ours["calibration"] == theirs["calibration"] and ours["batch"] == 4
    assert (theirs["prune_rate"], ours["prune_rate"]) == (0.25, 0.5)  # planned anew at one half


def test_another_model_is_refused(models, travelled, tmp_path, capsys):
    arguments = ("apply", travelled, models / "other", "--output", tmp_path / "out")
    shown = refused(capsys, tmp_path, *arguments)
    assert re.search(r"plan was made for model \w{64}, this model is \w{64}", shown), shown


def test_another_model_of_the_same_shape_is_taken_if_allowed_and_the_card_says_so(
    models, travelled, tmp_path, capsys
):
    arguments = ("apply", travelled, models / "other", "--bits", 16, "--output", tmp_path / "out")
    assert "apply the plan with --allow-other-model" in refused(capsys, tmp_path, *arguments)
    assert run(*arguments, "--allow-other-model") == 0  # as the refusal advises
    folder = tmp_path / "out" / "exports" / "ragged-bf16"
    hashes = [open_checkpoint(models / name).fingerprint for name in ("single", "other")]
    card = (folder / "README.md").read_text()
    assert f"| planned for | another model of the same shape, `{hashes[0]}` |" in card
    assert f"`{hashes[1]}`" in card
    keep = load_file(travelled / "plan.safetensors")
    written, whole = (load_file(f / "model.safetensors") for f in (folder, models / "other"))
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    kept = whole[name][keep["keep.1"][2]].astype("bfloat16")
    assert written[name].tobytes() == kept.tobytes()
    assert run("verify", tmp_path / "out") == 0
    assert run(*arguments, "--allow-other-model") == 0  # goes on where nothing is left to do
    capsys.readouterr()


def test_a_plan_of_another_shape_is_refused_even_if_another_model_is_allowed(
    models, travelled, tmp_path, capsys
):
    said = {"model_hash": "0" * 64}
    PruningPlan(np.ones((2, 8, 32), bool), (0, 1), said).save(travelled)
    arguments = ("apply", travelled, models / "single", "--output", tmp_path / "out")
    shown = refused(capsys, tmp_path, *arguments, "--allow-other-model")
    assert re.search(r"of 8 experts with 32 channels, .* of 8 experts with 64; give the", shown)


def test_an_anonymous_plan_of_another_shape_is_refused(models, travelled, tmp_path, capsys):
    PruningPlan(np.ones((2, 8, 32), bool), (0, 1)).save(travelled)
    arguments = ("apply", travelled, models / "single", "--output", tmp_path / "out")
    shown = refused(capsys, tmp_path, *arguments)
    assert re.search(r"of 8 experts with 32 channels, .* of 8 experts with 64; give the", shown)


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        ("absent", [], r"plan\.json is missing; make it with `moe-compress plan`"),
        ("broken", [], r"holds no readable plan"),
        ("empty", [], r"the plan keeps no channel at all"),
        ("odd", [], r"group_size=32 does not divide width 33; export 16 bits"),
        ("odd", ["--export", "ragged-bf16", "padded-int4", "ragged-int4"], r"divide width 33"),
        (None, ["--group-size", 128], r"group_size=128 does not divide the expert width 64"),
        (None, ["--bits", 16, "--export", "ragged-int4"], r"bits=16 contradicts export"),
    ],
)
def test_what_cannot_be_applied_is_refused_before_any_work(
    models, travelled, tmp_path, capsys, spoil, flags, message
):
    if spoil == "absent":
        (travelled / "plan.json").unlink()
    elif spoil == "broken":
        save_file({"x": np.ones(1)}, travelled / "plan.safetensors")
        (travelled / "plan.json").write_text("{")
    elif spoil in ("empty", "odd"):
        keep = np.zeros((2, 8, 64), bool)
        keep[..., : 33 if spoil == "odd" else 0] = True
        PruningPlan(keep, (0, 1)).save(travelled)
    arguments = ("apply", travelled, models / "single", "--output", tmp_path / "out", *flags)
    assert re.search(message, shown := refused(capsys, tmp_path, *arguments)), shown


def test_a_missing_output_is_named(models, travelled, tmp_path, capsys):
    shown = refused(capsys, tmp_path, "apply", travelled, models / "single")
    assert "output is missing; give it on the command line" in shown


def test_a_full_disk_is_noticed_before_the_first_export(
    models, travelled, tmp_path, capsys, monkeypatch
):
    set_free(monkeypatch, 5e6)
    arguments = ("--output", tmp_path / "out", "--export", "padded-bf16", "ragged-int4")
    shown = refused(capsys, tmp_path, "apply", travelled, models / "single", *arguments)
    assert re.search(r"5000\.0 kB free but up to .*padded-bf16 .*ragged-int4", shown), shown


def test_broken_weights_are_refused_before_the_folder_is_made(models, scored, tmp_path, capsys):
    model, plan = shutil.copytree(models / "single", tmp_path / "model"), tmp_path / "plan"
    poison(model)
    PruningPlan(PruningPlan.load(scored).keep, (0, 1)).save(plan)  # names no model
    shown = refused(capsys, tmp_path, "apply", plan, model, "--output", tmp_path / "out")
    assert "holds NaN or infinity" in shown


def test_an_output_folder_is_replaced_only_on_request(models, texts, travelled, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("apply", travelled, models / "single", "--bits", 16, "--output", out)
    assert run(*arguments) == 0
    export = out / "exports" / "ragged-bf16"
    first, made = export.stat().st_ino, (export / "model.safetensors").stat().st_mtime_ns
    assert run(*arguments) == 0  # nothing is missing: verified again, not written again
    assert export.stat().st_ino == first
    assert run(*arguments, "--overwrite") == 0  # the same plan, finished: written again
    assert (export / "model.safetensors").stat().st_mtime_ns != made
    shutil.rmtree(export)
    assert run(*arguments) == 0 and export.is_dir()
    other = PruningPlan.load(travelled)
    PruningPlan(np.roll(other.keep, 1, axis=2), (0, 1), other.provenance).save(travelled)
    assert "add --overwrite" in refused(capsys, tmp_path, *arguments)
    (out / "notes.txt").write_text("mine")
    assert run(*arguments, "--overwrite") == 0
    assert (out / "notes.txt").exists() and export.is_dir()
    assert PruningPlan.load(out).is_same(PruningPlan.load(travelled))


@pytest.mark.parametrize("output", ["travelled", "."])
def test_an_output_that_holds_the_plan_is_refused(models, travelled, tmp_path, capsys, output):
    (tmp_path / output / "recipe.yaml").write_text("model: m\noutput: o\n")
    arguments = ("apply", travelled, models / "single", "--overwrite", "--bits", 16)
    shown = refused(capsys, tmp_path, *arguments, "--output", tmp_path / output)
    assert re.search(r"holds .*travelled, which is read", shown), shown


def test_a_run_that_scored_is_not_taken_for_one_that_applied(
    models, texts, travelled, tmp_path, capsys
):
    out = tmp_path / "out"
    assert run("score", models / "single", *given(texts, out)) == 0
    shown = refused(capsys, out, "apply", travelled, models / "single", "--output", out)
    assert "add --overwrite" in shown
