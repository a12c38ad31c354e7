"""Models that see images: the text model is pruned, all else is copied byte for byte."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from convert import (
    CheckpointError,
    SafetensorsFolder,
    find_family,
    layer_tensors,
    open_checkpoint,
    outer_tensors,
)
from convert.export import Export
from convert.export_format import ExportFormat
from convert.few_bits import OTHER_PARTS
from moe_jax.errors import InputError
from pruning.budget.plan import PruningPlan
from pruning.kit.errors import VerificationError
from pruning.runs.apply import apply_plan
from pruning.shrink.prune import PrunedSource
from pruning.stages import verify
from pruning.stages.sizes import kept_widths
from tests.support import quantized, tiny, wrapped
from tests.support.command import change_config, run
from tests.support.logits import logits

TEXT = np.random.default_rng(1).integers(0, 90, (2, 12)).astype(np.int32)
COUNTS = np.array([[0, 32, 64, 32, 32, 64, 0, 32], [32, 32, 32, 32, 0, 32, 64, 32]])
WRAPPERS = list(wrapped.CONFIGS)
TOWER = {"kimi_k25": "language_model."}

each_wrapper = pytest.mark.parametrize("checkpoint", WRAPPERS, indirect=True)


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory):
    """(base, random plan, the same model by transformers in float32)."""
    folder = tmp_path_factory.mktemp("base") / request.param
    reference = wrapped.save_model(request.param, folder)
    base = open_checkpoint(folder, dtype=jnp.bfloat16)
    keep, rng = np.zeros((2, 8, 96), bool), np.random.default_rng(0)
    for place in np.ndindex(2, 8):
        keep[place][rng.permutation(96)[: COUNTS[place]]] = True
    plan = PruningPlan(keep, base.config.moe_layers, {"model_hash": base.fingerprint})
    return base, plan, reference


def stored(folder) -> dict[str, np.ndarray]:
    found = {}
    for shard in folder.glob("*.safetensors"):
        found |= load_file(shard)
    return found


def others(tensors: dict[str, np.ndarray], family: str) -> dict[str, np.ndarray]:
    """The tensors that are no part of the text model."""
    tower = ("model.language_model.", "lm_head.", TOWER.get(family, "lm_head."))
    return {name: value for name, value in tensors.items() if not name.startswith(tower)}


def text_logits(model) -> np.ndarray:
    return tiny.torch_logits(model, TEXT, np.ones(TEXT.shape, bool))


@each_wrapper
def test_the_text_model_computes_what_it_does_inside_the_whole(checkpoint):
    base, _, reference = checkpoint
    wanted = text_logits(reference)
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(logits(base, TEXT), wanted, atol=5e-5, rtol=1e-5)


@each_wrapper
def test_reading_and_writing_back_returns_every_byte_of_the_text_model(checkpoint):
    base, _, _ = checkpoint
    family = base.about.family
    written = dict(outer_tensors(base))
    for index in range(len(base)):
        written |= layer_tensors(base, base.layer(index), index)
    original = stored(base.about.folder)
    ours = {family.wrapper.stored(name): value for name, value in written.items()}
    assert ours.keys() | base.about.beside.keys() == original.keys()
    assert all(ours[name].tobytes() == original[name].tobytes() for name in ours)


@each_wrapper
def test_an_export_sees_images_as_the_pruned_text_model_does(checkpoint, tmp_path):
    base, plan, reference = checkpoint
    family = base.about.family.model_type
    form = ExportFormat("padded-bf16")
    export = Export(base.about, kept_widths(plan, base.about), form)
    folder = export.write(PrunedSource(base, plan), tmp_path / "out")
    assert export.nbytes == sum(file.stat().st_size for file in folder.glob("*.safetensors*"))

    before, after = (others(stored(f), family) for f in (base.about.folder, folder))
    assert before.keys() == after.keys() and before
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert (folder / "video_preprocessor_config.json").exists()

    model, info = wrapped.load(folder)
    assert not any(info.values()), info
    assert type(model) is type(reference)
    state = {key: value.clone() for key, value in reference.state_dict().items()}
    whole = wrapped.image_logits(reference, family)
    with torch.no_grad():
        for slot, layer in enumerate(plan.layer_indices):
            experts = reference.model.language_model.layers[layer].mlp.experts
            for e in range(8):
                experts.down_proj[e][:, ~torch.from_numpy(plan.keep[slot, e])] = 0
        wanted, text = wrapped.image_logits(reference, family), text_logits(reference)
        reference.load_state_dict(state)
    found = wrapped.image_logits(model, family)
    np.testing.assert_allclose(found, wanted, atol=5e-5, rtol=1e-5)
    assert np.abs(whole - wanted).max() > 1e-2  # pruning is seen
    assert np.abs(found[:, 7:] - wrapped.image_logits(_blind(model), family)[:, 7:]).max() > 1e-3
    np.testing.assert_allclose(
        logits(open_checkpoint(folder, dtype=jnp.float32), TEXT), text, atol=5e-5, rtol=1e-5
    )


def _blind(model):
    """The same model, all that it sees multiplied by two."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" not in name and "lm_head" not in name:
                parameter.mul_(2)
    return model


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [(family, name) for family in WRAPPERS for name in ("ragged-bf16", "layered-bf16")]
    + [("qwen3_vl_moe", "padded-int4")],
    indirect=["checkpoint"],
)
def test_a_format_that_no_multimodal_class_reads_is_refused(checkpoint, name):
    base, plan, _ = checkpoint
    export = Export(base.about, kept_widths(plan, base.about), ExportFormat(name))
    with pytest.raises(InputError, match=r"does not exist for .* choose from padded-bf16"):
        export.check()


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["glm4v_moe", "kimi_k25"], indirect=True)
def test_a_text_model_in_4_bits_is_verified_inside_the_whole(checkpoint, tmp_path):
    base, plan, reference = checkpoint
    family = base.about.family.model_type
    (tmp_path / "plan").mkdir()
    plan.save(tmp_path / "plan")
    model = shutil.copytree(base.about.folder, tmp_path / "model")
    arguments = {"export": ["padded-int4"], "group_size": 32}
    checks = apply_plan(tmp_path / "plan", str(model), tmp_path / "out", **arguments)
    named = {check.check: check for check in checks if check.done}
    assert all(check.ok for check in checks)
    assert {"tensors", "logits in JAX", "logits in transformers"} <= named.keys()

    folder = tmp_path / "out/exports/padded-int4"
    before, after = (others(stored(f), family) for f in (model, folder))
    assert before.keys() == after.keys() and before
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    coded = [name for name in stored(folder) if name.endswith("weight_packed")]
    assert len(coded) > 2 * 8 * 3
    loaded, info = wrapped.load(folder)
    assert not any(info.values()), info
    loaded = torch.nn.Module.float(loaded)  # experts come in bfloat16, whatever the dtype asked for
    found = wrapped.image_logits(loaded, family)
    whole = wrapped.image_logits(reference, family)
    assert np.isfinite(found).all() and 1e-2 < np.abs(found - whole).max()
    assert np.abs(found[:, 7:] - wrapped.image_logits(_blind(loaded), family)[:, 7:]).max() > 1e-3


