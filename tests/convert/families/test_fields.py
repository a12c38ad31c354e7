"""What config.json leaves out is what transformers has for the family; what it says has a type."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers

from convert import FAMILIES, CheckpointError, find_family, load_model, open_checkpoint
from convert.families import qwen3_moe
from convert.fields import FIELDS
from convert.packing import packed_inputs
from moe_jax.errors import InputError
from tests.support import tiny

# What transformers has no class for is read by the published code of the model, or by that of the
# family whose class it computes.
STOCK = [name for name in FAMILIES if not name.startswith("ragged_")]
WITH_CLASS = [
    name for name in STOCK if name in transformers.CONFIG_MAPPING and not find_family(name).wrapper
]
WRAPPERS = [name for name in STOCK if find_family(name).wrapper]
# Sizes that a model needs for the defaults of the others to fit it.
FITTING = {
    "qwen2_moe": {"num_attention_heads": 16, "hidden_size": 64},
    "mixtral": {"num_attention_heads": 8},
    "deepseek_v3": {"n_routed_experts": 16, "num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "dots1": {"num_attention_heads": 32, "hidden_size": 64},
}
# Another value than the default, where it is not the switch's other one.
OTHER = {
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-3,
    "head_dim": 12,
    "num_key_value_heads": 1,
    "sliding_window": 5,
    "max_window_layers": 1,
    "decoder_sparse_step": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "q_lora_rank": 8,
    "n_group": 2,
    "topk_group": 2,
    "clip_qkv": 0.3,
    "swiglu_alpha": 1.1,
    "swiglu_limit": 0.5,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 3,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 2,
}
# Values that go with another one, and values that have no other one that either program computes.
TOGETHER = {
    "sliding_window": {"use_sliding_window": True},
    "max_window_layers": {"use_sliding_window": True, "sliding_window": 5},
    "use_sliding_window": {"sliding_window": 5},
    "n_group": {"topk_group": 1},
    "topk_group": {"n_group": 4},
    "linear_num_key_heads": {"linear_num_value_heads": 3},
    "linear_num_value_heads": {"linear_num_key_heads": 1},
}
ONE_VALUE = {"hidden_act", "topk_method", "rope_interleave"}
NOT_IN_TRANSFORMERS = {
    # Read by the published code and vLLM; transformers has layer_types, which it fills in.
    "qwen3_next": {"full_attention_interval"},
    "deepseek_v2": {"rope_interleave"},  # always so there
}


# What computes the text model of families that transformers has no class for by their name.
TEXT_CLASS = {"kimi_k2": "deepseek_v3", "kimi_k25": "deepseek_v3", "deepseek": "deepseek_v2",
              "glm4v_moe": "glm4v_moe_text", "qwen3_vl_moe": "qwen3_vl_moe_text"}  # fmt: skip


def sizes(family: str) -> dict:
    """What the model needs beside its defaults."""
    own = {**tiny.SIZES, **tiny.OWN_SIZES[family], **FITTING.get(family, {})}
    left = find_family(family).defaults
    found = {key: value for key, value in own.items() if key not in left and key != "layer_types"}
    if found.keys() & {"num_local_experts", "n_routed_experts"}:
        del found["num_experts"]
    return found


def model_of(family: str, **config) -> transformers.PreTrainedModel:
    settings = transformers.AutoConfig.for_model(family, **{**sizes(family), **config})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.25)
    return model


def same_logits(model, folder, length: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 96, (1, length)).astype(np.int32)
    found = np.asarray(load_model(folder)(tokens, np.ones(tokens.shape, bool)))
    model.config._experts_implementation = "eager"  # grouped products know no float64
    with torch.no_grad():
        wanted = model.double()(input_ids=torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert np.abs(wanted).max() > 0.5  # else the tolerance would say nothing
    # Where queries pass a rank of 1536, float32 is 1.4e-4 off here, and 1.8e-4 in torch.
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("family", [*WITH_CLASS, *WRAPPERS])
def test_a_default_is_that_of_transformers(family):
    left = find_family(family).defaults
    assert set(left) <= set(FIELDS)
    needed = {"use_sliding_window": True} if "max_window_layers" in left else {}
    theirs = transformers.AutoConfig.for_model(family, **needed)
    wrapper = find_family(family).wrapper
    if wrapper is not None:  # whether the head is tied is said of the whole
        assert theirs.tie_word_embeddings == wrapper.default_tied
        left, theirs = (
            {k: v for k, v in left.items() if k != "tie_word_embeddings"},
            theirs.text_config,
        )
        assert theirs.rope_parameters["rope_theta"] == find_family(family).rope.get(
            "rope_theta", 1e4
        )
    if family == "qwen3_moe":  # the value is read only where it is used
        left = {key: value for key, value in left.items() if key != "sliding_window"}
        used = transformers.AutoConfig.for_model(family, use_sliding_window=True)
        assert used.sliding_window == find_family(family).defaults["sliding_window"]
    own = NOT_IN_TRANSFORMERS.get(family, set()) | set(needed)
    for key, value in left.items():
        if key not in own:
            assert getattr(theirs, key) == value, key


@pytest.mark.parametrize("family", STOCK)
def test_whatever_is_left_out_is_read_as_transformers_reads_it(family):
    """Every field that we read and can do without, whether it is declared as a default or not."""
    known = TEXT_CLASS.get(family, family)
    own = tiny.OWN_SIZES[known.removesuffix("_text").replace("glm4v", "glm4").replace("_vl", "")]
    whole = transformers.AutoConfig.for_model(known, **{**tiny.SIZES, **own})
    said, optional = whole.to_dict(), set()

    def read(config):
        found = find_family(family).config_from_hf(config)
        return found if found.dense_layers else found.replace(d_dense=0)  # it says nothing then

    outer = {"tie_word_embeddings"} if family in WRAPPERS else set()  # said of the whole
    for key in FIELDS.keys() & said.keys() - outer:
        without = {name: value for name, value in said.items() if name != key}
        with contextlib.suppress(InputError):
            found = read(dict(without))
            optional.add(key)
            assert found == read(type(whole).from_dict(without).to_dict()), key
    assert optional >= {"max_position_embeddings", "rms_norm_eps", "hidden_act"}


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_CLASS)
def test_a_folder_without_any_optional_key_is_the_model_of_transformers(family, tmp_path):
    model = model_of(family)
    tiny.save(model, tmp_path)
    path = tmp_path / "config.json"
    left = {*find_family(family).defaults, "layer_types", "attn_implementation"}
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in left}))
    reloaded, _ = tiny.load_export(tmp_path, trust=False)
    same_logits(reloaded, tmp_path, 140 if family == "gpt_oss" else 24)


CASES = [
    (family, key)
    for family in WITH_CLASS
    for key in find_family(family).defaults
    if key not in ONE_VALUE | NOT_IN_TRANSFORMERS.get(family, set())
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "key"), CASES)
def test_another_value_than_the_default_is_read(family, key, tmp_path):
    default = find_family(family).defaults[key]
    value = not default if isinstance(default, bool) else OTHER[key]
    value = 0 if value == default else value
    together = {k: v for k, v in TOGETHER.get(key, {}).items() if k in find_family(family).defaults}
    few = {
        "deepseek_v3": {"first_k_dense_replace": 1, "num_hidden_layers": 2},
        "dots1": {"max_window_layers": 1},  # without it no layer has a window
    }.get(family, {})
    model = model_of(family, **{**few, key: value, **together})
    assert getattr(model.config, key) == value
    tiny.save(model, tmp_path)
    read = find_family(family).config_from_hf
    said = json.loads((tmp_path / "config.json").read_text())
    without = {name: told for name, told in said.items() if name not in (key, *together)}
    assert read(said) != read(without | {"layer_types": None}), "the key is not read"
    same_logits(model, tmp_path, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": "no"}, "norm_topk_prob='no' must be true or false"),
        ({"vocab_size": 4096.5}, "vocab_size=4096.5 must be a whole number from 1 to"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size=0 must be a whole number from 1"),
        ({"moe_intermediate_size": -8}, "moe_intermediate_size=-8 must be a whole number from 1"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 must be a whole number from 1"),
        (
            {"num_hidden_layers": 2000, "num_experts": 16000, "layer_types": None},
            "2000 layers of 16000",
        ),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
        ({"rms_norm_eps": None}, "lacks rms_norm_eps: it is null, expected a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a number above 0"),
        ({"mlp_only_layers": [0.5]}, r"mlp_only_layers=\[0.5\] must be a list"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' must be an object"),
        ({"rope_parameters": {"factor": "4"}}, "rope_parameters.factor='4' must be a number"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, the model has 2 layers"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"quantization_config": [4]}, r"quantization_config=\[4\] must be an object"),
        ({"model_type": ["qwen2_moe"]}, r"model_type=\"\['qwen2_moe'\]\" is unknown"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(changes, message, tmp_path):
    tiny.tiny_qwen2_moe(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_field_that_the_family_does_not_read_may_hold_anything(tmp_path):
    """Qwen3-Coder's config.json has a shared expert of width 0, which its family has not."""
    tiny.tiny_qwen3_moe(tmp_path)
    path = tmp_path / "config.json"
    other = {"shared_expert_intermediate_size": 0, "kv_lora_rank": 0, "topk_method": 7}
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    assert len(open_checkpoint(tmp_path)) == 2


