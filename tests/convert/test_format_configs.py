"""What each layout of an export writes and reads, from values alone; folders are in test_families.

4-bit floats are unpacked here by the format's own words: sign, two bits of exponent, one of
mantissa, times a power of two.
"""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from convert import find_family
from convert.formats import compressed_tensors, mxfp4, padded, ragged
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.errors import InputError

CONFIG = ModelConfig(
    vocab_size=96, d_model=64, num_layers=3, max_position=64, norm_eps=1e-6, tie_embeddings=False,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
    moe=MoEConfig(num_experts=2, experts_per_token=1, d_expert=96, renormalize=False, d_shared=192),
    d_dense=80, dense_layers=(1,),
)  # fmt: skip
COUNTS = [[5, 7], [], [0, 96]]


# --- integers ---


@pytest.mark.parametrize("columns", [8, 24, 12, 1, 80])
def test_three_tensors_stand_for_a_weight_and_what_is_left_of_a_word_is_zero(columns):
    codes = np.random.default_rng(0).integers(-8, 8, (3, columns)).astype(np.int8)
    found = compressed_tensors.pack_codes(codes, np.ones((3, 1)), 4)
    specs = compressed_tensors.packed_specs(3, columns, columns, 4)
    assert {n: (v.dtype, v.shape) for n, v in found.items()} == specs
    words = found["weight_packed"].view(np.uint32)
    for row, numbers in zip(codes.tolist(), words.tolist(), strict=True):
        every = [(number >> 4 * i & 15) - 8 for number in numbers for i in range(8)]
        assert every == row + [0] * (-columns % 8)
    assert compressed_tensors.packed_specs(3, 64, 16, 4)["weight_scale"][1] == (3, 4)


def test_the_settings_of_integers_are_those_of_the_format():
    found = compressed_tensors.quantization_config(["model.norm", "lm_head"], 64, {4: "Linear"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
               "group_size": 64, "dynamic": False, "actorder": None}  # fmt: skip
    assert found == {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "kv_cache_scheme": None,
        "ignore": ["lm_head", "model.norm", "norm"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights,
                                      "input_activations": None, "output_activations": None}},
    }  # fmt: skip


def test_a_group_that_fits_no_width_has_no_cure_but_16_bits():
    compressed_tensors.check_group_size(32, [32, 96, 64])
    with pytest.raises(InputError, match=r"group_size=32 does not divide width 33; export 16 bits"):
        compressed_tensors.check_group_size(32, [64, 33, 40])
    with pytest.raises(InputError, match=r"group_size=128 does not divide width 64; use.* 64$"):
        compressed_tensors.check_group_size(128, [256, 192, 64])


# --- floats ---


def test_four_bit_floats_are_what_their_bits_say():
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    for exponent in (1, 100, 127, 128, 200):
        found = mxfp4.unpack(blocks, np.full((1, 16), exponent, np.uint8))
        assert found.dtype == ml_dtypes.bfloat16 and found.shape == (1, 512)
        wanted = []
        for byte in range(256):
            for nibble in (byte & 15, byte >> 4):
                sign, power, half = (-1) ** (nibble >> 3), nibble >> 1 & 3, (nibble & 1) / 2
                size = half if power == 0 else (1 + half) * 2 ** (power - 1)
                wanted.append(sign * size * 2.0 ** (exponent - 127))
        np.testing.assert_array_equal(found[0].astype(np.float64), wanted)
    scales = np.arange(8, dtype=np.uint8).reshape(2, 4) + 120
    several = mxfp4.unpack(np.full((2, 4, 16), 0x22, np.uint8), scales)  # every value is one
    np.testing.assert_array_equal(
        several.astype(np.float64), np.repeat(2.0 ** (scales.astype(int) - 127), 32, axis=1)
    )
    assert not np.isfinite(mxfp4.unpack(blocks, np.full((1, 16), 255, np.uint8))).all()