@pytest.mark.parametrize("checkpoint", ["glm4v_moe", "kimi_k25"], indirect=True)
def test_a_text_model_without_the_parts_around_it_is_verified_too(
    checkpoint, tmp_path, monkeypatch
):
    """Their class has them, and what no file holds must be neither quantised nor asked for."""
    whole, plan, _ = checkpoint
    model = shutil.copytree(whole.about.folder, tmp_path / "model")
    tensors = stored(model)
    kept = tensors.keys() - others(tensors, whole.about.family.model_type).keys()
    assert kept < tensors.keys()
    save_file({n: tensors[n] for n in kept}, model / "model.safetensors", {"format": "pt"})
    base = open_checkpoint(model, dtype=jnp.bfloat16)
    same = PruningPlan(plan.keep, plan.layer_indices, {"model_hash": base.fingerprint})
    (tmp_path / "plan").mkdir()
    same.save(tmp_path / "plan")
    arguments = {"export": ["padded-int4", "padded-bf16"], "group_size": 32}
    checks = apply_plan(tmp_path / "plan", str(model), tmp_path / "out", **arguments)
    assert all(check.ok and check.done for check in checks)
    loads = [check.detail for check in checks if check.check == "transformers loads every tensor"]
    assert len(loads) == 2 and all(
        "of other parts, of which the model has none" in d for d in loads
    )

    answers, real = [], verify.client_answer

    def lacking(*asked):  # a tensor of the text model as well
        answer = real(*asked)
        name = "model.language_model.layers.1.self_attn.o_proj.weight"
        answer.loading["missing_keys"].append(name)
        answers.append(name)
        return answer

    monkeypatch.setattr(verify, "client_answer", lacking)
    with pytest.raises(VerificationError, match=r"missing_keys.*o_proj.weight'\]"):
        apply_plan(tmp_path / "plan", str(model), tmp_path / "again", export=["padded-bf16"])
    assert answers


