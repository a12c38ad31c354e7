"""Layered folders: one width per layer; every family in every format is in test_families."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from convert import open_checkpoint
from convert.export import Export
from convert.export_format import ExportFormat
from pruning.budget.plan import PruningPlan
from pruning.shrink.prune import PrunedSource
from pruning.stages.sizes import kept_widths
from tests.convert.families.test_families import TOKENS, masked_logits
from tests.support import tiny
from tests.support.command import given, run
from tests.support.variants import EXPORTED

WIDTH = 96
# Channels of two layers with experts: widest 80, and none at all.
COUNTS = np.array([[0, 80, 5, 32, 1, 64, 0, 7], [0] * 8])
FAMILIES = {
    "qwen2_moe": "shared_expert",
    "mixtral": None,
    "olmoe": None,
    "deepseek_v2": "shared_experts",
    "deepseek_v3": "shared_experts",
    "glm4_moe": "shared_experts",
}


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    """A model, a plan that empties a layer, and the folder; two shared experts if it has any."""
    folder = tmp_path_factory.mktemp("layered")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": WIDTH}
    sizes |= EXPORTED[request.param]
    sizes |= {"n_shared_experts": 2} if "n_shared_experts" in sizes else {}
    model = tiny.half(tiny.tiny_model(request.param, **sizes))
    file = tiny.save(model, folder / "base") / "config.json"
    config = json.loads(file.read_text())
    if request.param in ("mixtral", "olmoe"):  # whose width has another name
        del config["moe_intermediate_size"]
    file.write_text(json.dumps(config))
    base = open_checkpoint(folder / "base", dtype=jnp.bfloat16)
    keep = np.zeros((2, 8, WIDTH), bool)
    for place in np.ndindex(2, 8):
        keep[place][np.random.default_rng(place).permutation(WIDTH)[: COUNTS[place]]] = True
    plan = PruningPlan(keep, base.config.moe_layers, {"model_hash": base.fingerprint})
    return base, plan, written(PrunedSource(base, plan), base, plan, folder / "layered")


def written(source, base, plan, folder, name="layered-bf16"):
    form = ExportFormat(name, 32)
    return Export(base.about, kept_widths(plan, base.about), form).write(source, folder)


def loaded(folder):
    model, info = tiny.load_export(folder, trust=True)
    assert not any(info.values()), info
    return model


def computed(model) -> np.ndarray:
    return tiny.torch_logits(model, TOKENS, np.ones(TOKENS.shape, bool))


def test_layers_are_as_wide_as_their_widest_expert_and_shared_experts_stay(exported):
    base, plan, folder = exported
    config = json.loads((folder / "config.json").read_text())
    first, second = plan.layer_indices
    wanted = [0] * len(base)
    wanted[first], wanted[second] = 80, 1  # programs know no expert without channels
    assert config["moe_intermediate_size"] == wanted
    assert config["unpruned_intermediate_size"] == WIDTH
    assert open_checkpoint(folder).about.widths == tuple(
        (width,) * 8 if width else () for width in wanted
    )
    before, after = (load_file(path / "model.safetensors") for path in (base.about.folder, folder))
    assert before.keys() == after.keys()
    name = FAMILIES[base.about.family.model_type]
    shared = [key for key in before if name and f".{name}." in key]
    assert len(shared) == (6 if name else 0)
    for key in before:
        if ".experts." not in key:
            assert before[key].tobytes() == after[key].tobytes()
    for layer, width in ((first, 80), (second, 1)):
        experts = [v for k, v in after.items() if f"layers.{layer}." in k and ".experts." in k]
        assert len(experts) == 24 and all(width in value.shape for value in experts)
        assert layer == first or not any(value.any() for value in experts)


def test_transformers_computes_the_pruned_model_and_saves_it_again(exported, tmp_path):
    base, plan, folder = exported
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        base.about.folder, dtype=torch.float32, attn_implementation="eager"
    )
    wanted = masked_logits(reference.eval(), plan)
    model = loaded(folder)
    np.testing.assert_allclose(computed(model), wanted, atol=1e-5, rtol=1e-5)
    lists = [part for name, part in model.named_modules() if name.endswith(".experts")]
    assert len(lists) == 2  # of the kind that vLLM fuses
    assert all(isinstance(part, torch.nn.ModuleList) for part in lists)
    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    assert again.config.moe_intermediate_size == model.config.moe_intermediate_size
    np.testing.assert_array_equal(computed(again), computed(model))


@pytest.mark.parametrize("name", ["padded-bf16", "ragged-bf16"])
def test_a_layered_folder_exports_as_any_other_source(exported, tmp_path, name):
    """Nothing of its own config is left in what is made of it."""
    base, plan, folder = exported
    source = open_checkpoint(folder, dtype=jnp.bfloat16)
    wide = np.array([[80] * 8, [1] * 8])
    keep = np.arange(WIDTH) < wide[:, :, None]
    whole = PruningPlan(keep, plan.layer_indices, {"model_hash": source.fingerprint})
    second = written(source, source, whole, tmp_path / "second", name)
    found = json.loads((second / "config.json").read_text())
    own = ("auto_map", "architectures", "model_type", "expert_intermediate_sizes")
    direct = written(PrunedSource(base, plan), base, plan, tmp_path / "direct", name)
    wanted = json.loads((direct / "config.json").read_text())
    for key in own[:3]:
        assert found.get(key) == wanted.get(key)
    assert {k: v for k, v in found.items() if k not in own} == {
        k: v for k, v in wanted.items() if k not in own
    }
    if name == "padded-bf16":
        before, after = (load_file(path / "model.safetensors") for path in (direct, second))
        assert {k: v.tobytes() for k, v in before.items()} == {
            k: v.tobytes() for k, v in after.items()
        }


@pytest.mark.slow
def test_the_command_plans_one_width_per_layer_and_pads_nothing(models, texts, tmp_path):
    out = tmp_path / "out"
    options = ("--layer-rate", "0=0.25", "--prune-rate", 0.5, "--block", 16, "--bits", 16,
               "--layer-loss", "attribution", "--passes", 0)  # fmt: skip
    arguments = (*given(texts, out), *options, "--export", "layered-bf16", "ragged-bf16")
    assert run("compress", models / "single", *arguments) == 0
    counts = PruningPlan.load(out).counts
    assert counts.tolist() == [[48] * 8, [16] * 8]
    exports = {name: out / "exports" / name for name in ("layered-bf16", "ragged-bf16")}
    layered, ragged = (load_file(path / "model.safetensors") for path in exports.values())
    assert {k: v.tobytes() for k, v in layered.items()} == {
        k: v.tobytes() for k, v in ragged.items()
    }
    card = (exports["layered-bf16"] / "README.md").read_text()
    assert "Experts keep 16 to 48 channels" in card and "The folder stores" not in card
    assert "vllm serve . --trust-remote-code\n" in card and "trust_remote_code=True" in card
    report = json.loads((out / "report.json").read_text())
    checks = [check for check in report["verification"] if check["export"] == "layered-bf16"]
    said = report["sizes"]["exports"]["layered-bf16"]["padded_bytes"]
    assert run("export", out, "--export", "padded-bf16") == 0
    padded = (out / "exports" / "padded-bf16").glob("*.safetensors*")
    assert said == sum(file.stat().st_size for file in padded)
    assert len(checks) == 6 and all(check["ok"] and check["done"] for check in checks)
    # the layers' losses that the recipe names, smoothed as it says: not at all
    wanted = np.sum(report["attribution"], axis=1)
    np.testing.assert_allclose(report["layer_loss"]["raw"], wanted)
    np.testing.assert_allclose(report["layer_loss"]["smoothed"], wanted / wanted.mean())
    assert np.ptp(wanted) > 0.01 * wanted.mean()
