"""Layers that predict further tokens: dropped, kept or pruned, in every format."""

import json
import re
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from convert.checkpoint import open_checkpoint
from convert.export import Export
from convert.export_format import ExportFormat
from convert.reader import CheckpointError
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.shrink.prune import PrunedSource
from pruning.stages.export import export, mtp_source
from pruning.stages.sizes import kept_widths
from tests.convert.families.test_deepseek_v3 import BLOCK, to_blocks
from tests.convert.families.test_families import TOKENS, plan_for
from tests.support import tiny
from tests.support.command import change_config, change_tensor, given, refused, run

COPIED, FIRST = "model.layers.2.", {"deepseek_v3": "model.layers.3.", "glm4_moe": "model.layers.3."}
OWN = {
    "enorm.weight": (64,), "hnorm.weight": (64,), "eh_proj.weight": (64, 128),
    "embed_tokens.weight": (96, 64), "shared_head.norm.weight": (64,),
    "shared_head.head.weight": (96, 64),
}  # fmt: skip
NEXT_OWN = {
    "fc.weight": (64, 128), "norm.weight": (64,), "pre_fc_norm_embedding.weight": (64,),
    "pre_fc_norm_hidden.weight": (64,),
}  # fmt: skip
MEAN = 32  # of COUNTS
WIDEST = 64
KEEP_KEY = "num_nextn_predict_layers"


def add_mtp(folder, family: str):
    """Give a checkpoint one random layer more, named as published ones are; its tensors."""
    tensors, torch_generator = load_torch(folder / "model.safetensors"), torch.manual_seed(5)
    stem = FIRST.get(family, "mtp.layers.0.")
    shapes = {
        name.replace(COPIED, stem): (value.shape, value.dtype)
        for name, value in tensors.items()
        if name.startswith(COPIED)
    }
    prefix, own = (stem, OWN) if family in FIRST else ("mtp.", NEXT_OWN)
    shapes |= {prefix + name: (shape, torch.bfloat16) for name, shape in own.items()}
    extra = {
        name: torch.randn(shape, generator=torch_generator).to(dtype)
        for name, (shape, dtype) in shapes.items()
    }
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    if family in FIRST:
        change_config(folder, **{KEEP_KEY: 1})
    return {name: load_file(folder / "model.safetensors")[name] for name in extra}


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory):
    """(base, plan of COUNTS, its tensors of the layer that predicts further tokens)."""
    folder = tmp_path_factory.mktemp("mtp") / request.param
    _, plan, _ = plan_for(request.param, folder)
    extra = add_mtp(folder, request.param)
    base = open_checkpoint(folder, dtype=jnp.bfloat16)
    return base, PruningPlan(plan.keep, plan.layer_indices, {"model_hash": base.fingerprint}), extra


def whole(plan: PruningPlan) -> PruningPlan:
    return PruningPlan(np.ones_like(plan.keep), plan.layer_indices, plan.provenance)


def largest_by_hand(extra: dict, stem: str, expert: str, width: int, centred: bool) -> list[int]:
    """Channels that add most along the expert's output, on noise that the router sends to it."""
    weights = {
        part: extra[f"{stem}.mlp.experts.{expert}.{part}_proj.weight"].astype(float)
        for part in ("gate", "up", "down")
    }
    gain = extra[f"{stem}.post_attention_layernorm.weight"].astype(float) + (1 if centred else 0)
    router = extra[f"{stem}.mlp.gate.weight"].astype(float)[int(expert)]
    rows = [
        row / np.linalg.norm(row) * 8 for row in np.random.default_rng(0).normal(size=(2048, 64))
    ]
    rows = sorted((row * gain for row in rows), key=lambda x: -(x @ router))[:256]
    worth = np.zeros(96)
    for x in rows:
        g, u = weights["gate"] @ x, weights["up"] @ x
        outputs = weights["down"] * (g * u / (1 + np.exp(-g)))  # [D, F]
        worth += outputs.T @ outputs.sum(axis=1)
    return sorted(sorted(range(96), key=lambda i: -worth[i])[:width])


def pruned_by_hand(extra: dict, width: int, shared: int, *, centred: bool) -> dict:
    """Experts of `width` channels and a shared one of `shared`."""
    found = {}
    for name, value in extra.items():
        stem, _, part = name.rpartition(".mlp.")
        parts = part.split(".")
        if parts[0] == "experts":
            kept = largest_by_hand(extra, stem, parts[1], width, centred)
            value = value[:, kept] if parts[2] == "down_proj" else value[kept]
        elif parts[0] in ("shared_experts", "shared_expert"):
            rows, columns = value.shape
            down = parts[1] == "down_proj"
            padding = ((0, 0), (0, shared - columns)) if down else ((0, shared - rows), (0, 0))
            value = np.pad(value, padding)
        found[name] = value
    return found