@pytest.mark.parametrize(
    ("module", "other"),
    [
        ("model.visual.blocks.0.mlp.up_proj", True),
        ("visual.layers.0.mlp.up_proj", True),
        ("model.vision_tower.encoder.layers.0.mlp.fc0", True),
        ("vision_tower.layers.0.wqkv", True),
        ("mm_projector.proj.0", True),
        ("model.language_model.layers.1.mlp.experts.0.up_proj", False),
        ("language_model.model.layers.1.self_attn.o_proj", False),
        ("language_model.layers.1.mlp.experts.0.up_proj", False),
        ("model.layers.1.mlp.experts.0.up_proj", False),
        ("layers.1.mlp.experts.0.up_proj", False),
    ],
)
def test_modules_outside_of_the_text_model_are_told_by_their_names(module, other):
    assert bool(re.match(OTHER_PARTS.removeprefix("re:"), module)) == other


def test_a_text_model_under_its_published_name_is_read_too(tmp_path):
    """Kimi-K2.5's config.json calls it kimi_k2, and keeps what 4-bit weights are inside of it."""
    wrapped.save_model("kimi_k25", tmp_path / "base")
    wanted = logits(open_checkpoint(tmp_path / "base"), TEXT)
    copy = shutil.copytree(tmp_path / "base", tmp_path / "published")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["model_type"] = "kimi_k2"
    (copy / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(logits(open_checkpoint(copy), TEXT), wanted)


@pytest.mark.parametrize("checkpoint", ["kimi_k25"], indirect=True)
def test_the_code_of_processors_and_tokenizers_stays_named_and_comes_along(checkpoint, tmp_path):
    _, plan, _ = checkpoint
    model = shutil.copytree(checkpoint[0].about.folder, tmp_path / "model")
    texts = {"AutoProcessor": "processing_kimi.Processor",
             "AutoTokenizer": ["tokenization_kimi.Slow", None]}  # fmt: skip
    change_config(model, auto_map=texts | {"AutoModel": "modeling_kimi.Model"})
    code = {"processing_kimi.py": "import media_utils\n", "media_utils.py": "", 
            "tokenization_kimi.py": "", "modeling_kimi.py": ""}  # fmt: skip
    for name, text in code.items():
        (model / name).write_text(text)
    base = open_checkpoint(model, dtype=jnp.bfloat16)
    export = Export(base.about, kept_widths(plan, base.about), ExportFormat("padded-bf16"))
    folder = export.write(PrunedSource(base, plan), tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["auto_map"] == texts
    assert {path.name for path in folder.glob("*.py")} == code.keys() - {"modeling_kimi.py"}


def test_a_wrapper_without_its_text_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k25"}))
    with pytest.raises(CheckpointError, match="lacks text_config, the part about the text model"):
        open_checkpoint(tmp_path)


def test_experts_as_transformers_5_writes_them_are_read_too(tmp_path):
    """[E, 2F, D] and [E, D, F]: in its own class, Qwen3-VL's are the other way round on disk."""
    published = tmp_path / "published"
    reference = wrapped.save_model("qwen3_vl_moe", published)
    tiny.save(tiny.half(reference), tmp_path / "written")
    name = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    shapes = [stored(folder)[name].shape for folder in (published, tmp_path / "written")]
    assert shapes == [(8, 160, 192), (8, 192, 160)]
    found, wanted = (
        logits(open_checkpoint(folder), TEXT) for folder in (tmp_path / "written", published)
    )
    np.testing.assert_array_equal(found, wanted)


@each_wrapper
def test_without_a_format_named_those_of_the_family_are_estimated(checkpoint, capsys):
    about = checkpoint[0].about
    assert run("estimate", about.folder, "--no-probe", "--json", "-") == 0
    (told,) = json.loads(capsys.readouterr().out)
    packed = [] if about.family.model_type == "qwen3_vl_moe" else ["padded-int4"]
    assert list(told["exports"]) == ["padded-bf16", *packed] and told["memory"]["export"] > 0


@pytest.mark.slow
@each_wrapper
def test_the_command_line_applies_a_plan_and_verifies_it_in_the_multimodal_class(
    checkpoint, tmp_path, capsys
):
    base, plan, _ = checkpoint
    plan.save(tmp_path / "plan")
    arguments = (base.about.folder, "--export", "padded-bf16", "--output", tmp_path / "out")
    assert run("apply", tmp_path / "plan", *arguments, "--json", "-") == 0
    checks = {c["check"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["logits in transformers"]["ok"]
    assert "max difference" in checks["logits in transformers"]["detail"]
    card = (tmp_path / "out/exports/padded-bf16/README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "pipeline_tag: image-text-to-text" in card


@pytest.mark.parametrize("checkpoint", ["qwen3_vl_moe"], indirect=True)
@pytest.mark.parametrize("channels", [160, 80])
def test_experts_that_transformers_would_transpose_are_refused(checkpoint, channels):
    base, _, _ = checkpoint
    widths = tuple((channels,) * len(row) for row in base.about.widths)
    with pytest.raises(InputError, match="cannot tell from their transpose; choose another prune"):
        Export(base.about, widths, ExportFormat("padded-bf16")).check()


@each_wrapper
def test_checking_the_weights_hashes_them_without_a_second_reading(checkpoint, monkeypatch):
    about = checkpoint[0].about
    alone, base, read = open_checkpoint(about.folder), open_checkpoint(about.folder), []
    original = SafetensorsFolder.read_part

    def counting(self, name, first, shape):
        array = original(self, name, first, shape)
        read.append(array.nbytes)
        return array

    monkeypatch.setattr(SafetensorsFolder, "read_part", counting)
    alone.hash_weights()
    every = sum(read)
    read.clear()
    base.check_finite()
    # The experts of Qwen3-VL lie together, and each is read with its tensor's whole row.
    assert sum(read) == every or about.family.together
    assert base.fingerprint == alone.fingerprint


def test_what_config_json_says_beside_the_text_model_identifies_it_too(tmp_path):
    wrapped.save_model("kimi_k25", tmp_path)
    before = open_checkpoint(tmp_path).fingerprint
    change_config(tmp_path, projection_hidden_size=64)
    assert open_checkpoint(tmp_path).fingerprint != before


def make_int4(target, plain, prefix: str):
    """Routed experts in 4 bits, as Kimi-K2.5 is published; values by name."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    make, group = quantized.compressed("pack-quantized", **weights)
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
        "group_0": group | {"targets": [rf"re:{prefix}layers\.\d+\.mlp\.experts\."]}}}  # fmt: skip
    return quantized.rewrite(
        plain, target, lambda name, shape: make(name, shape) if ".experts." in name else None, said
    )


@pytest.mark.parametrize("place", ["inside", "outside"])
@pytest.mark.parametrize("checkpoint", ["kimi_k25"], indirect=True)
def test_a_text_model_in_few_bits_is_read_and_written_in_16(checkpoint, tmp_path, place):
    _, plan, _ = checkpoint
    prefix = {"inside": "model.", "outside": "language_model.model."}[place]
    exact = make_int4(tmp_path / "model", checkpoint[0].about.folder, prefix)
    if place == "inside":  # of text_config, as it is published
        config = json.loads((tmp_path / "model/config.json").read_text())
        config["text_config"]["quantization_config"] = config.pop("quantization_config")
        (tmp_path / "model/config.json").write_text(json.dumps(config))
    base = open_checkpoint(tmp_path / "model", dtype=jnp.bfloat16)
    read = dict(layer_tensors(base, base.layer(1), 1))
    assert any(".experts.7.down_proj" in name for name in read)
    for name, value in read.items():
        wanted = exact[base.about.family.wrapper.stored(name)].float().numpy()
        np.testing.assert_array_equal(value.astype(np.float32), wanted, err_msg=name)

    form = ExportFormat("padded-bf16")
    export = Export(base.about, kept_widths(plan, base.about), form)
    pruned = PrunedSource(base, plan)
    folder = export.write(pruned, tmp_path / "out")
    assert "quantization_config" not in (folder / "config.json").read_text()
    model, info = wrapped.load(folder)
    assert not any(info.values()), info
    again = open_checkpoint(folder, dtype=jnp.float32)
    np.testing.assert_allclose(logits(again, TEXT), text_logits(model), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpoint", ["kimi_k25"], indirect=True)
def test_another_part_in_few_bits_is_refused(checkpoint, tmp_path):
    make_int4(tmp_path / "model", checkpoint[0].about.folder, "model.")
    path = tmp_path / "model/model.safetensors"
    tower = {"vision_tower.blocks.0.weight_packed": np.zeros((8, 4), np.int32)}
    save_file(load_file(path) | tower, path)
    with pytest.raises(CheckpointError, match=r"weight_packed is int32: only the text model is"):
        open_checkpoint(tmp_path / "model")


def around(folder, inner, *, prefix="model.language_model.", **outer):
    """A model of a type that nobody knows, with a Qwen3-MoE inside of it."""
    sizes = {"num_hidden_layers": 2, "moe_intermediate_size": 32}
    plain = tiny.save(tiny.half(tiny.tiny_model("qwen3_moe", **sizes)), inner)
    folder.mkdir()
    tensors = {}
    for name, value in load_file(plain / "model.safetensors").items():
        tensors[name if name.startswith("lm_head") else prefix + name.removeprefix("model.")] = (
            value
        )
    tensors["model.eyes.patch.weight"] = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors["model.eyes.places"] = np.arange(5)
    save_file(tensors, folder / "model.safetensors")
    text = json.loads((plain / "config.json").read_text())
    config = {"model_type": "seer_moe", "architectures": ["SeerForConditionalGeneration"],
              "eyes_config": {"depth": 1}, "text_config": text, "dtype": "bfloat16"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | outer))
    return plain


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_an_unknown_model_around_a_known_text_model_is_pruned_too(tmp_path, caplog, prefix):
    plain = around(tmp_path / "model", tmp_path / "plain", prefix=prefix)
    tokens = TEXT % 80
    base = open_checkpoint(tmp_path / "model", dtype=jnp.bfloat16)
    np.testing.assert_array_equal(logits(base, tokens), logits(
        open_checkpoint(plain, dtype=jnp.bfloat16), tokens))  # fmt: skip
    words = f"seer_moe is not known itself: its text model, a qwen3_moe under {prefix}, is read"
    assert words in caplog.text
    keep = np.zeros((2, 8, 32), bool)
    keep[:, :, ::2] = True
    (tmp_path / "plan").mkdir()
    PruningPlan(keep, (0, 1), {"model_hash": base.fingerprint}).save(tmp_path / "plan")
    checks = apply_plan(tmp_path / "plan", str(tmp_path / "model"), tmp_path / "out")
    assert all(check.ok for check in checks)
    (undone,) = (check for check in checks if not check.done)
    assert undone.check == "logits in transformers" and "seer_moe" in undone.detail
    folder = tmp_path / "out/exports/padded-bf16"
    before, after = stored(tmp_path / "model"), stored(folder)
    eyes = [name for name in before if "eyes" in name]
    assert len(eyes) == 2 and all(after[n].tobytes() == before[n].tobytes() for n in eyes)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "seer_moe" and config["eyes_config"] == {"depth": 1}
    assert config["text_config"]["moe_intermediate_size"] == 16
    assert config["text_config"]["model_type"] == "qwen3_moe"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"model_type": "seer_text"}, "model_type='seer_moe' is unknown; known are"),
        ({"hidden_size": 64}, r"model.embed_tokens.weight has shape \[96, 32\]; config.json asks"),
        (None, r"its text_config is a qwen3_moe, but there is no one tensor that ends with embed"),
    ],
)
def test_an_unknown_model_whose_tensors_do_not_fit_is_refused(tmp_path, text, message):
    around(tmp_path / "model", tmp_path / "plain")
    path = tmp_path / "model/model.safetensors"
    if text is None:
        tensors = load_file(path)
        del tensors["model.language_model.norm.weight"]
        save_file(tensors, path)
    else:
        config = json.loads((tmp_path / "model/config.json").read_text())
        change_config(tmp_path / "model", text_config=config["text_config"] | text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "model")


def test_every_wrapper_is_tried_here():
    from convert import FAMILIES

    assert {name for name, family in FAMILIES.items() if family.wrapper} == set(WRAPPERS)
    assert not any(find_family(name).ragged for name in WRAPPERS)
