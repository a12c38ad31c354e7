"""A model that is stored in 4 bits keeps its codes through pruning; a second rounding is said."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from convert import layer_tensors, open_checkpoint
from convert.export_format import ExportFormat
from moe_jax.errors import InputError
from pruning import CompressionRecipe, apply_plan, compress
from pruning.budget.plan import PruningPlan
from pruning.report.compression_page import page
from pruning.scores.collect import collect_statistics
from pruning.stages.export import pruned_source
from pruning.stages.job import resolved
from pruning.stages.sizes import export_of
from tests.support import quantized, tiny
from tests.support.command import run

GROUP = 32
SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 128,
         "kv_lora_rank": 32, "vocab_size": 320, "first_k_dense_replace": 1,
         "n_routed_experts": 4}  # fmt: skip
IGNORED = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
           r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]  # fmt: skip


def kimi(folder, *, ignored=IGNORED, pattern=".mlp.experts.", dtype=torch.bfloat16):
    """A model as Kimi-K2-Thinking is published, and the values of its tensors."""
    plain = tiny.save(tiny.half(tiny.tiny_model("deepseek_v3", **SIZES)), folder / "plain")
    int4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
            "group_size": GROUP}  # fmt: skip
    make, group = quantized.compressed("pack-quantized", dtype=dtype, **int4)
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ignored,
            "config_groups": {"group_0": group}}  # fmt: skip
    target = folder / "model"
    quantized.rewrite(
        plain,
        target,
        lambda module, shape: make(module, shape) if pattern in module else None,
        said,
    )
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2"}))
    return tiny.add_tokenizer(target)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return kimi(tmp_path_factory.mktemp("kimi"))


@pytest.fixture(scope="module")
def compressed(model, tmp_path_factory):
    recipe = CompressionRecipe(
        model=str(model), output=str(tmp_path_factory.mktemp("out") / "run"), weights_only=True,
        prune_rate=0.5, export=("ragged-int4", "padded-int4"), width="free", batch=4, grid=GROUP,
    )  # fmt: skip
    return compress(recipe), recipe.output


def codes(tensors, module):
    """Codes + 8 of a packed weight, uint8 [rows, columns]."""
    words = tensors[f"{module}.weight_packed"].numpy()
    bytes_ = words.view(np.uint8)
    return np.stack([bytes_ & 15, bytes_ >> 4], axis=-1).reshape(len(words), -1)


def scales(tensors, module):
    return tensors[f"{module}.weight_scale"].float().numpy()


def experts(plan):
    """(what the names of an expert's modules begin with, its kept channels)."""
    for slot, layer in enumerate(plan.layer_indices):
        for expert, keep in enumerate(plan.keep[slot]):
            if keep.any():
                yield f"model.layers.{layer}.mlp.experts.{expert}.", keep


@pytest.mark.slow
def test_channels_are_cut_on_the_grid_and_codes_copied(model, compressed):
    report, folder = compressed
    plan = PruningPlan.load(folder)
    groups = plan.keep.reshape(*plan.keep.shape[:2], -1, GROUP)
    assert (groups.all(axis=3) == groups.any(axis=3)).all() and 0 < plan.keep.mean() < 1
    base = load_file(model / "model.safetensors")
    stored = load_file(f"{folder}/exports/ragged-int4/model.safetensors")
    for stem, keep in experts(plan):
        for part in ("gate_proj", "up_proj"):
            module = stem + part
            np.testing.assert_array_equal(codes(stored, module), codes(base, module)[keep])
            np.testing.assert_array_equal(scales(stored, module), scales(base, module)[keep])
        down, whole = stem + "down_proj", keep[::GROUP]
        np.testing.assert_array_equal(codes(stored, down), codes(base, down)[:, keep])
        np.testing.assert_array_equal(scales(stored, down), scales(base, down)[:, whole])
    for name, value in base.items():
        if ".mlp.experts." not in name:  # what is in 16 bits stays so, bit for bit
            assert torch.equal(stored[name], value), name
    assert all(check["ok"] for check in report.verification)
    assert {"logits in transformers"} <= {check["check"] for check in report.verification}


def test_a_padded_folder_fills_up_with_zeros_beside_the_copied_codes(model, compressed):
    _, folder = compressed
    plan = PruningPlan.load(folder)
    base = load_file(model / "model.safetensors")
    stored = load_file(f"{folder}/exports/padded-int4/model.safetensors")
    for stem, keep in experts(plan):
        down = codes(stored, stem + "down_proj")
        np.testing.assert_array_equal(
            down[:, : keep.sum()], codes(base, stem + "down_proj")[:, keep]
        )
        assert (down[:, keep.sum() :] == 8).all()
    assert "model.layers.1.self_attn.o_proj.weight" in stored


def test_report_page_and_card_say_that_nothing_was_rounded_again(compressed):
    report, folder = compressed
    for name in ("ragged-int4", "padded-int4"):
        assert report.sizes["exports"][name]["rounded_again"] == 0
        card = Path(f"{folder}/exports/{name}/README.md").read_text()
        assert "Expert weights are the base's 4-bit integers" in card
        assert "what the model stores in few bits is taken over bit for bit" in card
    assert "is taken over bit for bit" in page(report)


def free_plan(model, folder):
    """A plan that keeps every second channel, which leaves no group whole."""
    base = open_checkpoint(model)
    moe = base.config.moe
    keep = np.zeros((1, moe.num_experts, moe.d_expert), bool)
    keep[:, :, ::2] = True
    PruningPlan(keep, base.config.moe_layers, {"model_hash": base.fingerprint}).save(folder)
    return PruningPlan.load(folder)


def test_channels_off_the_grid_round_down_projections_a_second_time_and_say_so(
    model, tmp_path, capsys
):
    (tmp_path / "plan").mkdir()
    plan = free_plan(model, tmp_path / "plan")
    out = tmp_path / "out"
    assert run("apply", tmp_path / "plan", model, "--output", out, "--export", "ragged-int4") == 0
    target = out / "exports" / "ragged-int4"
    base, stored = (load_file(f / "model.safetensors") for f in (model, target))
    exact = open_checkpoint(model, dtype=jnp.bfloat16)
    dense = dict(layer_tensors(exact, exact.layer(1), 1))
    wrong = total = 0.0
    for stem, keep in experts(plan):
        for part in ("gate_proj", "up_proj"):
            np.testing.assert_array_equal(
                codes(stored, stem + part), codes(base, stem + part)[keep]
            )
        down = stem + "down_proj"
        old = dense[f"{down}.weight"][:, keep].astype(np.float64)
        new = (codes(stored, down) - 8.0) * np.repeat(scales(stored, down), GROUP, axis=1)
        wrong, total = wrong + np.square(new - old).sum(), total + np.square(old).sum()
    error = json.loads((target / "rounding.json").read_text())["relative_squared_error"]
    np.testing.assert_allclose(error, wrong / total, rtol=1e-12)
    assert 1e-4 < error < 0.05
    words = f"rounded a second time, with a relative squared error of {error:.2g}"
    assert words in " ".join(capsys.readouterr().err.split())
    assert words in " ".join((target / "README.md").read_text().split())


def test_a_layer_that_lost_all_its_experts_has_no_codes(model):
    base = open_checkpoint(model, dtype=jnp.bfloat16)
    moe, layers = base.config.moe, base.config.moe_layers
    keep = np.zeros((1, moe.num_experts, moe.d_expert), bool)
    plan = PruningPlan(keep, layers, {"model_hash": base.fingerprint})
    form = ExportFormat("ragged-int4", GROUP)
    layer = pruned_source(base, plan, form).layer(layers[0])
    assert not layer.mlp.experts.count.any() and not layer.mlp.experts.w_down.any()


def test_all_linear_layers_are_rounded_anew_when_it_is_asked_for(model, tmp_path):
    (tmp_path / "plan").mkdir()
    free_plan(model, tmp_path / "plan")
    arguments = {"export": ["ragged-int4"], "group_size": 32, "requantize": True}
    checks = apply_plan(tmp_path / "plan", str(model), tmp_path / "out", **arguments)
    assert all(check.ok for check in checks)
    target = tmp_path / "out" / "exports" / "ragged-int4"
    stored = load_file(target / "model.safetensors")
    assert "model.layers.1.self_attn.o_proj.weight_packed" in stored
    assert json.loads((target / "rounding.json").read_text())["relative_squared_error"] > 1e-4
    card = (target / "README.md").read_text()
    assert "rounded a second time" in card and "requantize: true" in card


def test_scales_that_no_export_holds_are_rounded_again(tmp_path):
    """Exports have bfloat16 scales, which float16 ones are not."""
    about = open_checkpoint(kimi(tmp_path, dtype=torch.float16)).about
    assert about.quantization is not None and about.native is None


def test_attention_in_4_bits_is_taken_over_too(tmp_path):
    model = kimi(tmp_path, ignored=["lm_head", "re:.*kv_a_proj.*"], pattern="_proj")
    (tmp_path / "plan").mkdir()
    free_plan(model, tmp_path / "plan")
    arguments = {"export": ["ragged-int4"], "group_size": 32}
    checks = apply_plan(tmp_path / "plan", str(model), tmp_path / "out", **arguments)
    assert all(check.ok for check in checks)
    base, stored = (
        load_file(folder / "model.safetensors")
        for folder in (model, tmp_path / "out" / "exports" / "ragged-int4")
    )
    module = "model.layers.1.self_attn.o_proj"
    np.testing.assert_array_equal(codes(stored, module), codes(base, module))
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert torch.equal(stored[name], base[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 64}, r"group_size=64 is not that of the model, 32.*--requantize"),
        ({"quantizer": "gptq"}, "quantizer='gptq' chooses new codes.*add --requantize"),
        ({"block": 64, "grid": 128}, "block=64 must be a multiple of grid=128"),
    ],
)
def test_what_contradicts_the_codes_of_the_model_is_refused_with_the_cure(model, options, message):
    about = open_checkpoint(model).about
    recipe = CompressionRecipe(model=str(model), output="out", **options)
    with pytest.raises(InputError, match=message):
        resolved(recipe, about)


