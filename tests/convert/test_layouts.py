"""Layouts in which one family is stored: fused, ragged, packed, cast; see test_families."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import find_family, layer_tensors, load_model, open_checkpoint
from tests.support import tiny

forward = jax.jit(lambda model, tokens, valid: model(tokens, valid))


def assert_same_logits(folder, model):
    tokens, valid = tiny.tokens_and_mask()
    ours = np.asarray(forward(load_model(folder), tokens, valid))
    theirs = tiny.torch_logits(model, tokens, valid)
    assert np.abs(theirs[valid]).max() > 0.5  # else the tolerance would say nothing
    # float32 sums of some hundred terms in another order
    np.testing.assert_allclose(ours[valid], theirs[valid], atol=5e-5, rtol=1e-5)


def test_the_number_of_experts_may_be_spelled_in_any_way_but_not_in_two():
    read = find_family("qwen3_moe").config_from_hf
    old = tiny.SIZES | {"num_experts": 8}
    new = {key: value for key, value in old.items() if key != "num_experts"}
    assert read(old) == read(new | {"num_local_experts": 8}) == read(old | {"num_local_experts": 8})
    with pytest.raises(ValueError, match=r"must agree but say \[8, 9\]"):
        read(old | {"num_local_experts": 9})
    with pytest.raises(ValueError, match="lacks num_experts"):
        read(new)


def test_fused_experts_read_like_separate_ones(tmp_path):
    model = tiny.tiny_model("qwen2_moe")
    separate = tiny.save(model, tmp_path / "separate")
    tensors = load_file(separate / "model.safetensors")
    fused = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        by_kind = {
            kind: np.stack([tensors[f"{prefix}{e}.{kind}_proj.weight"] for e in range(8)])
            for kind in ("gate", "up", "down")
        }
        fused[f"{prefix}gate_up_proj"] = np.concatenate([by_kind["gate"], by_kind["up"]], axis=1)
        fused[f"{prefix}down_proj"] = by_kind["down"]
    folder = tmp_path / "fused"
    folder.mkdir()
    save_file(fused, folder / "model.safetensors")
    (folder / "config.json").write_bytes((separate / "config.json").read_bytes())
    read = dict(layer_tensors(open_checkpoint(folder), open_checkpoint(folder).layer(1), 1))
    for name, value in read.items():
        np.testing.assert_array_equal(value, tensors[name])
    assert len(read) == sum(".layers.1." in name for name in tensors)


def test_weights_are_cast_on_request(tmp_path):
    folder = tiny.tiny_qwen3_moe(tmp_path / "model")
    model = load_model(folder, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"bfloat16", "int32"}


def test_ragged_experts_compute_what_their_zero_padded_twins_compute(tmp_path):
    widths = [[0, 3, 16, 9, 1, 16, 0, 7], [16, 5, 8, 0, 2, 11, 13, 4]]
    model = tiny.tiny_model("qwen2_moe")
    with tiny.torch.no_grad():
        for layer, counts in zip(model.model.layers, widths, strict=True):
            for expert, count in enumerate(counts):
                layer.mlp.experts.down_proj[expert, :, count:] = 0
    tensors = load_file(tiny.save(model, tmp_path / "padded") / "model.safetensors")
    ragged = {}
    for name, value in tensors.items():
        ragged[name] = value
        if ".experts." in name:
            count = widths[int(name.split(".")[2])][int(name.split(".")[5])]
            cut = value[:, :count] if "down_proj" in name else value[:count]
            ragged[name] = np.ascontiguousarray(cut)
    folder = tmp_path / "ragged"
    folder.mkdir()
    save_file({name: value for name, value in ragged.items() if value.size},
              folder / "model.safetensors")  # fmt: skip
    config = json.loads((tmp_path / "padded" / "config.json").read_text())
    config |= {"model_type": "ragged_qwen2_moe", "expert_intermediate_sizes": widths}
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_logits(folder, model)
    source = open_checkpoint(folder)
    for name, value in layer_tensors(source, source.layer(0), 0):
        np.testing.assert_array_equal(value, ragged[name])


def test_packed_four_bit_weights_read_as_codes_times_scales(tmp_path):
    plain = tiny.tiny_qwen3_moe(tmp_path / "plain")
    tensors = load_file(plain / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, tensors[name].shape)  # [32, 16]
    scale = rng.uniform(0.01, 0.1, (32, 2)).astype(np.float32)
    words = [[sum((int(q) + 8) << (4 * i) for i, q in enumerate(row[c : c + 8])) for c in (0, 8)]
             for row in codes]  # fmt: skip
    del tensors[name]
    tensors[name + "_packed"] = np.array(words, np.uint32).view(np.int32)
    tensors[name + "_scale"] = scale
    tensors[name + "_shape"] = np.array([32, 16])
    save_file(tensors, plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 8}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (plain / "config.json").write_text(json.dumps(config))
    source = open_checkpoint(plain)
    read = dict(layer_tensors(source, source.layer(1), 1))[name]
    expected = np.stack([codes[:, c] * scale[:, c // 8] for c in range(16)], axis=1)
    np.testing.assert_array_equal(read, expected.astype(np.float32))
