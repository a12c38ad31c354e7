"""What only large DeepSeek checkpoints have: 8-bit blocks and a layer that predicts on."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import CheckpointError, layer_tensors, open_checkpoint, portable_config
from tests.support import tiny

BLOCK = (16, 24)  # divides no tensor: blocks at the edges are cut


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    model = tiny.tiny_model("deepseek_v3", q_lora_rank=20, num_hidden_layers=2)
    return tiny.save(model, tmp_path_factory.mktemp("v3") / "plain")


def rewrite(source, target, tensors: dict, **changes):
    """A folder with other tensors and changed keys of config.json."""
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def to_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(8-bit weight, scale per block, what the two stand for), block after block."""
    rows, columns = weight.shape
    codes = torch.empty_like(weight).to(torch.float8_e4m3fn)
    scale = torch.empty(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    exact = torch.empty_like(weight)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (
                slice(BLOCK[0] * i, BLOCK[0] * (i + 1)),
                slice(BLOCK[1] * j, BLOCK[1] * (j + 1)),
            )
            scale[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
            exact[part] = codes[part].float() * scale[i, j]
    return codes, scale, exact


def test_weights_in_8_bit_blocks_read_as_codes_times_scales(plain, tmp_path):
    tensors, exact = {}, {}
    for name, value in load_file(plain / "model.safetensors").items():
        tensors[name] = exact[name] = value
        if name.endswith("_proj.weight") or "kv_a_proj" in name:
            tensors[name], tensors[name + "_scale_inv"], exact[name] = to_blocks(value)
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    folder = rewrite(plain, tmp_path / "fp8", tensors, quantization_config=fp8)
    source = open_checkpoint(folder)
    for index in range(2):
        for name, value in layer_tensors(source, source.layer(index), index):
            np.testing.assert_array_equal(value, exact[name].numpy(), err_msg=name)
    assert "quantization_config" not in portable_config(source.about.hf_config)

    del tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    tensors["model.layers.0.self_attn.kv_b_proj.weight_scale_inv"] = torch.ones(1, 1)
    broken = rewrite(plain, tmp_path / "broken", tensors, quantization_config=fp8)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(broken)
    assert "o_proj.weight is 8-bit" in str(error.value)
    assert "kv_b_proj.weight_scale_inv is float32 [1, 1]" in str(error.value)


def test_a_layer_that_predicts_on_is_left_out_and_its_config_fixed(plain, tmp_path):
    tensors = load_file(plain / "model.safetensors")
    extra = {
        name.replace(".layers.1.", ".layers.2."): value.clone()
        for name, value in tensors.items()
        if ".layers.1." in name
    }
    extra |= {
        "model.layers.2.enorm.weight": torch.ones(32),
        "model.layers.2.eh_proj.weight": torch.ones(32, 64),
        "model.layers.2.shared_head.head.weight": torch.ones(96, 32),
    }
    folder = rewrite(plain, tmp_path / "mtp", tensors | extra, num_nextn_predict_layers=1)
    source = open_checkpoint(folder)
    assert set(source.about.mtp) == set(extra)
    assert len(source) == 2
    read = {name for i in range(2) for name, _ in layer_tensors(source, source.layer(i), i)}
    assert read == {name for name in tensors if ".layers." in name}
    assert portable_config(source.about.hf_config)["num_nextn_predict_layers"] == 0

    without = rewrite(plain, tmp_path / "none", tensors | extra, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"layers\.2\.enorm\.weight is not part of"):
        open_checkpoint(without)


def test_the_correction_bias_stays_float32_when_weights_are_cast(plain):
    layer = open_checkpoint(plain, dtype="bfloat16").layer(0)
    stored = load_file(plain / "model.safetensors")[
        "model.layers.0.mlp.gate.e_score_correction_bias"
    ]
    assert layer.mlp.router.dtype == "bfloat16"
    assert layer.mlp.router_bias.dtype == "float32"
    np.testing.assert_array_equal(layer.mlp.router_bias, stored.numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func='softmax' must be 'sigmoid'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 must be 1"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 must equal"),
        ({"n_group": 3}, "num_groups=3 must divide num_experts=8"),
        ({"n_group": 4, "topk_group": 5}, "groups_per_token=5 of 4 groups"),
        ({"n_group": 8, "topk_group": 4}, "leaves one expert per group"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size=None"),
    ],
)
def test_settings_that_would_compute_something_else_are_refused(plain, tmp_path, change, message):
    folder = rewrite(plain, tmp_path / "x", load_file(plain / "model.safetensors"), **change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)
