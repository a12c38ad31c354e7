"""Checkpoints in few bits read as the format's own rule has it, bit for bit; or are refused."""

import json
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from convert import CheckpointError, layer_tensors, open_checkpoint
from tests.support import quantized, tiny

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny.tiny_qwen3_moe(tmp_path_factory.mktemp("models") / "plain", **quantized.SIZES)


def compressed_config(form, group, ignore=("lm_head",)):
    return {"quant_method": "compressed-tensors", "format": form, "ignore": list(ignore),
            "config_groups": {"group_0": group}, "quantization_status": "compressed"}  # fmt: skip


def of_compressed(form, **options):
    make, group = quantized.compressed(form, **options)
    return make, compressed_config(form, group)


FORMATS = {
    "awq": lambda: quantized.awq(32),
    "awq-rows": lambda: quantized.awq(-1),
    "gptq": lambda: quantized.gptq(4, 32),
    "gptq-act-order": lambda: quantized.gptq(4, 32, act_order=True),
    "gptq-v2": lambda: quantized.gptq(4, 16, version=2),
    "gptq-8": lambda: quantized.gptq(8, -1),
    "gptq-8-act-order-v2": lambda: quantized.gptq(8, 16, act_order=True, version=2),
    "gptq-bf16": lambda: quantized.gptq(4, 32, dtype=torch.bfloat16),
    "nf4": lambda: quantized.nf4(nested=False),
    "nf4-nested": lambda: quantized.nf4(nested=True),
    "nf4-f16": lambda: quantized.nf4(nested=True, dtype="float16"),
    "int4": lambda: of_compressed("pack-quantized", **INT4),
    "int4-f16": lambda: of_compressed("pack-quantized", dtype=torch.float16, **INT4),
    "int4-zeros": lambda: of_compressed(
        "pack-quantized", dtype=torch.float16, **INT4, symmetric=False),
    "int4-rows-zeros": lambda: of_compressed(
        "pack-quantized", num_bits=4, strategy="channel", symmetric=False),
    "int8-packed": lambda: of_compressed("pack-quantized", num_bits=8, strategy="channel"),
    "int8-packed-zeros": lambda: of_compressed(
        "pack-quantized", num_bits=8, strategy="group", group_size=16, symmetric=False),
    "int8": lambda: of_compressed("int-quantized", num_bits=8, strategy="channel"),
    "int8-zeros": lambda: of_compressed(
        "int-quantized", num_bits=8, strategy="tensor", symmetric=False),
    "fp8-rows": lambda: of_compressed("float-quantized", **FLOAT8, strategy="channel"),
    "fp8-tensor": lambda: of_compressed(
        "float-quantized", dtype=torch.float32, **FLOAT8, strategy="tensor"),
    "fp8-blocks": lambda: of_compressed(
        "naive-quantized", **FLOAT8, strategy="block", block_structure=[48, 32]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_weights_read_as_the_library_of_the_format_has_them(plain, tmp_path, name):
    make, said = FORMATS[name]()
    exact = quantized.rewrite(plain, tmp_path / "model", make, said)
    source = open_checkpoint(tmp_path / "model")
    read = dict(layer_tensors(source, source.layer(0), 0))
    assert sum("_proj." in tensor for tensor in read) == 4 * 3 + 4
    for tensor, value in read.items():
        wanted = exact[tensor]
        if wanted.dtype == torch.bfloat16:  # products are exact before they are cast
            value, wanted = value.astype(ml_dtypes.bfloat16).astype(np.float32), wanted.float()
        np.testing.assert_array_equal(value, wanted.numpy(), err_msg=tensor, strict=True)


@pytest.mark.parametrize("name", ["gptq-act-order", "nf4-nested", "int4", "fp8-rows"])
def test_cast_when_read_they_are_what_a_program_in_bfloat16_has(plain, tmp_path, name):
    make, said = FORMATS[name]()
    exact = quantized.rewrite(plain, tmp_path / "model", make, said)
    source = open_checkpoint(tmp_path / "model", dtype=jnp.bfloat16)
    for tensor, value in layer_tensors(source, source.layer(0), 0):
        wanted = exact[tensor].bfloat16().float().numpy()
        np.testing.assert_array_equal(value.astype(np.float32), wanted, err_msg=tensor)


def test_modules_have_the_scheme_of_their_group_and_ignored_ones_none(plain, tmp_path):
    experts, attention = (
        quantized.compressed("pack-quantized", **INT4),
        quantized.compressed("float-quantized", **FLOAT8, strategy="channel"),
    )

    def make(module, shape):
        if ".o_proj" in module:
            return None
        return (experts if ".experts." in module else attention)[0](module, shape)

    names = ["model.layers.0.self_attn.o_proj", "re:.*v_nothing"]
    said = compressed_config("mixed-precision", {}, names)
    said["config_groups"] = {
        "others": attention[1] | {"format": "float-quantized"},
        "experts": experts[1] | {"format": "pack-quantized", "targets": [r"re:.*mlp\.experts\."]},
    }
    exact = quantized.rewrite(plain, tmp_path / "model", make, said)
    source = open_checkpoint(tmp_path / "model", dtype=jnp.bfloat16)
    for tensor, value in layer_tensors(source, source.layer(0), 0):
        wanted = exact[tensor].bfloat16().float().numpy()
        np.testing.assert_array_equal(value.astype(np.float32), wanted, err_msg=tensor)

    said["ignore"] = [*names, "re:.*q_proj$"]
    quantized.rewrite(plain, tmp_path / "ignored", make, said)
    with pytest.raises(
        CheckpointError, match=r"q_proj holds .*float8.* stored as they are"
    ) as error:
        open_checkpoint(tmp_path / "ignored")
    assert len(error.value.problems) == 2  # and the weight is missing


def test_scales_of_activations_are_no_part_of_the_model(plain, tmp_path):
    make, group = quantized.compressed("float-quantized", **FLOAT8, strategy="tensor")

    def with_activations(module, shape):
        stored, exact = make(module, shape)
        return stored | {"input_scale": torch.ones(1), "k_scale": torch.ones(1)}, exact

    said = compressed_config("float-quantized", group)
    quantized.rewrite(plain, tmp_path / "model", with_activations, said)
    open_checkpoint(tmp_path / "model").layer(0)


UNREAD = {
    "gguf": ({"quant_method": "gguf"}, "gguf"),
    "awq-gemv": (quantized.awq(32)[1] | {"version": "gemv"}, "awq in the layout gemv"),
    "awq-symmetric": (quantized.awq(32)[1] | {"zero_point": False}, "awq without zero points"),
    "gptq-3": (quantized.gptq(4, 32)[1] | {"bits": 3}, "gptq in 3 bits"),
    "gptq-marlin": (quantized.gptq(4, 32)[1] | {"checkpoint_format": "marlin"}, "layout marlin"),
    "gptq-dynamic": (quantized.gptq(4, 32)[1] | {"dynamic": {"+:.*q": {"bits": 8}}}, "dynamic"),
    "llm-int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, not in 4"),
    "nvfp4": (compressed_config("nvfp4-pack-quantized", {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}}),
        "nvfp4-pack-quantized of 4 bits, float"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_another_format_is_refused_in_one_sentence_with_its_original(plain, tmp_path, name):
    said, message = UNREAD[name]
    quantized.rewrite(plain, tmp_path / "model", quantized.awq(32)[0], said)
    card = "---\nlicense: mit\nbase_model:\n- Qwen/Qwen3-30B-A3B\n---\n# A model\n"
    (tmp_path / "model" / "README.md").write_text(card)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        open_checkpoint(tmp_path / "model")
    (problem,) = error.value.problems
    assert problem.endswith("give the 16-bit model Qwen/Qwen3-30B-A3B")
    (tmp_path / "model" / "README.md").unlink()
    with pytest.raises(CheckpointError, match="give the 16-bit model that it was made from"):
        open_checkpoint(tmp_path / "model")


def change(folder, name, tensor):
    """Replace a tensor of a folder, or remove it with None."""
    path = folder / "model.safetensors"
    tensors = quantized.load_file(path) | {name: tensor}
    quantized.save_file({n: t for n, t in tensors.items() if t is not None}, path)


EXPERT = "model.layers.0.mlp.experts.1.up_proj."
BROKEN = [
    ("gptq", "qzeros", None, "no qzeros"),
    ("gptq", "scales", torch.ones(3, 64), r"scales float32 \[3, 64\].* does not fit gptq of 4"),
    ("gptq", "qweight", torch.ones(8).int(), r"weight \[0, 0\] has qweight int32 \[8\], qzeros"),
    ("awq", "qzeros", torch.ones(2, 9).int(), r"qzeros int32 \[2, 9\].* does not fit awq"),
    ("nf4", "weight.absmax", None, "no absmax"),
    ("nf4", "weight.quant_state.bitsandbytes__nf4", torch.tensor([1]).byte(), "not valid JSON"),
    ("nf4", "weight.quant_state.bitsandbytes__nf4", torch.tensor([123, 125]).byte(), "is no state"),
    ("int4", "weight_shape", torch.tensor([64, 10**6]), "does not fit 4 bits per group of 32"),
    ("int4", "weight_shape", torch.tensor([-1, 64]), "does not fit 4 bits per group of 32"),
    ("int4-zeros", "weight_zero_point", None, "does not fit .* with zero points"),
    ("fp8-rows", "weight_scale", torch.ones(7),
     r"has weight float8_e4m3fn \[64, 64\], weight_scale float32 \[7\], no weight_zero_point"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "part", "tensor", "message"), BROKEN)
def test_a_weight_whose_parts_do_not_fit_is_named(plain, tmp_path, name, part, tensor, message):
    make, said = FORMATS[name]()
    quantized.rewrite(plain, tmp_path / "model", make, said)
    change(tmp_path / "model", EXPERT + part, tensor)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(tmp_path / "model")
    assert EXPERT in str(error.value)


@pytest.mark.parametrize("name", ["int8", "fp8-rows"])
def test_scales_of_rows_may_be_stored_without_their_axis_of_one(plain, tmp_path, name):
    make, said = FORMATS[name]()
    exact = quantized.rewrite(plain, tmp_path / "model", make, said)
    for path in (tmp_path / "model").glob("*.safetensors"):
        stored = quantized.load_file(path)
        assert any(n.endswith("weight_scale") and t.shape[1:] == (1,) for n, t in stored.items())
        flat = {n: t[:, 0] if n.endswith("weight_scale") else t for n, t in stored.items()}
        quantized.save_file({n: t.contiguous() for n, t in flat.items()}, path)
    source = open_checkpoint(tmp_path / "model", dtype=jnp.bfloat16)
    for tensor, value in layer_tensors(source, source.layer(0), 0):
        wanted = exact[tensor].bfloat16().float().numpy()
        np.testing.assert_array_equal(value.astype(np.float32), wanted, err_msg=tensor)


def test_an_act_order_that_names_no_group_is_refused_by_name(plain, tmp_path):
    make, said = FORMATS["gptq-act-order"]()
    quantized.rewrite(plain, tmp_path / "model", make, said)
    change(tmp_path / "model", EXPERT + "g_idx", torch.full((64,), 2).int())
    with pytest.raises(CheckpointError, match=r"up_proj\.g_idx must lie in \[0, 2\)"):
        open_checkpoint(tmp_path / "model").layer(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ignore": ["re:("]}, "is no pattern"),
        ({"ignore": [3]}, "ignore holds 3, which is no name"),
        ({"config_groups": {"g": {"targets": "x"}}}, "quantises no weights"),
        ({"config_groups": [1]}, "must be an object"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "with a sparsity_config"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(plain, tmp_path, change, message):
    make, said = FORMATS["int4"]()
    quantized.rewrite(plain, tmp_path / "model", make, said | change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "model")


def test_without_a_quantization_config_packed_weights_are_not_guessed(plain, tmp_path):
    make, said = FORMATS["int4"]()
    quantized.rewrite(plain, tmp_path / "model", make, said)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"weight_packed has .*has no quantization_config"):
        open_checkpoint(tmp_path / "model")
