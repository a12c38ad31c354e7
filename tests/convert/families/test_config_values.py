"""What each family reads of a config.json, value by value, written down by hand.

Whether the meaning is right, logits say (`test_families`); here every number is another one, so
that none can stand in for its neighbour.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import FAMILIES, find_family
from moe_jax.config import (
    Activation,
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from moe_jax.errors import InputError
from moe_jax.quant import quantize
from moe_jax.transformer import abstract

SAID = {
    "vocab_size": 101, "hidden_size": 60, "num_hidden_layers": 5, "max_position_embeddings": 77,
    "rms_norm_eps": 3e-5, "tie_word_embeddings": True, "intermediate_size": 56,
    "num_attention_heads": 6, "num_experts_per_tok": 4, "rope_theta": 5000.0,
}  # fmt: skip
READ = {
    "vocab_size": 101, "d_model": 60, "num_layers": 5, "max_position": 77, "norm_eps": 3e-5,
    "tie_embeddings": True, "d_dense": 56,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16, "mscale": 0.7,
        "mscale_all_dim": 1.3, "beta_fast": 16, "beta_slow": 2, "truncate": False,
        "attention_factor": 1.1}  # fmt: skip
YARN_READ = {"kind": "yarn", "factor": 3.0, "original_max_position": 16, "mscale": 0.7,
             "mscale_all_dim": 1.3, "beta_fast": 16, "beta_slow": 2, "truncate": False,
             "attention_factor": 1.1}  # fmt: skip
GROUPED = {"num_key_value_heads": 3, "head_dim": 18}
HEADS = {"num_heads": 6, "num_kv_heads": 3, "head_dim": 18}
LATENT = {"q_lora_rank": 21, "kv_lora_rank": 22, "qk_nope_head_dim": 13, "qk_rope_head_dim": 8,
          "v_head_dim": 17, "attention_bias": True, "rope_interleave": False}  # fmt: skip
SHARED = {"n_routed_experts": 12, "n_shared_experts": 3, "moe_intermediate_size": 20}
LATENT_READ = LatentAttentionConfig(
    num_heads=6, query_rank=21, kv_rank=22, plain_dim=13, rope_dim=8, value_dim=17, bias=True,
    interleaved=False, rope=RopeConfig(theta=5000.0),
)  # fmt: skip
SIGMOID = {
    "num_experts": 12, "experts_per_token": 4, "d_expert": 20, "renormalize": False, "d_shared": 60,
    "score": "sigmoid", "correction_bias": True, "num_groups": 3, "groups_per_token": 2,
    "group_score": "top2", "routed_scale": 1.7, "float32_router": True,
}  # fmt: skip
GROUPS = {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.7, "norm_topk_prob": False}
MOE = {"num_experts": 12, "experts_per_token": 4, "d_expert": 20}
ROPE = RopeConfig(theta=5000.0)


def attention(**changes) -> AttentionConfig:
    return AttentionConfig(**{**HEADS, "rope": ROPE, "norm_eps": 3e-5, **changes})


def model(attention, moe: dict, **changes) -> ModelConfig:
    return ModelConfig(**{**READ, "attention": attention, "moe": MoEConfig(**moe), **changes})


CASES = {
    "qwen2_moe": (
        GROUPED | {
            "num_experts": 12, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True, "qkv_bias": False, "use_sliding_window": True,
            "sliding_window": 9, "max_window_layers": 4, "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
        model(
            attention(), MOE | {"renormalize": True, "d_shared": 24, "shared_gate": True},
            dense_layers=(0, 2, 3, 4), sliding_window=9, sliding_layers=(0, 2),
        ),
    ),
    "qwen3_moe": (
        GROUPED | {
            "num_experts": 12, "moe_intermediate_size": 20, "norm_topk_prob": True,
            "attention_bias": True, "use_sliding_window": True, "sliding_window": 9,
            "decoder_sparse_step": 3, "rope_scaling": YARN,
        },
        model(
            attention(qk_norm=True, qkv_bias=True, out_bias=True,
                      rope=RopeConfig(theta=5000.0, **YARN_READ)),
            MOE | {"renormalize": True}, dense_layers=(0, 1, 3, 4), sliding_window=9,
            sliding_layers=(0, 1, 2, 3, 4),
        ),
    ),
    "mixtral": (
        GROUPED | {"num_local_experts": 12, "sliding_window": 9},
        model(attention(norm_eps=1e-6), MOE | {"d_expert": 56, "renormalize": True},
              sliding_window=9, sliding_layers=(0, 1, 2, 3, 4)),
    ),
    "olmoe": (
        {"num_key_value_heads": 2, "num_experts": 12, "attention_bias": True, "clip_qkv": 0.4,
         "norm_topk_prob": True},
        model(attention(num_kv_heads=2, head_dim=10, qk_norm=True, joint_qk_norm=True, clip_qkv=0.4,
                        qkv_bias=True, out_bias=True),
              MOE | {"d_expert": 56, "renormalize": True}),
    ),
    "deepseek_v2": (
        LATENT | SHARED | {"topk_method": "group_limited_greedy", "first_k_dense_replace": 2,
                           "n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.7},
        model(LATENT_READ,
              MOE | {"renormalize": False, "d_shared": 60, "num_groups": 3, "groups_per_token": 2,
                     "routed_scale": 1.7, "float32_router": True}, dense_layers=(0, 1)),
    ),
    "deepseek_v3": (
        LATENT | SHARED | GROUPS | {"first_k_dense_replace": 2},
        model(LATENT_READ, SIGMOID, dense_layers=(0, 1)),
    ),
    "glm4_moe": (
        GROUPED | SHARED | GROUPS | {
            "attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.25,
        },
        model(attention(qk_norm=True, qkv_bias=True, rope=RopeConfig(theta=5000.0, fraction=0.25)),
              SIGMOID, dense_layers=(0,)),
    ),
    "glm4_moe_lite": (
        LATENT | SHARED | GROUPS | {
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse"],
        },
        model(LATENT_READ, SIGMOID, dense_layers=(0, 2)),
    ),
    "dots1": (
        GROUPED | SHARED | GROUPS | {
            "attention_bias": True, "sliding_window": 9, "max_window_layers": 3,
            "first_k_dense_replace": 1,
        },
        model(attention(qk_norm=True, qkv_bias=True, out_bias=True), SIGMOID, dense_layers=(0,),
              sliding_window=9, sliding_layers=(3, 4)),
    ),
    "gpt_oss": (
        GROUPED | {
            "num_local_experts": 12, "attention_bias": False, "sliding_window": 9,
            "swiglu_alpha": 1.3, "swiglu_limit": 0.6, "rope_scaling": YARN,
        },
        model(attention(sinks=True, rope=RopeConfig(theta=5000.0, **YARN_READ)),
              MOE | {"d_expert": 56, "renormalize": True, "logit_bias": True, "expert_bias": True,
                     "activation": Activation(slope=1.3, shift=1.0, limit=0.6)},
              sliding_window=9, sliding_layers=(0, 2, 4)),
    ),
    "qwen3_next": (
        GROUPED | {
            "num_experts": 12, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24,
            "attention_bias": True, "norm_topk_prob": False, "decoder_sparse_step": 2,
            "partial_rotary_factor": 0.5, "full_attention_interval": 3, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 7, "linear_value_head_dim": 11,
            "linear_conv_kernel_dim": 3,
        },
        model(
            attention(qk_norm=True, qkv_bias=True, out_bias=True, output_gate=True,
                      rope=RopeConfig(theta=5000.0, fraction=0.5)),
            MOE | {"renormalize": False, "d_shared": 24, "shared_gate": True},
            dense_layers=(0, 2, 4), linear_layers=(0, 1, 3, 4), centred_norms=True,
            linear_attention=LinearAttentionConfig(
                num_key_heads=2, num_value_heads=4, key_dim=7, value_dim=11, conv_width=3,
                norm_eps=3e-5,
            ),
        ),
    ),
    "deepseek": (
        SHARED | {"num_key_value_heads": 2, "norm_topk_prob": True, "first_k_dense_replace": 2,
                  "moe_layer_freq": 3},
        model(attention(num_kv_heads=2, head_dim=10, norm_eps=1e-6),
              MOE | {"renormalize": True, "d_shared": 60}, dense_layers=(0, 1, 2, 4)),
    ),
}  # fmt: skip


def read(family: str, **changes) -> ModelConfig:
    said = {**SAID, **CASES[family][0], **changes}
    return find_family(family).config_from_hf({k: v for k, v in said.items() if v is not ...})


def test_every_family_with_a_reader_of_its_own_is_here():
    readers = {family.read_config for name, family in FAMILIES.items() if not family.ragged}
    assert {find_family(name).read_config for name in CASES} <= readers
    own = {n for n, family in FAMILIES.items() if not (family.ragged or family.wrapper)}
    assert own - {"kimi_k2"} == CASES.keys()


@pytest.mark.parametrize("family", CASES)
def test_every_value_is_read_and_goes_where_it_belongs(family):
    assert read(family) == CASES[family][1]


def of(family: str, part: str = "", **changes) -> ModelConfig:
    wanted = CASES[family][1]
    if not part:
        return wanted.replace(**changes)
    return wanted.replace(**{part: dataclasses.replace(getattr(wanted, part), **changes)})


WITHOUT_WINDOW = {"sliding_window": None, "sliding_layers": ()}


@pytest.mark.parametrize(
    ("family", "said", "wanted"),
    [
        ("qwen2_moe", {"head_dim": ..., "num_key_value_heads": None},
         of("qwen2_moe", "attention", head_dim=10, num_kv_heads=6)),
        ("qwen2_moe", {"use_sliding_window": False}, of("qwen2_moe", **WITHOUT_WINDOW)),
        ("qwen2_moe", {"layer_types": ["full_attention"] * 4 + ["sliding_attention"]},
         of("qwen2_moe", sliding_layers=(4,))),
        ("qwen2_moe", {"decoder_sparse_step": 1, "mlp_only_layers": []},
         of("qwen2_moe", dense_layers=())),
        ("qwen3_moe", {"head_dim": ...}, of("qwen3_moe", "attention", head_dim=10)),
        ("qwen3_moe", {"use_sliding_window": False}, of("qwen3_moe", **WITHOUT_WINDOW)),
        ("qwen3_moe", {"sliding_window": None}, of("qwen3_moe", **WITHOUT_WINDOW)),
        ("mixtral", {"head_dim": ...}, of("mixtral", "attention", head_dim=10)),
        ("mixtral", {"sliding_window": ...}, of("mixtral", **WITHOUT_WINDOW)),
        ("deepseek_v2", {"topk_method": "greedy"},
         of("deepseek_v2", "moe", num_groups=1, groups_per_token=1)),
        ("deepseek_v2", {"first_k_dense_replace": 9},
         of("deepseek_v2", dense_layers=(0, 1, 2, 3, 4))),
        ("deepseek_v2", {"q_lora_rank": None}, of("deepseek_v2", "attention", query_rank=None)),
        ("deepseek_v3", {"n_group": None, "topk_group": None},
         of("deepseek_v3", "moe", num_groups=1, groups_per_token=1)),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1},
         of("deepseek_v3", "moe", num_groups=1, groups_per_token=1)),
        ("glm4_moe", {"head_dim": ...}, of("glm4_moe", "attention", head_dim=10)),
        ("glm4_moe_lite", {"mlp_layer_types": ...}, of("glm4_moe_lite", dense_layers=(0,))),
        ("dots1", {"head_dim": ...}, of("dots1", "attention", head_dim=10)),
        ("dots1", {"sliding_window": None}, of("dots1", **WITHOUT_WINDOW)),
        ("dots1", {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 3},
         of("dots1", sliding_layers=(0, 1))),
        ("gpt_oss", {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 3},
         of("gpt_oss", sliding_layers=(0, 1))),
        ("qwen3_next", {"layer_types": ["linear_attention"] * 2 + ["full_attention"] * 3},
         of("qwen3_next", linear_layers=(0, 1))),
        ("qwen3_next", {"layer_types": ["full_attention"] * 5},
         of("qwen3_next", linear_layers=(), linear_attention=None)),
        ("qwen3_next", {"mlp_only_layers": [1, 3]}, of("qwen3_next", dense_layers=(0, 1, 2, 3, 4))),
        ("deepseek", {"first_k_dense_replace": 0, "moe_layer_freq": 1},
         of("deepseek", dense_layers=())),
        ("deepseek", {"moe_layer_freq": None}, of("deepseek", dense_layers=(0, 1))),
        ("deepseek", {"first_k_dense_replace": 0, "moe_layer_freq": ...},
         of("deepseek", dense_layers=())),
    ],
)  # fmt: skip
def test_what_one_value_changes(family, said, wanted):
    assert read(family, **said) == wanted


@pytest.mark.parametrize(
    ("family", "said", "message"),
    [
        ("deepseek_v2", {"num_key_value_heads": 3}, "num_key_value_heads=3 must equal"),
        ("deepseek_v2", {"num_key_value_heads": 12}, "num_key_value_heads=12 must equal"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True must be False"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' must be 'softmax'"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq=2 must be 1"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "must be 'greedy' or 'group_limited_greedy'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' must be 'sigmoid'"),
        ("deepseek", {"attention_bias": True}, "attention_bias=True must be False"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "for each of the 5 layers"),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse"] * 6}, "for each of the 5 layers"),
        ("glm4_moe_lite", {"first_k_dense_replace": 2}, "but the latter have dense layers"),
        ("qwen3_next", {"layer_types": ["sliding_attention"] * 5}, "must name 'linear_attention'"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
        ("qwen3_moe", {"num_local_experts": 13}, "must agree but say"),
        ("qwen3_moe", {"num_experts": ...}, "config.json lacks num_experts"),
        ("qwen3_moe", {"rope_scaling": {"rope_type": "su"}}, "rope_type='su' must be one of"),
        ("gpt_oss", {"rope_scaling": ...}, "lacks rope_parameters"),
    ],
)
def test_what_is_not_computed_is_refused(family, said, message):
    with pytest.raises(InputError, match=message):
        read(family, **said)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"kind": "linear", "factor": 2.0}),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
          "rope_theta": ...}, {"kind": "linear", "factor": 2.0, "theta": 7.0}),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 8.0}},
         {"kind": "dynamic", "factor": 2.0, "theta": 8.0}),
        # Without a factor it is the ratio of the contexts, where the original one is known.
        ({"rope_scaling": {"rope_type": "yarn"}, "original_max_position_embeddings": 11},
         {"kind": "yarn", "original_max_position": 11, "factor": 7.0}),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 3.0,
                           "original_max_position_embeddings": 7},
          "original_max_position_embeddings": 11},
         {"kind": "yarn", "original_max_position": 11, "factor": 3.0}),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0},
          "original_max_position_embeddings": 11}, {"kind": "linear", "factor": 2.0}),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0,
                           "high_freq_factor": 5.0, "original_max_position_embeddings": 9}},
         {"kind": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 5.0,
          "original_max_position": 9}),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 9,
                           "long_factor": [2.0] * 9, "original_max_position_embeddings": 7}},
         {"kind": "longrope", "short_factor": (1.0,) * 9, "long_factor": (2.0,) * 9, "factor": 11.0,
          "original_max_position": 7}),
        ({"partial_rotary_factor": 0.5}, {}),  # the plain rope turns whole heads in most families
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
         {"kind": "linear", "factor": 2.0, "fraction": 0.5}),
        ({"rope_scaling": None, "rope_theta": ...}, {"theta": 10000.0}),
    ],
)  # fmt: skip
def test_rope_in_every_spelling(said, wanted):
    found = read("qwen3_moe", **{"rope_scaling": ..., **said}).attention.rope
    assert found == RopeConfig(**{"theta": 5000.0, **wanted})


def test_families_have_a_rope_of_their_own_where_config_json_says_nothing():
    ropes = {"mixtral": {"theta": 1e6}, "glm4_moe": {"fraction": 0.5},
             "qwen3_next": {"fraction": 0.25}}  # fmt: skip
    for family, wanted in ropes.items():
        found = read(family, rope_theta=..., partial_rotary_factor=...).attention.rope
        assert found == RopeConfig(**{"theta": 10000.0, **wanted})
    assert read("gpt_oss", rope_theta=...).attention.rope.theta == 150000.0


WRAPPED = {
    "qwen3_vl_moe": (
        GROUPED | {"num_experts": 12, "moe_intermediate_size": 20, "norm_topk_prob": False,
                   "use_sliding_window": True, "sliding_window": 9, "attention_bias": True},
        model(attention(qk_norm=True, qkv_bias=True, out_bias=True), MOE | {"renormalize": True}),
    ),
    "glm4v_moe": (
        GROUPED | SHARED | GROUPS | {"use_qk_norm": True, "partial_rotary_factor": 0.25},
        model(attention(qkv_bias=True, rope=RopeConfig(theta=5000.0, fraction=0.25)), SIGMOID,
              dense_layers=(0,)),
    ),
    "kimi_k25": CASES["deepseek_v3"],
}  # fmt: skip


@pytest.mark.parametrize("family", WRAPPED)
def test_every_value_of_the_text_model_of_a_wrapper_is_read(family):
    said, wanted = WRAPPED[family]
    own = find_family(family)
    text = {**SAID, **said, "tie_word_embeddings": True}
    # Whether the head is tied is said of the whole, or is the wrapper's default.
    for outer, tied in (({"tie_word_embeddings": True}, True),
                        ({"tie_word_embeddings": False}, False),
                        ({}, family == "kimi_k25")):  # fmt: skip
        found = own.config_from_hf({"text_config": dict(text), **outer})
        assert found == wanted.replace(tie_embeddings=tied)
    assert own.config_from_hf(text) == wanted  # a text model by itself
    del text["tie_word_embeddings"]
    assert own.config_from_hf(text) == wanted.replace(tie_embeddings=False)
    with pytest.raises(InputError, match="lacks text_config"):
        own.config_from_hf({})


def test_what_a_wrapper_leaves_out_is_its_own():
    def text(family, **changes):
        said = {**SAID, **WRAPPED[family][0], **changes}
        return find_family(family).config_from_hf({k: v for k, v in said.items() if v is not ...})

    left = {"rms_norm_eps": ..., "max_position_embeddings": ..., "num_key_value_heads": ...,
            "attention_bias": ..., "rope_theta": ..., "num_attention_heads": 48, "hidden_size": 480,
            "partial_rotary_factor": ...}  # fmt: skip
    found = text("qwen3_vl_moe", **left)
    assert found.attention.rope == RopeConfig(theta=500000.0)
    assert (found.norm_eps, found.max_position, found.dense_layers) == (1e-6, 128000, ())
    assert (found.attention.num_kv_heads, found.attention.qkv_bias) == (16, False)
    found = text("glm4v_moe", **left)
    assert found.attention.rope == RopeConfig(theta=10000.0, fraction=0.5)
    assert (found.norm_eps, found.max_position) == (1e-5, 65536)
    assert (found.attention.num_kv_heads, found.attention.qkv_bias) == (8, True)


def test_a_deepseek_of_the_first_kind_is_written_as_a_qwen2_moe_that_computes_the_same():
    twin = find_family("deepseek").twin
    said = {**SAID, **CASES["deepseek"][0], "scoring_func": "softmax", "aux_loss_alpha": 0.1,
            "pretraining_tp": 1, "seq_aux": True, "attention_bias": False, "mine": 3}  # fmt: skip
    written = twin.config(said)
    own = {
        "n_routed_experts",
        "n_shared_experts",
        "first_k_dense_replace",
        "moe_layer_freq",
        "scoring_func",
        "attention_bias",
        "aux_loss_alpha",
        "seq_aux",
        "pretraining_tp",
    }
    assert not own & written.keys() and written["mine"] == 3
    assert written["mlp_only_layers"] == [0, 1, 2, 4]
    assert twin.config({**SAID, **SHARED})["mlp_only_layers"] == []
    assert written["architectures"] == ["Qwen2MoeForCausalLM"]
    theirs = find_family("qwen2_moe").config_from_hf(written)
    ours = read("deepseek")
    assert theirs == ours.replace(
        # Without norms of queries and keys the attention's own epsilon is not read.
        attention=dataclasses.replace(ours.attention, qkv_bias=True, norm_eps=3e-5),
        moe=dataclasses.replace(ours.moe, shared_gate=True),
    )


def test_a_head_is_the_embedding_only_where_the_config_of_deepseek_says_so():
    said = {key: value for key, value in SAID.items() if key != "tie_word_embeddings"}
    assert not find_family("deepseek").config_from_hf({**said, **SHARED}).tie_embeddings
    assert read("deepseek").tie_embeddings


def test_what_another_program_is_told_of_kimi_is_that_it_is_deepseek_v3():
    said = {"model_type": "kimi_k2", "architectures": ["KimiK2ForCausalLM"], "vocab_size": 5}
    assert find_family("kimi_k2").twin.config(said) == {
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 5,
    }  # fmt: skip


def test_tensors_of_mixtral_have_names_on_disk_and_in_memory():
    called = find_family("mixtral").canonical
    for part, letters in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        on_disk = f"model.layers.12.block_sparse_moe.experts.7.{letters}.weight"
        assert called(f"model.layers.12.mlp.experts.7.{part}_proj.weight") == on_disk
        assert called(on_disk) == on_disk
    router = "model.layers.3.block_sparse_moe.gate.weight"
    assert called("model.layers.3.mlp.gate.weight") == called(router) == router


def test_the_layers_of_that_twin_have_biases_of_zero_and_a_shared_expert_of_twice_the_weight():
    config = read("deepseek", tie_word_embeddings=False)
    written = find_family("deepseek").twin.layer
    rng = np.random.default_rng(0)
    drawn = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    for index in (0, 3):
        layer = jax.tree.map(drawn, abstract(config).layers[index])
        found = written(layer)
        for name, width in (("q", 60), ("k", 20), ("v", 20)):
            bias = getattr(found.attention, f"b_{name}")
            assert bias.shape == (width,) and not bias.any()
        if index:
            ours, theirs = layer.mlp.shared, found.mlp.shared
            assert theirs.gate.shape == (1, 60) and not theirs.gate.any()
            np.testing.assert_array_equal(theirs.mlp.w_down, 2 * ours.mlp.w_down)
            np.testing.assert_array_equal(theirs.mlp.w_up, ours.mlp.w_up)
            packed = quantize(ours.mlp.w_down, group_size=20, axis=1)
            coded = dataclasses.replace(
                layer, mlp=dataclasses.replace(layer.mlp, shared=dataclasses.replace(
                    ours, mlp=dataclasses.replace(ours.mlp, w_down=packed)))
            )  # fmt: skip
            twice = written(coded).mlp.shared.mlp.w_down
            np.testing.assert_array_equal(twice.packed, packed.packed)
            np.testing.assert_array_equal(twice.scale, 2 * packed.scale)
        else:
            assert found.mlp is layer.mlp
