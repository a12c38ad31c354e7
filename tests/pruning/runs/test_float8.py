"""8-bit floats in, 8-bit floats out: blocks keep their codes through pruning, or it is said."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from convert import open_checkpoint
from convert.clients import client_table
from convert.export import Export
from convert.export_format import ExportFormat
from moe_jax.errors import InputError
from pruning import CompressionRecipe, compress
from pruning.budget.plan import PruningPlan
from pruning.stages.job import resolved
from tests.support import float8, quantized, tiny
from tests.support.command import run

SIZES = {"hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 384,
         "n_shared_experts": 1, "kv_lora_rank": 32, "vocab_size": 320, "first_k_dense_replace": 1,
         "n_routed_experts": 4}  # fmt: skip
NAME = "padded-fp8"


def save(folder, *, dtype=torch.float32, said=float8.SAID, **sizes) -> Path:
    """A DeepSeek-V3 as published: 8-bit floats but for what is named otherwise."""
    plain = tiny.save(
        tiny.half(tiny.tiny_model("deepseek_v3", **{**SIZES, **sizes})), folder / "plain"
    )
    quantized.rewrite(plain, folder / "model", float8.published(dtype=dtype), dict(said))
    return tiny.add_tokenizer(folder / "model")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("float8"))


def plan_of(model, folder, keep) -> PruningPlan:
    base = open_checkpoint(model)
    folder.mkdir()
    PruningPlan(keep, base.config.moe_layers, {"model_hash": base.fingerprint}).save(folder)
    return PruningPlan.load(folder)


def whole_blocks() -> np.ndarray:
    """Expert 0 keeps blocks 0 and 2, 1 the last, 2 none, 3 the first two."""
    blocks = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0]], bool)
    return np.repeat(blocks, 128, axis=1)[None]


def applied(model, tmp_path, keep, *options) -> Path:
    plan_of(model, tmp_path / "plan", keep)
    out = tmp_path / "out"
    code = run("apply", tmp_path / "plan", model, "--output", out, "--bits", "8", *options)
    assert code == 0
    return out / "exports" / NAME


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def pairs(tensors, stem):
    """Codes and scales of the three weights of a network, a row per channel."""
    for part in ("gate_proj", "up_proj", "down_proj"):
        found = [tensors[f"{stem}{part}.{key}"] for key in ("weight", "weight_scale_inv")]
        yield part, *((one.T for one in found) if part == "down_proj" else found)


def test_whole_blocks_keep_their_codes_and_scales_byte_for_byte(model, tmp_path, capsys):
    keep = whole_blocks()
    folder = applied(model, tmp_path, keep)
    base, stored = (load_file(f / "model.safetensors") for f in (model, folder))
    for expert, kept in enumerate(keep[0]):
        stem, count = f"model.layers.1.mlp.experts.{expert}.", int(kept.sum())
        pair = zip(pairs(base, stem), pairs(stored, stem), strict=True)
        for (_, codes, scale), (_, new_codes, new_scale) in pair:
            assert new_codes.shape[0] == 256 and new_scale.shape[0] == 2  # the widest expert's
            np.testing.assert_array_equal(as_bytes(new_codes)[:count], as_bytes(codes)[kept])
            np.testing.assert_array_equal(new_scale[: count // 128], scale[kept[::128]])
            assert not as_bytes(new_codes)[count:].any() and (new_scale[count // 128 :] == 1).all()
    for name, value in base.items():
        if ".mlp.experts." not in name:  # in 8 bits or in 16, as it was
            found = stored[name][: len(value)] if "shared_experts" not in name else None
            if found is not None:
                np.testing.assert_array_equal(as_bytes(found), as_bytes(value), name)
    assert stored["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"].dtype == torch.bfloat16
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == float8.SAID
    assert config["moe_intermediate_size"] == 256
    assert json.loads((folder / "rounding.json").read_text()) == {"relative_squared_error": 0.0}
    words = "what the model stores in few bits is taken over bit for bit"
    assert words in " ".join(capsys.readouterr().err.split())
    assert "Weights that the base has in 8-bit floats" in (folder / "README.md").read_text()


def test_a_shared_expert_is_filled_up_beside_its_own_codes(model, tmp_path):
    stored = load_file(applied(model, tmp_path, whole_blocks()) / "model.safetensors")
    base, stem = load_file(model / "model.safetensors"), "model.layers.1.mlp.shared_experts."
    pair = zip(pairs(base, stem), pairs(stored, stem), strict=True)
    for (_, codes, scale), (_, new_codes, new_scale) in pair:
        assert len(codes) == 384 and len(new_codes) == 512  # two experts' widths
        np.testing.assert_array_equal(as_bytes(new_codes)[:384], as_bytes(codes))
        np.testing.assert_array_equal(new_scale[:3], scale)
        assert not as_bytes(new_codes)[384:].any() and (new_scale[3:] == 1).all()


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.float32, float8.SAID),
        (torch.bfloat16, float8.SAID),
        (torch.float32, float8.SAID | {"scale_fmt": "ue8m0"}),
    ],
    ids=["float32", "bfloat16", "powers of two"],
)
def test_mixed_blocks_are_rounded_a_second_time_and_this_is_said(tmp_path, capsys, dtype, said):
    model = save(tmp_path, dtype=dtype, said=said)
    keep = np.zeros((1, 4, 384), bool)
    keep[0, 0, ::3] = True  # 128 channels out of all blocks
    keep[0, 1, 128:384] = True  # two whole ones
    keep[0, 3, 40:168] = True  # 128 channels out of two
    folder = applied(model, tmp_path, keep, "--export", NAME)
    base, stored = (load_file(f / "model.safetensors") for f in (model, folder))
    wrong = total = 0.0
    for expert in (0, 1, 3):
        kept, stem = keep[0, expert], f"model.layers.1.mlp.experts.{expert}."
        pair = zip(pairs(base, stem), pairs(stored, stem), strict=True)
        for (_, codes, scale), (_, new_codes, new_scale) in pair:
            assert new_scale.dtype == dtype
            old = float8.values(codes, scale)[kept]
            new_codes, table = new_codes[: len(old)], new_scale[: len(old) // 128].float().numpy()
            if expert == 1:
                np.testing.assert_array_equal(as_bytes(new_codes), as_bytes(codes)[kept])
                continue
            wanted = float8.largest(old) / np.float32(448)
            if "scale_fmt" in said:
                wanted = 2.0 ** np.ceil(np.log2(wanted))
            wanted = torch.from_numpy(wanted.astype(np.float32)).to(dtype).float().numpy()
            np.testing.assert_array_equal(table, wanted)
            assert float8.is_nearest(new_codes, table, old)
            new = float8.values(new_codes, torch.from_numpy(table)).astype(np.float64)
            wrong += np.square(new - old).sum()
            total += np.square(old.astype(np.float64)).sum()
    error = json.loads((folder / "rounding.json").read_text())["relative_squared_error"]
    np.testing.assert_allclose(error, wrong / total, rtol=1e-6)
    assert 1e-5 < error < 2e-3
    words = f"rounded a second time, with a relative squared error of {error:.2g}"
    assert words in " ".join(capsys.readouterr().err.split())


def test_an_export_is_verified_in_jax_and_in_transformers(model, tmp_path, capsys):
    plan_of(model, tmp_path / "plan", whole_blocks())
    arguments = ["--output", tmp_path / "out", "--bits", "8", "--json", tmp_path / "said.json"]
    assert run("apply", tmp_path / "plan", model, *arguments) == 0
    checks = json.loads((tmp_path / "said.json").read_text())["checks"]
    found = {check["check"]: check for check in checks}
    assert {"tensors", "logits in JAX", "logits in transformers"} <= found.keys()
    assert all(check["ok"] and check["done"] for check in checks)


def test_a_changed_scale_is_found(model, tmp_path, capsys):
    folder = applied(model, tmp_path, whole_blocks())
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    name = "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"
    at = 8 + int.from_bytes(data[:8], "little") + header[name]["data_offsets"][0]
    data[at] ^= 1
    path.write_bytes(data)
    assert run("verify", tmp_path / "out") == 1
    assert f"tensors: {name}[0, 0] is" in " ".join(capsys.readouterr().err.split())


def test_incomplete_blocks_are_left_to_programs_that_read_them(tmp_path):
    model = save(tmp_path, hidden_size=160)
    plan_of(model, tmp_path / "plan", whole_blocks())
    arguments = ["--output", tmp_path / "out", "--bits", "8", "--json", tmp_path / "said.json"]
    assert run("apply", tmp_path / "plan", model, *arguments) == 0
    checks = json.loads((tmp_path / "said.json").read_text())["checks"]
    (undone,) = (check for check in checks if not check["done"])
    assert undone["check"] == "logits in transformers"
    assert "ends with an incomplete block of 128" in undone["detail"]
    assert {"logits in JAX", "tensors"} <= {check["check"] for check in checks if check["ok"]}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A model in 16 bits, compressed to 8: (the report, output folder, model)."""
    folder = tmp_path_factory.mktemp("fresh")
    sizes = {"hidden_size": 128, "moe_intermediate_size": 256, "num_experts": 4, "head_dim": 32,
             "vocab_size": 320, "mlp_only_layers": [0], "intermediate_size": 256}  # fmt: skip
    model = tiny.save(tiny.half(tiny.tiny_model("qwen3_moe", **sizes)), folder / "model")
    tiny.add_tokenizer(model)
    recipe = CompressionRecipe(
        model=str(model), output=str(folder / "out"), weights_only=True, prune_rate=0.5, bits=8,
        batch=4,
    )  # fmt: skip
    return compress(recipe), Path(recipe.output), model