def load_in_transformers(folder, form: ExportFormat):
    model, info = tiny.load_export(folder, trust=not form.is_padded)
    return tiny.torch_logits(model, TOKENS, np.ones(TOKENS.shape, bool)), info


each_family = pytest.mark.parametrize(
    "checkpoint", ["deepseek_v3", "glm4_moe", "qwen3_next"], indirect=True
)
FORMATS = [
    f"{shape}-{bits}" for shape in ("ragged", "layered", "padded") for bits in ("bf16", "int4")
]


@pytest.mark.slow
@pytest.mark.parametrize(  # every format of one family, every family in one of each width
    ("checkpoint", "name"),
    [("deepseek_v3", name) for name in FORMATS]
    + [(f, n) for f in ("glm4_moe", "qwen3_next") for n in ("ragged-bf16", "padded-int4")],
    indirect=["checkpoint"],
)
@pytest.mark.parametrize("mtp", ["keep", "prune"])
def test_an_export_holds_the_layers_and_programs_load_the_same_model(
    checkpoint, tmp_path, name, mtp
):
    base, plan, extra = checkpoint
    form = ExportFormat(name, 32, mtp=mtp)
    if mtp == "keep" and form.is_padded:
        plan = whole(plan)
    widths, source = kept_widths(plan, base.about), PrunedSource(base, plan)
    folder = Export(base.about, widths, form).write(source, tmp_path / "with", mtp=mtp_source(base))

    stored = load_file(folder / "model.safetensors")
    if mtp == "keep":
        wanted, width = extra, 96
    else:
        width = WIDEST if form.is_padded else MEAN
        # 1 x 96 channels of DeepSeek's shared expert become 2 x 64 where 64 is the one width.
        counted = base.about.family.shared_count_key and form.is_padded
        shared = 128 if counted else base.config.moe.d_shared
        wanted = pruned_by_hand(extra, width, shared, centred=base.config.centred_norms)
    for key, value in wanted.items():
        assert (stored[key].dtype, stored[key].shape) == (value.dtype, value.shape), key
        assert stored[key].tobytes() == value.tobytes(), key
    written = (folder / "model.safetensors").stat().st_size
    assert written == Export(base.about, widths, form).nbytes

    config = json.loads((folder / "config.json").read_text())
    assert config.get(KEEP_KEY, 1) == 1
    own = config.get("unpruned_intermediate_size", config["moe_intermediate_size"])
    own = config.get("mtp_expert_intermediate_size", own)
    assert (
        own == width == stored[next(k for k in wanted if k.endswith("0.up_proj.weight"))].shape[0]
    )

    without = Export(base.about, widths, ExportFormat(name, 32)).write(source, tmp_path / "without")
    assert json.loads((without / "config.json").read_text())[KEEP_KEY] == 0
    plain = load_file(without / "model.safetensors")
    assert stored.keys() - plain.keys() == extra.keys() and plain.keys() <= stored.keys()
    (found, info), (expected, nothing) = (load_in_transformers(f, form) for f in (folder, without))
    assert not any(nothing.values()), nothing
    prefixes = tuple({re.match(r"mtp\.|model\.layers\.\d+\.", key)[0] for key in extra})
    assert all(key.startswith(prefixes) for key in info.pop("unexpected_keys"))
    assert not any(info.values()), info
    np.testing.assert_array_equal(found, expected)
    if form.is_packed:
        check_ignored(config["quantization_config"]["ignore"], extra, stored)


def check_ignored(ignore: list[str], extra: dict, stored: dict) -> None:
    """What vLLM asks: exact names, or patterns, of modules that it may have fused."""

    def is_ignored(module: str) -> bool:
        return any(
            bool(re.match(entry[3:], module)) if entry.startswith("re:") else entry == module
            for entry in ignore
        )

    stems = {re.sub(r"(self_attn|mlp\.experts\.\d+)\..*", r"\1.", key) for key in extra}
    for stem in stems:
        assert is_ignored(stem.removesuffix(".weight")), stem
        assert is_ignored(f"{stem}qkv_proj") and is_ignored(f"{stem}gate_up_proj")
    packed = [key.removesuffix(".weight_packed") for key in stored if key.endswith("_packed")]
    assert packed and not any(is_ignored(module) for module in packed)


