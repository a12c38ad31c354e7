"""Layers that predict further tokens: dropped, kept or pruned, in every format."""

import json
import re
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from convert.checkpoint import open_checkpoint
from convert.export import ExportFormat, check_widths, export_bytes, export_checkpoint
from convert.reader import CheckpointError
from pruning import stages
from pruning.plan import PruningPlan
from pruning.progress import Steps
from pruning.prune import PrunedSource
from pruning.sizes import kept_widths
from tests import tiny
from tests.command import change_config, change_tensor, given, refused, run
from tests.test_deepseek_v3 import BLOCK, to_blocks
from tests.test_families import COUNTS, TOKENS, plan_for

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


def pruned_by_hand(extra: dict, width: int, shared: int) -> dict:
    """Experts of `width` channels and a shared one of `shared`, channel after channel."""
    found = {}
    for name, value in extra.items():
        stem, _, part = name.rpartition(".mlp.")
        parts = part.split(".")
        if parts[0] == "experts":
            gate, up, down = (
                extra[f"{stem}.mlp.experts.{parts[1]}.{kind}_proj.weight"].astype(float)
                for kind in ("gate", "up", "down")
            )
            score = [
                sum(gate[i] ** 2) * sum(up[i] ** 2) * sum(down[:, i] ** 2) for i in range(len(gate))
            ]
            kept = sorted(sorted(range(len(score)), key=lambda i: -score[i])[:width])  # noqa: B023
            value = value[:, kept] if parts[2] == "down_proj" else value[kept]
        elif parts[0] in ("shared_experts", "shared_expert"):
            rows, columns = value.shape
            padding = ((0, 0), (0, shared - columns)) if parts[1] == "down_proj" else (
                (0, shared - rows), (0, 0)
            )  # fmt: skip
            value = np.pad(value, padding)
        found[name] = value
    return found


def load_in_transformers(folder, form: ExportFormat):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=form.is_ragged,
        output_loading_info=True,
        attn_implementation="eager",
    )
    return tiny.torch_logits(model.eval(), TOKENS, np.ones(TOKENS.shape, bool)), info


each_family = pytest.mark.parametrize(
    "checkpoint", ["deepseek_v3", "glm4_moe", "qwen3_next"], indirect=True
)
FORMATS = ["ragged-bf16", "ragged-int4", "padded-bf16", "padded-int4"]


@each_family
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("mtp", ["keep", "prune"])
def test_an_export_holds_the_layers_and_programs_load_the_same_model(
    checkpoint, tmp_path, name, mtp
):
    base, plan, extra = checkpoint
    form = ExportFormat(name, 32, mtp)
    if mtp == "keep" and not form.is_ragged:
        plan = whole(plan)
    widths, source = kept_widths(plan, base), PrunedSource(base, plan)
    folder = export_checkpoint(source, base, widths, tmp_path / "with", form)

    stored = load_file(folder / "model.safetensors")
    if mtp == "keep":
        wanted, width = extra, 96
    else:
        width = MEAN if form.is_ragged else WIDEST
        # 1 x 96 channels of DeepSeek's shared expert become 2 x 64 where 64 is the one width.
        counted = base.family.shared_count_key and not form.is_ragged
        wanted = pruned_by_hand(extra, width, 128 if counted else base.config.moe.d_shared)
    for key, value in wanted.items():
        assert (stored[key].dtype, stored[key].shape) == (value.dtype, value.shape), key
        assert stored[key].tobytes() == value.tobytes(), key
    written = (folder / "model.safetensors").stat().st_size
    assert written == export_bytes(base, widths, form)

    config = json.loads((folder / "config.json").read_text())
    assert config.get(KEEP_KEY, 1) == 1
    own = config.get("mtp_expert_intermediate_size", config["moe_intermediate_size"])
    assert own == width == stored[next(k for k in wanted if k.endswith("0.up_proj.weight"))].shape[0]

    without = export_checkpoint(
        source, base, widths, tmp_path / "without", ExportFormat(name, 32)
    )
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
        with pytest.raises(ValueError, match=f"96 channels wide .* {name} has one width, 64, .*mtp="):
            check_widths(base, kept_widths(plan, base), ExportFormat(name, 32, "keep"))
    with pytest.raises(ValueError, match="mtp='kept' is unknown; choose among drop, keep, prune"):
        ExportFormat("padded-bf16", mtp="kept")


@each_family
def test_an_estimate_counts_them_with_and_without_weights(checkpoint, tmp_path):
    """Their tensors need not be there: config.json says what they are."""
    base, plan, extra = checkpoint
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base.folder / "config.json", bare)
    for mtp in ("drop", "keep", "prune"):
        found = []
        for folder in (base.folder, bare):
            flags = ("--mtp", mtp, "--prune-rate", 0.5, "--no-probe", "--group-size", 32)
            assert run("estimate", folder, *flags, "--json", tmp_path / "found.json") == 0
            found += json.loads((tmp_path / "found.json").read_text())
        assert found[0]["exports"] == found[1]["exports"]
        names = FORMATS[:2] if mtp == "keep" else FORMATS
        assert sorted(found[0]["exports"]) == sorted(names)
        assert found[0]["parameters"]["mtp"] == sum(value.size for value in extra.values())
        counts = np.full_like(COUNTS, 64)  # half of 96, up to a whole group of 32 ...
        counts[:, ::2] = 32  # ... or down to one
        for name in names:
            kept = np.arange(96) < (counts if name.startswith("ragged") else 64)[..., None] \
                if name.startswith("ragged") else np.broadcast_to(np.arange(96) < 32, (2, 8, 96))
            own = PruningPlan(np.ascontiguousarray(kept), plan.layer_indices, plan.provenance)
            form = ExportFormat(name, 32, mtp)
            out = stages.export(base, own, form, tmp_path / mtp / name, Steps(quiet=True))
            written = (out / "model.safetensors").stat().st_size
            assert found[0]["exports"][name]["bytes"] == pytest.approx(written, rel=0.01), name
