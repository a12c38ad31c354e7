"""What a `quantization_config` says, value by value, without any weights."""

import re

import pytest

from convert.families import FAMILIES
from convert.quantized.config import Scheme, UnreadFormat, read_quantization
from moe_jax.errors import InputError

FAMILY = FAMILIES["qwen3_moe"]


def read(**said):
    return read_quantization({"quantization_config": said}, FAMILY)


def scheme_of(form: str, **weights) -> Scheme | None:
    found = read(quant_method="compressed-tensors", format=form,
                 config_groups={"g": {"targets": ["Linear"], "weights": weights}})  # fmt: skip
    assert found is not None
    return found.scheme("model.layers.0.mlp.gate_proj")


INT4 = {"num_bits": 4, "type": "int"}
SCHEMES = [
    ("pack-quantized", INT4 | {"strategy": "group", "group_size": 64},
     Scheme(True, 4, False, True, "group", (1, 64))),
    ("pack-quantized", INT4 | {"group_size": 32, "symmetric": False},
     Scheme(True, 4, False, False, "group", (1, 32))),
    ("pack-quantized", INT4 | {"group_size": -1},
     Scheme(True, 4, False, True, "channel", (1, None))),
    ("pack-quantized", {}, Scheme(True, 8, False, True, "tensor", (None, None))),
    ("int-quantized", {"strategy": "channel"}, Scheme(False, 8, False, True, "channel", (1, None))),
    ("naive-quantized", {"type": "float", "strategy": "block", "block_structure": [2, 3]},
     Scheme(False, 8, True, True, "block", (2, 3))),
    ("float-quantized", {"type": "float", "strategy": "tensor", "actorder": "static"},
     Scheme(False, 8, True, True, "tensor", (None, None))),
]  # fmt: skip


@pytest.mark.parametrize(("form", "weights", "wanted"), SCHEMES)
def test_a_group_is_the_scheme_that_it_says(form, weights, wanted):
    assert scheme_of(form, **weights) == wanted


@pytest.mark.parametrize(
    ("form", "weights", "message"),
    [
        ("marlin-24", {"strategy": "channel"}, "marlin-24 of 8 bits, int, per channel"),
        (["pack-quantized"], {"strategy": "channel"}, "of 8 bits, int, per channel"),
        ("pack-quantized", {"strategy": "tensor_group"}, "int, per tensor_group"),
        ("pack-quantized", INT4 | {"num_bits": 2, "strategy": "channel"}, "of 2 bits"),
        ("pack-quantized", INT4 | {"num_bits": True, "strategy": "channel"}, "of True bits"),
        ("int-quantized", INT4 | {"strategy": "channel"}, "int-quantized of 4 bits"),
        ("pack-quantized", {"type": "float", "strategy": "tensor"}, "of 8 bits, float"),
        ("float-quantized", {"type": "float", "num_bits": 4, "strategy": "tensor"}, "of 4 bits"),
        ("pack-quantized", INT4 | {"strategy": "channel", "actorder": "group"}, "actorder=group"),
    ],
)  # fmt: skip
def test_a_scheme_that_nothing_reads_is_named(form, weights, message):
    with pytest.raises(UnreadFormat, match=re.escape(message)):
        scheme_of(form, **weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"group_size": -2}, "group_size=-2, which must be a positive"),
        ({"strategy": "group", "group_size": 0}, "group_size=0, which must be a positive"),
        ({"strategy": "group", "group_size": True}, "group_size=True, which must be a positive"),
        ({"strategy": "block", "block_structure": [0, 2]}, "block_structure=[0, 2], which must"),
        ({"strategy": "block", "block_structure": [2, -1]}, "block_structure=[2, -1], which must"),
        ({"strategy": "block"}, "block_structure=None, which must be"),
    ],
)
def test_a_size_out_of_range_is_refused(weights, message):
    with pytest.raises(InputError, match=re.escape(message)):
        scheme_of("pack-quantized", **INT4, **weights)


@pytest.mark.parametrize(
    ("method", "bits", "is_read"),
    [("awq", 4, True), ("awq", 8, False), ("awq", 2, False), ("awq", True, False),
     ("gptq", 4, True), ("gptq", 8, True), ("gptq", 3, False), ("gptq", "4", False)],
)  # fmt: skip
def test_integers_are_read_in_the_bits_that_the_method_packs(method, bits, is_read):
    if is_read:
        found = read(quant_method=method, bits=bits)
        assert found is not None and found.method == method
        return
    with pytest.raises(UnreadFormat, match=f"{method} in {bits} bits"):
        read(quant_method=method, bits=bits)


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize(("size", "is_read"), [(-1, True), (1, True), (0, False), (-2, False)])
def test_groups_of_integers_are_whole_rows_or_have_a_size(method, size, is_read):
    if is_read:
        assert read(quant_method=method, group_size=size) is not None
        return
    with pytest.raises(InputError, match=f"{method} with group_size={size}, which must be"):
        read(quant_method=method, group_size=size)


@pytest.mark.parametrize("size", [[0, 2], [2, 0], [2], "2", None])
def test_blocks_of_8_bit_floats_have_two_positive_sides(size):
    found = read(quant_method="fp8", weight_block_size=[2, 3])
    assert found is not None and found.scheme("any") == Scheme(
        False, 8, True, True, "block", (2, 3)
    )
    with pytest.raises(InputError, match="fp8 with weight_block_size="):
        read(quant_method="fp8", weight_block_size=size)