def test_a_model_in_16_bits_is_rounded_to_nearest_by_the_largest_of_a_block(fresh):
    report, folder, model = fresh
    plan = PruningPlan.load(folder)
    assert (plan.counts == 128).all()
    base = load_file(model / "model.safetensors")
    stored = load_file(folder / "exports" / NAME / "model.safetensors")
    coded = [name for name in stored if name.endswith("_scale_inv")]
    assert len(coded) == 2 * 4 + 3 + 3 * 4  # attention, the dense layer, experts
    for name in coded:
        name = name.removesuffix("_scale_inv")
        weight = base[name].float().numpy()
        if ".experts." in name:
            keep = plan.keep[0, int(name.split(".")[5])]
            weight = weight[:, keep] if "down" in name else weight[keep]
        scale = stored[name + "_scale_inv"].numpy()
        np.testing.assert_array_equal(scale, float8.largest(weight) / np.float32(448))
        assert float8.is_nearest(stored[name], scale, weight)
    for name in stored.keys() & base.keys() - {name.removesuffix("_scale_inv") for name in coded}:
        assert torch.equal(stored[name], base[name])
    assert all(check["ok"] for check in report.verification)
    assert report.sizes["exports"][NAME]["bits_per_parameter"] < 16
    said = json.loads((folder / "exports" / NAME / "config.json").read_text())
    ignored = said["quantization_config"].pop("modules_to_not_convert")
    assert said["quantization_config"] == float8.SAID
    assert {"lm_head", "model.layers.1.mlp.gate"} <= set(ignored)
    assert not any("_proj" in name for name in ignored)