@each_family
def test_layers_kept_at_another_width_than_the_one_of_a_padded_folder_are_refused(checkpoint):
    base, plan, _ = checkpoint
    for name in ("padded-bf16", "padded-int4"):
        with pytest.raises(
            ValueError, match=f"96 channels wide .* {name} has one width, 64, .*mtp="
        ):
            Export(
                base.about, kept_widths(plan, base.about), ExportFormat(name, 32, mtp="keep")
            ).check()
    with pytest.raises(ValueError, match="mtp='kept' is unknown; choose among drop, keep, prune"):
        ExportFormat("padded-bf16", mtp="kept")


@each_family
def test_an_estimate_counts_them_with_and_without_weights(checkpoint, tmp_path):
    """Their tensors need not be there: config.json says what they are."""
    base, plan, extra = checkpoint
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base.about.folder / "config.json", bare)
    for mtp in ("drop", "keep", "prune"):
        found = []
        for folder in (base.about.folder, bare):
            flags = ("--mtp", mtp, "--prune-rate", 0.5, "--no-probe", "--group-size", 32)
            assert run("estimate", folder, *flags, "--json", tmp_path / "found.json") == 0
            found += json.loads((tmp_path / "found.json").read_text())
        names = FORMATS[:4] if mtp == "keep" else FORMATS
        assert sorted(found[0]["exports"]) == sorted(found[1]["exports"]) == sorted(names)
        assert found[0]["parameters"] == found[1]["parameters"]
        assert found[0]["parameters"]["mtp"] == sum(value.size for value in extra.values())
        for name in names[:: 1 if mtp == "prune" else 3]:
            one, other = (estimate["exports"][name] for estimate in found)
            counts = np.full((2, 8), one["width"] or 32)
            if one["width"] is None:  # half of 96 on average
                counts[
                    (0, slice(None))
                    if name.startswith("layered")
                    else (slice(None), slice(0, 8, 2))
                ] += 32
            keep = np.arange(96) < counts[..., None]
            own = PruningPlan(keep, plan.layer_indices, plan.provenance)
            form = ExportFormat(name, 32, mtp=mtp)
            out = export(base, own, form, tmp_path / mtp / name, Steps(quiet=True))
            stored = load_file(out / "model.safetensors")
            written = (out / "model.safetensors").stat().st_size
            assert one["bytes"] == pytest.approx(written, rel=0.01), name
            assert other["bytes"] == pytest.approx(written, rel=0.01), name
            assert one["fewest_bytes"] <= written <= one["most_bytes"]
            if name.endswith("bf16") and not base.about.family.shared_count_key:
                assert one["parameters"]["total"] == sum(value.size for value in stored.values())


# --- checkpoints that are not bfloat16, or not whole ---


@pytest.fixture
def folder(tmp_path):
    """A DeepSeek-V3 of published layout and its tensors of the layer that predicts on."""
    plan_for("deepseek_v3", tmp_path / "base")
    return tmp_path / "base", add_mtp(tmp_path / "base", "deepseek_v3")


def test_8_bit_blocks_are_dequantised_and_other_dtypes_stay(folder, tmp_path):
    path, extra = folder
    tensors, exact = load_torch(path / "model.safetensors"), {}
    for name in extra:
        value = exact[name] = tensors[name]
        if name.endswith("_proj.weight") and "eh_proj" not in name:
            tensors[name], tensors[name + "_scale_inv"], wide = to_blocks(value.float())
            exact[name] = wide.bfloat16()
        elif name.endswith("embed_tokens.weight"):
            tensors[name] = exact[name] = value.float() + 2.0**-20
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    change_config(path, quantization_config=fp8)
    base = open_checkpoint(path, dtype=jnp.bfloat16)
    form = ExportFormat("padded-bf16", mtp="keep")
    out = Export(base.about, base.about.widths, form).write(
        base, tmp_path / "out", mtp=mtp_source(base)
    )
    stored = load_torch(out / "model.safetensors")
    assert stored.keys() == {name for name in tensors if not name.endswith("_scale_inv")}
    for name, value in exact.items():
        assert stored[name].dtype == value.dtype and torch.equal(stored[name], value), name


def test_a_layer_that_is_not_whole_is_refused_unless_it_is_dropped(folder, tmp_path, capsys):
    path, _ = folder
    tensors = load_torch(path / "model.safetensors")
    gone = "model.layers.3.mlp.experts.5.up_proj.weight"
    wide = "model.layers.3.self_attn.o_proj.weight"
    tensors[wide] = torch.zeros(64, 32, dtype=torch.bfloat16)
    for name in (gone, "model.layers.3.embed_tokens.weight"):  # some share the model's embedding
        del tensors[name]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for mtp in ("keep", "prune"):
        shown = refused(capsys, tmp_path, "estimate", path, "--mtp", mtp)
        assert f"{gone} is missing" in shown and f"{wide} has shape [64, 32]" in shown
        assert "embed_tokens" not in shown
    assert run("estimate", path, "--no-probe") == 0


