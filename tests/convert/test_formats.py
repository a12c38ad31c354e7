"""The layout of integers; whole exports are compared in test_families."""

import dataclasses

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from convert import find_family
from convert.formats import compressed_tensors
from pruning.recipe.recipe import CompressionRecipe


@settings(deadline=None)
@given(hnp.arrays(np.int8, (4, 64), elements=st.integers(-8, 7)), st.sampled_from([32, 64]))
def test_packed_words_hold_eight_codes_lowest_nibble_first(codes, group_size):
    scale = np.full((4, 64 // group_size), 0.5)
    packed = compressed_tensors.pack_codes(codes, scale, 4)
    words = packed["weight_packed"].view(np.uint32)
    found = [
        [(int(words[i, j // 8]) >> (4 * (j % 8)) & 15) - 8 for j in range(64)] for i in range(4)
    ]
    np.testing.assert_array_equal(found, codes)
    assert packed["weight_scale"].dtype == compressed_tensors.SCALE
    np.testing.assert_array_equal(packed["weight_scale"].astype(np.float64), scale)
    np.testing.assert_array_equal(packed["weight_shape"], [4, 64])


@settings(deadline=None)
@given(hnp.arrays(np.int8, (3, 32), elements=st.integers(-128, 127)))
def test_codes_of_eight_bits_are_those_that_compressed_tensors_unpacks(codes):
    packed = compressed_tensors.pack_codes(codes, np.ones((3, 1)), 8)
    specs = compressed_tensors.packed_specs(3, 32, 32, 8)
    assert {name: (one.dtype, one.shape) for name, one in packed.items()} == specs
    words = torch.from_numpy(packed["weight_packed"].copy())
    found = unpack_from_int32(words, 8, torch.Size([3, 32]))
    np.testing.assert_array_equal(found.numpy(), codes)


def test_a_width_that_no_group_fits_is_refused():
    with pytest.raises(ValueError, match=r"group_size=64 does not divide width 96; use.* 32"):
        compressed_tensors.check_group_size(64, [128, 96])


def test_the_default_group_divides_the_input_of_every_linear_layer_that_is_packed():
    """DeepSeek-V2-Lite: experts of 1408 channels, a dense layer of 10944 = 64 * 171."""
    recipe = CompressionRecipe(model="folder", output="out")
    assert recipe.resolved(1408, 2048, 4096).group_size == 128
    assert recipe.resolved(1408, 2048, 4096, [512, 10944]).group_size == 64
    with pytest.raises(ValueError, match=r"group_size=128 does not divide.* 10944;.*-size 64"):
        dataclasses.replace(recipe, group_size=128).resolved(1408, 2048, 4096, [512, 10944])


def test_routers_norms_embeddings_and_head_stay_16_bit():
    layer = "model.layers.0."
    quantised = ("self_attn.q_proj.weight", "mlp.experts.7.down_proj.weight",
                 "mlp.shared_expert.up_proj.weight", "mlp.gate_proj.weight")  # fmt: skip
    kept = ("mlp.gate.weight", "mlp.shared_expert_gate.weight", "self_attn.q_proj.bias",
            "self_attn.q_norm.weight", "input_layernorm.weight")  # fmt: skip
    family = find_family("qwen2_moe")

    def is_linear(name: str) -> bool:
        rule = family.rule(name)
        return rule is not None and rule.is_linear

    assert all(is_linear(layer + name) for name in quantised)
    assert not any(is_linear(layer + name) for name in (*kept, "mlp.experts.x.up_proj.weight"))
    assert not is_linear("lm_head.weight")