@pytest.mark.parametrize("family", STOCK)
def test_every_field_gone_or_null_is_read_or_refused(family):
    """Neither a KeyError nor a TypeError comes out, whatever is left out of a config.json."""
    source = {"kimi_k2": "deepseek_v3", "deepseek": "deepseek_v2", "kimi_k25": "deepseek_v3",
              "glm4v_moe": "glm4_moe", "qwen3_vl_moe": "qwen3_moe"}.get(family, family)  # fmt: skip
    grouped = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}
    more = {"n_shared_experts": 1, "moe_layer_freq": 1, "first_k_dense_replace": 0}
    whole = transformers.AutoConfig.for_model(source, **{**tiny.SIZES, **tiny.OWN_SIZES[source]})
    whole = whole.to_dict() | (grouped if source == "deepseek_v2" else {}) | more
    if family == "deepseek":
        whole = {k: v for k, v in whole.items() if k not in grouped}
    read = find_family(family).config_from_hf
    read(dict(whole))
    for key in whole:
        for changed in ({k: v for k, v in whole.items() if k != key}, whole | {key: None}):
            with contextlib.suppress(InputError):
                read(changed)


def test_a_family_put_in_from_outside_is_read_by_type_too(tmp_path, monkeypatch):
    own = dataclasses.replace(qwen3_moe.FAMILY, model_type="my_moe")
    monkeypatch.setitem(FAMILIES, "my_moe", own)
    tiny.tiny_qwen3_moe(tmp_path)
    path = tmp_path / "config.json"
    said = json.loads(path.read_text()) | {"model_type": "my_moe"}
    said.pop("use_sliding_window", None)
    path.write_text(json.dumps(said))
    assert open_checkpoint(tmp_path).about.family.model_type == "my_moe"
    path.write_text(json.dumps(said | {"norm_topk_prob": "no"}))
    with pytest.raises(CheckpointError, match="norm_topk_prob='no' must be true or false"):
        open_checkpoint(tmp_path)


def test_a_family_without_4_bit_formats_packs_nothing(tmp_path, monkeypatch):
    own = dataclasses.replace(qwen3_moe.FAMILY, model_type="my_moe", formats=("padded-bf16",))
    monkeypatch.setitem(FAMILIES, "my_moe", own)
    tiny.tiny_qwen3_moe(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "my_moe"}))
    assert packed_inputs(open_checkpoint(tmp_path).about, requantize=False) == []
