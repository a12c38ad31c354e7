"""Lengths of axes and parts of layers, letter by letter, of configs whose numbers all differ."""

import dataclasses

import pytest

from convert.axes import axis_sizes, parts
from tests.convert.families.test_config_values import CASES, model


def config(family: str):
    return CASES[family][1]


COMMON = {"1": 1, "V": 101, "D": 60, "E": 12, "I": 56, "N": 6}
GROUPED = COMMON | {"A": 6 * 18, "B": 3 * 18, "O": 6 * 18, "G": 6 * 18 * 2, "H": 18}
# Keys and queries of 13 plain and 8 rotated coordinates, values of 17.
LATENT = COMMON | {"A": 6 * 21, "B": 6 * 21, "O": 6 * 17, "G": 6 * 21 * 2, "H": 21, "Q": 21,
                   "C": 22, "J": 22 + 8, "U": 6 * (13 + 17)}  # fmt: skip
# Keys and queries: 2 heads of 7, values and gates: 4 heads of 11.
LINEAR = GROUPED | {"W": 2 * 14 + 2 * 44, "X": 2 * 14 + 44, "T": 3, "Z": 44, "Y": 4, "M": 8,
                    "P": 11}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("qwen2_moe", GROUPED | {"S": 24}), ("qwen3_moe", GROUPED | {"S": 0}),
     ("deepseek_v3", LATENT | {"S": 60}), ("qwen3_next", LINEAR | {"S": 24})],
)  # fmt: skip
def test_every_letter_has_its_length(family, sizes):
    assert axis_sizes(config(family)) == sizes


def test_without_a_rank_queries_have_none():
    found = config("deepseek_v3")
    attention = dataclasses.replace(found.attention, query_rank=None)
    assert axis_sizes(found.replace(attention=attention)) == LATENT | {"S": 60, "Q": 0}


SOFTMAX = {"", "softmax_attention"}
RANK = {"", "query_rank", "query_rank_bias", "out_bias"}


@pytest.mark.parametrize(
    ("family", "layer", "found"),
    [
        ("qwen2_moe", 1, SOFTMAX | {"moe", "shared", "shared_gate"}),
        ("qwen2_moe", 3, SOFTMAX | {"dense"}),
        ("qwen3_moe", 2, SOFTMAX | {"moe", "qkv_bias", "out_bias", "qk_norm"}),
        ("mixtral", 0, SOFTMAX | {"moe"}),
        ("glm4_moe", 1, SOFTMAX | {"moe", "shared", "correction_bias", "qkv_bias", "qk_norm"}),
        ("glm4_moe", 0, SOFTMAX | {"dense", "qkv_bias", "qk_norm"}),
        ("gpt_oss", 4, SOFTMAX | {"moe", "logit_bias", "expert_bias", "sinks"}),
        ("deepseek_v3", 2, RANK | {"moe", "correction_bias", "shared"}),
        ("deepseek_v3", 1, RANK | {"dense"}),
        ("qwen3_next", 1, {"", "linear_attention", "moe", "shared", "shared_gate"}),
        ("qwen3_next", 2, SOFTMAX | {"dense", "qkv_bias", "out_bias", "qk_norm"}),
    ],
)  # fmt: skip
def test_a_layer_has_the_parts_of_its_architecture(family, layer, found):
    assert parts(config(family), layer) == found


def test_parts_that_no_family_has_together():
    latent = config("deepseek_v3")
    plain = dataclasses.replace(latent.attention, query_rank=None, bias=False)
    direct = latent.replace(attention=plain)
    assert parts(direct, 0) == {"", "dense", "direct_query"}
    biased = dataclasses.replace(latent.attention, query_rank=None)
    assert parts(latent.replace(attention=biased), 0) == {"", "dense", "direct_query", "out_bias"}
    own = {"num_experts": 4, "experts_per_token": 1, "d_expert": 3, "emptied_bias": True,
           "renormalize": True, "shared_gate": True}  # fmt: skip
    lone = model(config("mixtral").attention, own)
    assert parts(lone, 0) == SOFTMAX | {"moe", "emptied_bias"}