def test_what_was_made_of_codes_packs_into_them():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 2, 16)).astype(np.uint8)
    blocks[:, :, 0] = 0x67  # six and four: the largest of its block, so that the scale is known
    blocks[blocks & 15 == 8] ^= 8  # one zero only
    blocks[blocks >> 4 == 8] ^= 0x80
    scales = rng.integers(110, 140, (3, 2)).astype(np.uint8)
    found = mxfp4.pack(mxfp4.unpack(blocks, scales).astype(np.float32))
    np.testing.assert_array_equal(found["weight_blocks"], blocks)
    np.testing.assert_array_equal(found["weight_scales"], scales)
    specs = mxfp4.packed_specs(3, 64)
    assert {n: (v.dtype, v.shape) for n, v in found.items()} == specs


def test_blocks_must_be_whole():
    mxfp4.check_widths([64, 0, 96], 128)
    with pytest.raises(InputError, match="do not divide the expert width 40; plan with --block 32"):
        mxfp4.check_widths([96, 48, 40], 128)
    with pytest.raises(InputError, match="do not divide the model width 72; export padded-bf16"):
        mxfp4.check_widths([96], 72)
    assert mxfp4.quantization_config() == {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                   "model.embed_tokens", "lm_head"],
    }  # fmt: skip


# --- layouts ---


@pytest.mark.parametrize(
    ("family", "width", "shared", "count"),
    [("deepseek_v2", 96, 192, 2), ("deepseek_v2", 64, 192, 3), ("deepseek_v2", 80, 240, 3),
     ("qwen2_moe", 80, 192, None)],
)  # fmt: skip
def test_a_padded_folder_has_one_width_and_whole_shared_experts(family, width, shared, count):
    family = find_family(family)
    found = padded.padded_model(CONFIG, family, width)
    moe = dataclasses.replace(CONFIG.moe, d_expert=width, d_shared=shared)
    assert found == CONFIG.replace(moe=moe)
    said = {"model_type": "x", "architectures": ["X"], "moe_intermediate_size": 96, "other": 1}
    before = dict(said)
    wanted = {"model_type": family.model_type, "architectures": [f"{family.stem}ForCausalLM"],
              "moe_intermediate_size": width, "other": 1}  # fmt: skip
    wanted |= {} if count is None else {"n_shared_experts": count}
    assert padded.padded_config(said, CONFIG, family, width) == wanted and said == before


STOCK = {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "other": [1],
         "moe_intermediate_size": 96}  # fmt: skip


def with_code(**changes):
    names = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    code = {auto: f"modeling_ragged_moe.RaggedQwen2Moe{end}" for auto, end in names.items()}
    return {**STOCK, "model_type": "ragged_qwen2_moe",
            "architectures": ["RaggedQwen2MoeForCausalLM"], "auto_map": code} | changes  # fmt: skip


def test_folders_of_several_widths_say_so_and_can_be_told_what_they_were():
    family = find_family("qwen2_moe")
    found = ragged.ragged_config(STOCK, family, COUNTS, "zero", None)
    assert found == with_code(expert_intermediate_sizes=COUNTS)
    assert ragged.stock_config(found, family) == STOCK | {
        "model_type": "ragged_qwen2_moe", "architectures": ["RaggedQwen2MoeForCausalLM"],
    }  # fmt: skip
    assert ragged.widths_from_hf(found, CONFIG) == ((5, 7), (), (0, 96))
    assert ragged.emptied_experts(found) == "zero"
    more = ragged.ragged_config(STOCK, family, COUNTS, "constant", 32)
    assert more == found | {"emptied_experts": "constant", "mtp_expert_intermediate_size": 32}
    assert ragged.emptied_experts(more) == "constant"
    cut = ragged.ragged_config(STOCK, family, COUNTS, "cut", None)
    assert cut == found | {"emptied_experts": "cut"} and ragged.emptied_experts(cut) == "cut"
    assert ragged.stock_config(more, family) == ragged.stock_config(found, family)
    layered = ragged.layered_config(STOCK, family, [32, 0, 64], None)
    assert layered == with_code(unpruned_intermediate_size=96, moe_intermediate_size=[32, 0, 64])
    assert ragged.stock_config(layered, family) == ragged.stock_config(found, family)
    assert ragged.widths_from_hf(layered, CONFIG) == ((32, 32), (), (64, 64))
    assert ragged.stock_config(STOCK, family) == STOCK