def test_transformers_dequantises_to_the_same_values(fresh):
    _, folder, _ = fresh
    stored = load_file(folder / "exports" / NAME / "model.safetensors")
    config = transformers.FineGrainedFP8Config(dequantize=True)
    model, info = tiny.load_export(folder / "exports" / NAME, trust=False,
                                   quantization_config=config)  # fmt: skip
    assert not any(info.values()), info
    layer, stem = model.model.layers[1], "model.layers.1."
    name = stem + "self_attn.o_proj.weight"
    wanted = float8.values(stored[name], stored[name + "_scale_inv"])
    np.testing.assert_array_equal(layer.self_attn.o_proj.weight.detach().numpy(), wanted)
    for expert in range(4):
        own = f"{stem}mlp.experts.{expert}."
        gate, up, down = (
            float8.values(stored[f"{own}{part}.weight"], stored[f"{own}{part}.weight_scale_inv"])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        both = layer.mlp.experts.gate_up_proj[expert].detach().numpy()
        np.testing.assert_array_equal(both, np.concatenate([gate, up]))
        np.testing.assert_array_equal(layer.mlp.experts.down_proj[expert].detach().numpy(), down)


def test_what_an_export_will_take_is_known_before(fresh, tmp_path, capsys):
    _, folder, model = fresh
    arguments = ("--no-probe", "--bits", "8", "--prune-rate", "0.5", "--json", "-")
    assert run("estimate", model, *arguments) == 0
    (told,) = json.loads(capsys.readouterr().out)
    written = sum(f.stat().st_size for f in (folder / "exports" / NAME).glob("*.safetensors"))
    one = told["exports"][NAME]
    assert one["bytes"] == one["fewest_bytes"] == one["most_bytes"] == written
    assert (one["group_size"], one["width"]) == (128, 128)
    assert all(other.endswith(("bf16", "int8")) for other in told["exports"].keys() - {NAME})
    out = tmp_path / "small"
    options = ["--weights-only", "--bits", "8", "--target-bytes", str(written), "--output", out]
    assert run("compress", model, *options) == 0
    assert sum(f.stat().st_size for f in (out / "exports" / NAME).glob("*.safetensors")) <= written


def test_servers_share_an_expert_over_gpus_in_whole_blocks(fresh):
    base = open_checkpoint(fresh[2]).about
    export = Export(base, tuple((256,) * len(row) for row in base.widths), ExportFormat(NAME))
    assert client_table(export)["vLLM"].verdict == client_table(export)["SGLang"].verdict == "yes"
    assert client_table(export, 2)["vLLM"].verdict == "yes"
    split = client_table(export, 4)["vLLM"]
    assert split.verdict == "no" and "no multiple of the 128 channels of a block" in split.rule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8, "export": ("ragged-int4",)}, r"bits=8 contradicts export=\['ragged-int4'\]"),
        ({"bits": 8, "export": ("padded-bf16",)}, r"bits=8 contradicts.*or --export padded-fp8"),
        ({"bits": 16, "export": (NAME,)}, r"bits=16 contradicts.*or --bits 8"),
        ({"bits": 8, "block": 64}, r"block=64 must be a multiple of 128.*choose --block 128"),
        ({"bits": 8, "quantizer": "gptq"}, "quantizer='gptq' chooses integers.*'padded-fp8'"),
    ],
)
def test_what_contradicts_8_bits_is_refused_with_the_cure(model, options, message):
    with pytest.raises(InputError, match=message):
        resolved(CompressionRecipe(model="m", output="o", **options), open_checkpoint(model).about)