def test_nothing_to_keep_is_refused(folder, models, tmp_path, capsys):
    path, _ = folder
    without = tmp_path / "without"
    shutil.copytree(path, without)
    change_config(without, **{KEEP_KEY: 0})
    tensors = load_torch(path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".layers.3." not in name}
    save_file(kept, without / "model.safetensors", metadata={"format": "pt"})
    for model in (without, models / "single"):
        shown = refused(capsys, tmp_path, "estimate", model, "--mtp", "prune")
        assert "mtp='prune' needs layers that predict further tokens" in shown
        assert f"{model} has none; choose mtp='drop'" in shown


def test_nan_in_a_layer_to_keep_is_found(folder, tmp_path):
    path, _ = folder
    name = "model.layers.3.enorm.weight"
    change_tensor(path, name, lambda value: value * ml_dtypes.bfloat16(np.nan))
    base = open_checkpoint(path)
    base.check_finite()
    with pytest.raises(CheckpointError, match=f"{name} holds NaN"):
        base.read_mtp(name)  # what was not looked at yet still is
    with pytest.raises(CheckpointError, match=f"{name} holds NaN"):
        open_checkpoint(path).check_finite(mtp=True)


# --- the commands ---


@pytest.fixture(scope="module")
def drafting(tmp_path_factory):
    """A checkpoint with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("drafting") / "model"
    sizes = {"vocab_size": 300, "hidden_size": 64, "moe_intermediate_size": 96}
    sizes |= {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_shared_experts": 1}
    sizes |= {"kv_lora_rank": 32, "intermediate_size": 64}
    tiny.save(tiny.half(tiny.tiny_model("deepseek_v3", **sizes)), folder)
    add_mtp(folder, "deepseek_v3")
    (folder.parent / "good.txt").write_text("The quick brown fox jumps over the lazy dog. " * 10)
    return tiny.add_tokenizer(folder)


@pytest.mark.slow
def test_the_commands_write_verify_and_describe_what_was_chosen(drafting, tmp_path, capsys):
    assert run("inspect", drafting, "--json", "-") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["mtp_layers"] == 1 and shown["mtp_tensors"] > 30
    assert shown["mtp_parameters"] > 8 * 3 * 64 * 96

    out = tmp_path / "out"
    arguments = (drafting, *given(drafting.parent, out), "--export", "padded-int4", "padded-bf16")
    shown = refused(capsys, tmp_path, "compress", *arguments, "--mtp", "keep")
    assert "mtp='keep' leaves experts 96 channels wide" in shown
    assert run("compress", *arguments, "--prune-rate", 0.5, "--mtp", "prune") == 0
    assert "predict further tokens; they are pruned" in capsys.readouterr().err
    checks = json.loads((out / "report.json").read_text())["verification"]
    assert all(check["ok"] and check["done"] for check in checks)
    names = [check["check"] for check in checks]
    assert names.count("layers that predict further tokens") == 2
    assert names.count("transformers loads every tensor") == 2
    card = (out / "exports" / "padded-int4" / "README.md").read_text()
    assert re.search(r"each of their experts has 32 channels, those that add most", card)
    assert "mtp: prune" in card and "mtp: prune" in (out / "recipe.yaml").read_text()

    # told otherwise than the recipe
    assert run("export", out, "--export", "ragged-bf16", "--mtp", "keep") == 0
    ragged = out / "exports" / "ragged-bf16"
    assert "kept as they were, in 16 bits" in (ragged / "README.md").read_text()
    assert run("verify", out) == 0
    name = "model.layers.3.mlp.experts.2.down_proj.weight"
    change_tensor(ragged, name, lambda value: np.ascontiguousarray(value[:, ::-1]))
    capsys.readouterr()
    assert run("verify", out) == 1
    said = f"layers that predict further tokens: {name}[0, 0] is "
    assert said in capsys.readouterr().err

    applied = tmp_path / "applied"
    assert run("apply", out, drafting, "--export", "ragged-int4", "--output", applied) == 0
    assert "left out, so programs cannot draft" in capsys.readouterr().err
    card = (applied / "exports" / "ragged-int4" / "README.md").read_text()
    assert "predict further tokens (multi-token prediction) are left out" in card
    assert run(
        "apply", out, drafting, "--export", "ragged-int4", "--mtp", "prune", "--output", applied,
        "--overwrite",
    ) == 0  # fmt: skip
    shown = refused(
        capsys, tmp_path, "apply", out, drafting, "--export", "padded-bf16", "--mtp", "keep",
        "--output", tmp_path / "other",
    )  # fmt: skip
    assert "choose mtp='prune' or 'drop'" in shown
