"""Experts without channels that add their mean output: in plans, in JAX, in folders, in torch."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from convert import load_model, open_checkpoint
from convert.export import Export
from convert.export_format import ExportFormat
from convert.layout import BFLOAT16
from moe_jax.stream import forward_hidden
from pruning.budget.plan import PruningPlan
from pruning.runs.apply import apply_plan
from pruning.scores.statistics import ChannelStatistics, field_shapes, load_statistics
from pruning.shrink.masked import masked_hidden
from pruning.shrink.prune import PrunedSource
from pruning.shrink.rounding import QuantizedSource
from pruning.stages.sizes import export_of, kept_widths
from tests.convert.families.test_families import TOKENS, plan_for
from tests.support import tiny
from tests.support.command import given, refused, run
from tests.support.logits import logits
from tests.support.plans import plan_of

FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v3")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    """(checkpoint, plan with constants, logits of the stock torch model changed the same way)."""
    base, plan, torch_model = plan_for(request.param, tmp_path_factory.mktemp("base") / "model")
    rng = np.random.default_rng(0)
    constants = tuple(
        rng.normal(size=(int((row == 0).sum()), 64)).astype(BFLOAT16).astype(np.float32)
        for row in plan.counts
    )
    plan = dataclasses.replace(plan, constants=constants)
    return base, plan, changed_torch(torch_model, plan)


def changed_torch(model, plan) -> np.ndarray:
    """Logits of the stock model whose channels are masked and whose experts' outputs are hooked."""
    for slot, index in enumerate(plan.layer_indices):
        experts = model.model.layers[index].mlp.experts
        gone = torch.from_numpy(np.flatnonzero(plan.counts[slot] == 0))
        vectors = torch.from_numpy(plan.constants[slot])
        with torch.no_grad():
            experts.down_proj.mul_(torch.from_numpy(plan.keep[slot])[:, None])

        def add(module, inputs, out, gone=gone, vectors=vectors):
            _, chosen, weight = inputs
            for expert, vector in zip(gone, vectors, strict=True):
                share = (weight * (chosen == expert)).sum(dim=-1, keepdim=True)
                out = out + (share * vector).reshape(out.shape)
            return out

        experts.register_forward_hook(add)
    return tiny.torch_logits(model, TOKENS, np.ones(TOKENS.shape, bool))