@pytest.mark.parametrize("bias", [False, True])
def test_constants_are_a_bias_where_experts_have_none(bias):
    config = CONFIG.replace(moe=dataclasses.replace(CONFIG.moe, expert_bias=bias))
    for emptied in ("zero", "constant", "cut"):
        found = ragged.emptied_model(config, emptied)
        assert found.moe.emptied_bias == (emptied == "constant" and not bias)
        assert found.moe.emptied_cut == (emptied == "cut")
        assert found.replace(moe=config.moe) == config


@pytest.mark.parametrize("said", [1, "some", ["zero"], None])
def test_what_becomes_of_emptied_experts_is_one_of_three(said):
    assert ragged.emptied_experts({}) == "zero"
    with pytest.raises(InputError, match="must be one of 'zero', 'constant', 'cut'"):
        ragged.emptied_experts({"emptied_experts": said})


PER_EXPERT = "one list per layer with one width per expert"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, PER_EXPERT),
        ({"expert_intermediate_sizes": [1, 2, 3]}, PER_EXPERT),
        ({"expert_intermediate_sizes": [[5, 7], []]}, PER_EXPERT),
        ({"expert_intermediate_sizes": [[5, 7], [1, 1], [5, 7]]}, PER_EXPERT),
        ({"expert_intermediate_sizes": [[5], [], [5, 7]]}, PER_EXPERT),
        ({"expert_intermediate_sizes": [[5, 7], [], [-1, 7]]}, r"holds \[-1\]; widths must be"),
        ({"expert_intermediate_sizes": [[5, 7.0], [], [True, 7]]}, r"holds \[7.0, True\]"),
        ({"unpruned_intermediate_size": 96}, "must be a list of one width per layer"),
        ({"unpruned_intermediate_size": 96, "moe_intermediate_size": [32, 0]}, "has 3 layers"),
        ({"unpruned_intermediate_size": 96, "moe_intermediate_size": [0, 0, 32]},
         r"\[0\]=0 must be at least 1"),
        ({"unpruned_intermediate_size": 96, "moe_intermediate_size": [32, 32, 32]},
         r"\[1\]=32 must be 0, since the layer has no experts"),
        ({"unpruned_intermediate_size": 96, "moe_intermediate_size": [32, 0, -1]},
         r"\[2\]=-1 must be at least 1"),
        ({"unpruned_intermediate_size": 96, "moe_intermediate_size": [32, 0, 1.0]},
         r"\[2\]=1.0 must be at least 1"),
    ],
)  # fmt: skip
def test_widths_that_do_not_fit_the_architecture_are_refused(said, message):
    with pytest.raises(InputError, match=message):
        ragged.widths_from_hf(said, CONFIG)


def test_one_channel_is_a_width():
    one = {"unpruned_intermediate_size": 96, "moe_intermediate_size": [1, 0, 1]}
    assert ragged.widths_from_hf(one, CONFIG) == ((1, 1), (), (1, 1))
    none = {"expert_intermediate_sizes": [[0, 1], [], [0, 0]]}
    assert ragged.widths_from_hf(none, CONFIG) == ((0, 1), (), (0, 0))


def test_five_wrong_widths_are_shown():
    many = CONFIG.replace(moe=dataclasses.replace(CONFIG.moe, num_experts=4), dense_layers=())
    with pytest.raises(InputError, match=r"holds \[-1, -2, -3, -4, -5\]; widths must be natural"):
        wrong = [[-1, -2, -3, 7], [-4, -5, -6, 7], [1, 2, 3, 4]]
        ragged.widths_from_hf({"expert_intermediate_sizes": wrong}, many)