def test_the_group_size_of_the_model_is_that_of_exports_and_its_channels_stay_or_go_singly(model):
    about = open_checkpoint(model).about
    ours = {"model": str(model), "output": "out"}
    found = resolved(CompressionRecipe(**ours), about)
    # Measured on the demo in native 4 bits: single channels add less loss (README).
    assert (found.grid, found.block, found.group_size) == (None, GROUP, GROUP)
    assert resolved(CompressionRecipe(**ours, grid=GROUP), about).grid == GROUP


def test_in_groups_of_experts_codes_and_statistics_are_those_of_whole_layers(model, compressed):
    plan = PruningPlan.load(compressed[1])
    form = ExportFormat("ragged-int4", group_size=GROUP)
    tokens = np.arange(48, dtype=np.int32).reshape(4, 12)

    def of(at_once):
        base = open_checkpoint(model, dtype=jnp.bfloat16)
        base.experts_at_once = at_once
        export = export_of(base.about, plan, form)
        statistics = collect_statistics(base, tokens, tokens > 0, batch=4).arrays()
        return dict(export.arrays(pruned_source(base, plan, None))), statistics

    (whole, wanted), (grouped, found) = of(None), of(3)
    assert whole.keys() == grouped.keys() and any("packed" in name for name in whole)
    for name, value in whole.items():
        np.testing.assert_array_equal(grouped[name], value, err_msg=name)
    for name in ("hidden_square", "shapley", "tokens"):
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