def test_a_family_without_8_bits_says_what_it_has(tmp_path):
    folder = tiny.save(tiny.half(tiny.tiny_model("gpt_oss")), tmp_path / "model")
    with pytest.raises(InputError, match=r"bits=8 is the format padded-fp8.*padded-mxfp4"):
        resolved(CompressionRecipe(model="m", output="o", bits=8), open_checkpoint(folder).about)


def test_experts_that_are_no_whole_blocks_are_refused(tmp_path):
    sizes = {"moe_intermediate_size": 192, "hidden_size": 64}
    about = open_checkpoint(tiny.tiny_qwen3_moe(tmp_path / "model", **sizes)).about
    with pytest.raises(InputError, match=r"blocks of 128.* width 192; choose --bits 16"):
        resolved(CompressionRecipe(model="m", output="o", bits=8), about)
    export = Export(about, tuple((192,) * len(row) for row in about.widths), ExportFormat(NAME))
    with pytest.raises(InputError, match="blocks of 128, which do not divide the expert width 192"):
        export.check()


def test_a_model_in_8_bits_is_estimated_in_them_unless_told_otherwise(model, capsys):
    assert run("estimate", model, "--json", "-", "--no-probe") == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert NAME in told["exports"] and "ragged-int4" in told["exports"]
    base = open_checkpoint(model, dtype=jnp.bfloat16).about
    assert base.native is not None and base.is_native("model.layers.1.self_attn.o_proj.weight")
    assert not base.is_native("model.layers.1.self_attn.kv_a_proj_with_mqa.weight")


def test_channels_are_single_unless_whole_blocks_are_asked_for(model):
    about = open_checkpoint(model).about
    ours = {"model": str(model), "output": "out", "bits": 8}
    found = resolved(CompressionRecipe(**ours), about)
    assert (found.grid, found.block, found.minimum) == (None, 128, 128)
    assert resolved(CompressionRecipe(**ours, grid=128), about).grid == 128
    with pytest.raises(InputError, match="block=128 must be a multiple of grid=256"):
        resolved(CompressionRecipe(**ours, grid=256), about)


def test_all_linear_layers_are_rounded_anew_when_it_is_asked_for(model, tmp_path):
    folder = applied(model, tmp_path, whole_blocks(), "--requantize")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert stored[name].dtype == torch.float8_e4m3fn
    assert json.loads((folder / "rounding.json").read_text())["relative_squared_error"] > 1e-6