@pytest.mark.slow
def test_a_pruned_model_adds_the_constants(model):
    base, plan, wanted = model
    ours = logits(PrunedSource(base, plan), TOKENS)
    np.testing.assert_allclose(ours, wanted, atol=1e-4, rtol=1e-4)
    without = PruningPlan(plan.keep, plan.layer_indices)
    assert np.abs(logits(PrunedSource(base, without), TOKENS) - wanted).max() > 0.1
    valid = np.ones(TOKENS.shape, bool)
    pruned = forward_hidden(PrunedSource(base, plan), TOKENS, valid)
    for found, expected in zip(
        masked_hidden(base, TOKENS, valid, [plan, without]),
        (pruned, forward_hidden(PrunedSource(base, without), TOKENS, valid)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ragged-bf16", "ragged-int4"])
def test_a_ragged_folder_keeps_the_constants(model, tmp_path, name):
    base, plan, wanted = model
    form, widths = ExportFormat(name, 32, constants=True), kept_widths(plan, base.about)
    source = PrunedSource(base, plan)
    if form.is_packed:
        source = QuantizedSource(source, 32)
        wanted = logits(source, TOKENS)
    folder = Export(base.about, widths, form).write(source, tmp_path / name)
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors*"))
    assert written == Export(base.about, widths, form).nbytes
    stored = load_file(folder / "model.safetensors")
    if not form.is_packed:
        assert export_of(base.about, plan, form).parameters == sum(v.size for v in stored.values())
    names = {key: value for key, value in stored.items() if key.endswith(".constant")}
    assert len(names) == 3
    for slot, index in enumerate(plan.layer_indices):
        for expert, vector in zip(np.flatnonzero(plan.counts[slot] == 0), plan.constants[slot],
                                  strict=True):  # fmt: skip
            (name,) = (key for key in names if f".{index}." in key and f".{expert}.c" in key)
            np.testing.assert_array_equal(names[name].astype(np.float32), vector)
    ours = logits(open_checkpoint(folder, dtype=jnp.float32), TOKENS)
    np.testing.assert_allclose(ours, wanted, atol=1e-4, rtol=1e-4)
    theirs, info = tiny.load_export(folder, trust=True)
    assert not any(info.values())
    np.testing.assert_allclose(
        tiny.torch_logits(theirs, TOKENS, np.ones(TOKENS.shape, bool)), ours, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["padded-bf16", "ragged-bf16"])
def test_gpt_oss_has_a_place_for_constants_in_its_biases(tmp_path, name):
    base, plan, _ = plan_for("gpt_oss", tmp_path / "model")
    rng = np.random.default_rng(0)
    gone = plan.counts == 0
    constants = tuple(rng.normal(size=(int(row.sum()), 64)).astype(np.float32) for row in gone)
    plan = dataclasses.replace(plan, constants=constants)
    form, source = ExportFormat(name, constants=True), PrunedSource(base, plan)
    folder = Export(base.about, kept_widths(plan, base.about), form).write(source, tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    for slot, index in enumerate(plan.layer_indices):
        stem = f"model.layers.{index}.mlp.experts."
        if form.is_ragged:
            found = [stored[f"{stem}{e}.down_proj.bias"] for e in np.flatnonzero(gone[slot])]
        else:
            found = stored[stem + "down_proj_bias"][gone[slot]]
        np.testing.assert_array_equal(found, constants[slot].astype(BFLOAT16))
    bare = dataclasses.replace(plan, constants=None)
    without = export_of(base.about, bare, ExportFormat(name))
    assert export_of(base.about, plan, form).parameters == without.parameters
    ours = logits(source, TOKENS)
    theirs, info = tiny.load_export(folder, trust=not form.is_padded)
    assert not any(info.values()), info
    found = tiny.torch_logits(theirs, TOKENS, np.ones(TOKENS.shape, bool))
    np.testing.assert_allclose(found, ours, atol=1e-5, rtol=1e-5)


def test_a_plan_with_constants_comes_back_and_must_fit(model, tmp_path):
    _, plan, _ = model
    plan.save(tmp_path)
    found = PruningPlan.load(tmp_path)
    assert found.is_same(plan) and found.constants is not None
    for ours, theirs in zip(plan.constants, found.constants, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    bare = PruningPlan(plan.keep, plan.layer_indices, plan.provenance)
    assert not bare.is_same(plan) and bare.content_hash != plan.content_hash
    with pytest.raises(ValueError, match=r"one row of one width for each of the \[2, 1\] experts"):
        PruningPlan(plan.keep, plan.layer_indices, {}, plan.constants[::-1])


@pytest.fixture(scope="module")
def compressed(models, texts, tmp_path_factory):
    """A run of the command line that removes whole experts."""
    out = tmp_path_factory.mktemp("run") / "out"
    arguments = ("--width", "experts", "--prune-rate", 0.5, "--emptied", "mean")
    formats = ("--expert-details", "--export", "ragged-bf16", "ragged-int4")
    assert run("compress", models / "single", *given(texts, out), *arguments, *formats) == 0
    return out


@pytest.mark.slow
def test_compress_puts_the_mean_output_in_the_place_of_experts(compressed):
    statistics, _ = load_statistics(compressed / "statistics.safetensors")
    plan = PruningPlan.load(compressed)
    assert (plan.counts == 0).any(axis=1).all()
    for slot, vectors in enumerate(plan.constants):
        gone = plan.counts[slot] == 0
        mean = statistics.output_sum[slot, gone] / statistics.tokens[slot, gone, None]
        assert np.abs(mean).max() > 0
        np.testing.assert_allclose(vectors, mean, rtol=1e-6)
    report = json.loads((compressed / "report.json").read_text())
    assert all(check["ok"] and check["done"] for check in report["verification"])
    for name in ("ragged-bf16", "ragged-int4"):
        folder = compressed / "exports" / name
        assert "a constant, their mean output" in (folder / "README.md").read_text()
        assert json.loads((folder / "config.json").read_text())["emptied_experts"] == "constant"
        layers = load_model(folder).layers
        for layer, vectors in zip(layers, plan.constants, strict=True):
            bias = np.asarray(layer.mlp.experts.b_down, np.float32)
            np.testing.assert_allclose(bias[np.asarray(layer.mlp.experts.count) == 0], vectors,
                                       rtol=0.01)  # fmt: skip


def test_a_stored_plan_takes_its_constants_along(compressed, models, tmp_path):
    plan = tmp_path / "plan"
    PruningPlan.load(compressed).save(plan)
    apply_plan(plan, str(models / "single"), tmp_path / "out", export=["ragged-bf16"], bits=16)
    first, second = (
        load_file(folder / "exports" / "ragged-bf16" / "model.safetensors")
        for folder in (compressed, tmp_path / "out")
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)
    with pytest.raises(ValueError, match="no place for constants"):
        apply_plan(plan, str(models / "single"), tmp_path / "no", export=["padded-bf16"], bits=16)
    assert not (tmp_path / "no").exists()


def test_plans_of_rates_and_targets_keep_the_constants_and_what_is_exported_is_the_plan(
    compressed, tmp_path
):
    """Planned anew from the statistics of a run whose recipe knew no constants."""
    out = tmp_path / "out"
    shutil.copytree(compressed, out, ignore=shutil.ignore_patterns("exports", "plan.*", "report.*"))
    recipe = (out / "recipe.yaml").read_text()
    assert "emptied: mean" in recipe
    (out / "recipe.yaml").write_text(recipe.replace("emptied: mean", "emptied: zero"))
    whole = ("plan", out, "--width", "experts", "--emptied", "mean")
    assert run(*whole, "--prune-rate", 0.25, 0.5) == 0
    for folder in (out / "plans" / "0.25", out / "plans" / "0.5"):
        plan = PruningPlan.load(folder)
        assert sum(map(len, plan.constants)) == (plan.counts == 0).sum() > 0
    assert run(*whole, "--target-parameters", 120_000) == 0
    plan = PruningPlan.load(out)
    assert plan.constants is not None and (plan.counts == 0).any()
    assert run("export", out, "--export", "padded-bf16") == 2
    assert run("export", out, "--export", "ragged-bf16") == 0
    assert run("verify", out) == 0
    stored = load_file(out / "exports" / "ragged-bf16" / "model.safetensors")
    assert sum(name.endswith(".constant") for name in stored) == (plan.counts == 0).sum()


def test_a_model_that_is_not_what_the_folder_is_to_hold_is_refused(model, tmp_path):
    base, plan, _ = model
    bare = PruningPlan(plan.keep, plan.layer_indices)
    for source, constants in ((bare, True), (plan, False)):
        form = ExportFormat("ragged-bf16", constants=constants)
        with pytest.raises(ValueError, match="another than the one that ragged-bf16 is to hold"):
            Export(base.about, kept_widths(plan, base.about), form).write(
                PrunedSource(base, source), tmp_path / "x"
            )
        assert not (tmp_path / "x").exists()


def test_sizes_are_told_before(compressed, models, texts, tmp_path):
    path = tmp_path / "e.json"
    arguments = ("--no-probe", "--width", "experts", "--prune-rate", 0.5, "--emptied", "mean")
    assert run("estimate", models / "single", *arguments, "--expert-details", "--export",
               "ragged-bf16", "--json", path) == 0  # fmt: skip
    (found,) = json.loads(path.read_text())
    folder = compressed / "exports" / "ragged-bf16"
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors*"))
    assert found["exports"]["ragged-bf16"]["bytes"] == pytest.approx(written, rel=0.01)
    assert run("estimate", models / "single", *arguments, "--expert-details", "--json", path) == 0
    (found,) = json.loads(path.read_text())
    assert found["exports"].keys() == {"ragged-bf16", "ragged-int4"}


def test_what_has_no_place_for_constants_or_lacks_them_is_refused(models, texts, tmp_path, capsys):
    base = ("compress", models / "single", *given(texts, tmp_path / "out"), "--emptied", "mean")
    message = refused(capsys, tmp_path, *base)
    assert "emptied='mean' needs" in message and "--expert-details" in message
    message = refused(capsys, tmp_path, *base, "--expert-details", "--export", "padded-bf16")
    assert "padded-bf16" in message and "--emptied zero" in message


def test_statistics_without_mean_outputs_cannot_replace_experts():
    ones = {name: np.ones(shape) for name, shape in field_shapes(1, 2, 4, 8, ()).items()}
    with pytest.raises(ValueError, match="--expert-details"):
        plan_of(ChannelStatistics(**ones), prune_rate=0.5, emptied="mean", experts_per_token=1)
    with pytest.raises(ValueError, match="emptied"):
        plan_of(ChannelStatistics(**ones), prune_rate=0.5, emptied="median", experts_per_token=1)


def test_a_ragged_folder_says_what_emptied_experts_add(model, tmp_path):
    base, plan, _ = model
    form = ExportFormat("ragged-bf16", constants=True)
    folder = Export(base.about, kept_widths(plan, base.about), form).write(
        PrunedSource(base, plan), tmp_path / "x"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"emptied_experts": "mode"}))
    with pytest.raises(ValueError, match="emptied_experts='mode' must be one of 'zero', 'const"):
        open_checkpoint(folder)
