"""Routers cut by the commands: what they write is verified, said, and refused where it must be."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.checkpoint import open_checkpoint
from pruning.budget.plan import PruningPlan
from pruning.stages.made_by import stale_exports
from tests.support.command import refused, run


@pytest.fixture
def dropping(models, tmp_path):
    """A plan that drops three of eight experts in each of two layers."""
    base = open_checkpoint(models / "single")
    keep = np.ones((2, 8, 64), bool)
    keep[0, [1, 4, 5]] = keep[1, [0, 2, 7]] = False
    PruningPlan(keep, (0, 1), {"model_hash": base.fingerprint}).save(tmp_path / "plan")
    return tmp_path / "plan"


def test_an_applied_plan_is_written_without_rows_and_every_bit_is_checked(
    models, texts, dropping, tmp_path, capsys
):
    out, forms = tmp_path / "out", ("padded-int4", "ragged-bf16")
    given = ("--cut-router", "--top-k", 1, "--export", *forms, "--output", out, "--json", "-")
    assert run("apply", dropping, models / "single", *given) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert all(check["ok"] and check["done"] for check in checks)
    found = {(check["export"], check["check"]) for check in checks}
    assert {(form, f"logits in {name}") for form in forms for name in ("JAX", "transformers")} <= (
        found
    )
    padded, ragged = (
        json.loads((out / "exports" / form / "config.json").read_text()) for form in forms
    )
    assert (padded["num_experts"], padded["num_experts_per_tok"]) == (5, 1)
    assert (padded["architectures"], "auto_map" in padded) == (["Qwen2MoeForCausalLM"], False)
    assert (ragged["num_experts"], ragged["emptied_experts"]) == (8, "cut")
    base = load_file(models / "single" / "model.safetensors")
    name = "model.layers.1.mlp.gate.weight"
    for form in forms:
        rows = load_file(out / "exports" / form / "model.safetensors")[name]
        wanted = base[name][[1, 3, 4, 5, 6]].astype(rows.dtype)
        np.testing.assert_array_equal(rows, wanted)
        card = re.sub(r"\s+", " ", (out / "exports" / form / "README.md").read_text())
        assert "6 of 16 experts are gone, their rows of the router too" in card
        assert "to other experts, 1 for each token." in card
        assert {"padded": "anew in each layer.", "ragged": "keep their numbers."}[form[:6]] in card
    # What later commands find in the folder says the same.
    plan = PruningPlan.load(out)
    assert (plan.cut_router, plan.top_k) == (True, 1)
    assert plan.content_hash != PruningPlan.load(dropping).content_hash
    assert run("eval", out / "exports" / "ragged-bf16", "--text", texts / "good.txt") == 0


def test_an_export_changes_the_plan_of_its_folder(
    models, texts, scored, dropping, tmp_path, capsys
):
    out = shutil.copytree(scored, tmp_path / "out")
    PruningPlan.load(dropping).save(out)
    assert run("export", out, "--cut-router", "--export", "padded-bf16") == 0
    assert "removes the router's rows of emptied experts from now on" in capsys.readouterr().err
    plan = PruningPlan.load(out)
    assert plan.cut_router and plan.top_k is None
    assert [path.name for path in stale_exports(out, plan)] == ["ragged-bf16"]
    # Without the option the folder's plan says so.
    assert run("export", out, "--export", "layered-bf16") == 0
    found = json.loads((out / "exports" / "layered-bf16" / "config.json").read_text())
    assert found["num_experts"] == 5
    told = refused(
        capsys, tmp_path, "apply", out, models / "single", "--calibration", texts / "good.txt",
        "--repair", "layer", "--output", tmp_path / "new",
    )  # fmt: skip
    assert "repair='layer' reckons with" in told


@pytest.mark.parametrize(("given", "told"), [
    (("--top-k", 1), "top_k=1 needs cut_router"),
    (("--cut-router", "--width", "free"), "width='free' does not remove whole experts; choose"),
    (("--cut-router", "--emptied", "mean"), "emptied='mean' puts constants in the place"),
    (("--cut-router", "--top-k", 3), r"top_k=3 must lie in \[1, 2\]"),
    (("--cut-router", "--prune-rate", 0), "and the plan empties none; plan with"),
    (("--cut-router", "--export", "padded-bf16"), "padded-bf16 has one number of experts for all"),
    (("--cut-router", "--export", "padded-bf16", "--per-layer", "--prune-rate", 0.45),
     "leaves 4 experts in layer 1, 5 experts in layer 0, and padded-bf16 has one number"),
])  # fmt: skip
def test_what_no_plan_or_folder_can_be_is_refused_before_scoring(
    models, texts, tmp_path, capsys, given, told
):
    out = tmp_path / "out"
    arguments = ("--calibration", texts / "good.txt", "--bits", 16, "--output", out, *given)
    found = refused(capsys, tmp_path, "compress", models / "single", *arguments)
    assert re.search(told, found)
