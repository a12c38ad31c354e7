"""The kind and the range of every field of config.json, at both ends of each."""

import math

import pytest

from convert.fields import FIELDS, ROPE_FIELDS, read_fields
from moe_jax.errors import InputError

ROPE = {f"rope_scaling.{name}": field for name, field in ROPE_FIELDS.items()}
EVERY = FIELDS | ROPE
K, M, G = 1 << 10, 1 << 20, 1 << 30

# (least, most, whether null means something) -> names
WHOLE = {
    (1, 2 * K, False): "num_hidden_layers",
    (1, 2 * K, True): "moe_layer_freq",
    (1, 16 * K, False): "num_experts_per_tok n_shared_experts",
    (1, 16 * K, True): "n_group topk_group",
    (0, 16 * K, True): "num_experts num_local_experts n_routed_experts",
    (1, M, False): "hidden_size num_attention_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim"
    " v_head_dim linear_num_key_heads linear_num_value_heads linear_key_head_dim"
    " linear_value_head_dim moe_intermediate_size shared_expert_intermediate_size",
    (1, M, True): "num_key_value_heads head_dim q_lora_rank",
    (0, M, True): "intermediate_size",
    (1, 256 * M, False): "vocab_size",
    (1, K * G, False): "max_position_embeddings",
    (1, K * G, True): "original_max_position_embeddings"
    " rope_scaling.original_max_position_embeddings",
    (0, K * G, True): "sliding_window",
    (1, K, False): "linear_conv_kernel_dim",
    (1, G, False): "full_attention_interval",
    (0, G, False): "max_window_layers decoder_sparse_step",
    (0, G, True): "first_k_dense_replace",
    (0, 64, True): "num_nextn_predict_layers",
}
# (above, at most, whether null means something) -> names
NUMBER = {
    (0, 1, False): "rms_norm_eps",
    (0, 1, True): "partial_rotary_factor rope_scaling.partial_rotary_factor",
    (0, 1e6, False): "routed_scaling_factor swiglu_alpha",
    (0, 1e6, True): "rope_scaling.factor rope_scaling.attention_factor rope_scaling.low_freq_factor"
    " rope_scaling.high_freq_factor",
    (-1, 1e6, True): "rope_scaling.mscale rope_scaling.mscale_all_dim",
    (0, 1e9, False): "swiglu_limit",
    (0, 1e9, True): "clip_qkv rope_scaling.beta_fast rope_scaling.beta_slow",
    (0, 1e15, False): "rope_theta rope_scaling.rope_theta",
}
SWITCHES = (
    "tie_word_embeddings attention_bias qkv_bias use_qk_norm rope_interleave use_sliding_window"
    " norm_topk_prob mlp_bias rope_scaling.truncate"
)
WORDS = {False: "hidden_act rope_scaling.rope_type rope_scaling.type",
         True: "topk_method scoring_func"}  # fmt: skip
MAPPINGS = "rope_scaling rope_parameters quantization_config"
# A list of at most so many of what fits -> names
MANY = {
    (2 * K, "text", "", 3): "layer_types mlp_layer_types",
    (2 * K, "a whole number from 0 to 1073741824", G, G + 1): "mlp_only_layers",
    (M, "a number above 0 and at most 1e+09", 1e9, 0.0): "rope_scaling.short_factor"
    " rope_scaling.long_factor",
}


def each(table):
    return [(name, *kind) for kind, names in table.items() for name in names.split()]


def test_every_field_is_here():
    named = [name for name, *_ in (*each(WHOLE), *each(NUMBER), *each(MANY))]
    named += " ".join((SWITCHES, *WORDS.values(), MAPPINGS)).split()
    assert sorted(named) == sorted(EVERY)


@pytest.mark.parametrize(("name", "least", "most", "null"), each(WHOLE))
def test_a_whole_number_has_a_least_and_a_most(name, least, most, null):
    field = EVERY[name]
    assert field.words == f"a whole number from {least} to {most}" and field.null == null
    assert field.fits(least) and field.fits(most) and field.fits(least + 1)
    wrong = (least - 1, most + 1, float(least + 1), True, str(least), [least], math.nan)
    assert not any(map(field.fits, wrong))


@pytest.mark.parametrize(("name", "above", "most", "null"), each(NUMBER))
def test_a_number_lies_above_one_and_up_to_another(name, above, most, null):
    field = EVERY[name]
    assert field.words == f"a number above {above:g} and at most {most:g}" and field.null == null
    assert field.fits(math.nextafter(above, 9)) and field.fits(float(most)) and field.fits(1)
    wrong = (float(above), math.nextafter(most, math.inf), math.nan, math.inf, True, "1", [1])
    assert not any(map(field.fits, wrong))


def test_switches_words_and_objects_have_their_types():
    for name in SWITCHES.split():
        field = EVERY[name]
        assert (field.words, field.null) == ("true or false", False)
        assert field.fits(True) and field.fits(False) and not any(map(field.fits, (1, 0, "no", [])))
    for null, names in WORDS.items():
        for name in names.split():
            field = EVERY[name]
            assert (field.words, field.null) == ("text", null)
            assert field.fits("x" * 1000) and field.fits("")
            assert not any(map(field.fits, ("x" * 1001, 3, ["x"])))
    for name in MAPPINGS.split():
        field = EVERY[name]
        assert (field.words, field.null) == ("an object", True)
        assert field.fits({}) and field.fits({"x": 1}) and not field.fits([])


@pytest.mark.parametrize(("name", "most", "words", "fits", "other"), each(MANY))
def test_a_list_has_so_many_entries_of_one_kind(name, most, words, fits, other):
    field = EVERY[name]
    assert field.words == f"a list of at most {most} entries, each {words}" and field.null
    assert field.fits([]) and field.fits([fits] * most) and not field.fits([fits] * (most + 1))
    assert not field.fits([fits, other]) and not field.fits(tuple([fits])) and not field.fits(fits)


SAID = {"num_hidden_layers": 4, "num_experts": 8}


def test_fields_are_checked_when_they_are_read_and_defaults_stand_for_what_is_missing():
    said = {**SAID, "vocab_size": "x", "head_dim": None}
    fields = read_fields(said, {"rms_norm_eps": 0.5, "num_experts": 3})
    assert (fields["num_experts"], fields["rms_norm_eps"], fields["head_dim"]) == (8, 0.5, None)
    assert fields.get("qkv_bias", 7) == 7 and fields.get("qkv_bias") is None
    assert "vocab_size" in fields
    with pytest.raises(InputError, match="vocab_size='x' must be a whole number from 1 to 268435"):
        fields["vocab_size"]
    with pytest.raises(InputError, match=r"config\.json lacks qkv_bias$"):
        fields["qkv_bias"]
    null = read_fields({**SAID, "attention_bias": None, "hidden_size": None}, {})
    assert null["attention_bias"] is False
    with pytest.raises(InputError, match="lacks hidden_size: it is null, expected a whole number"):
        null["hidden_size"]
    assert read_fields({**SAID, "mine": object}, {})["mine"] is object  # no field of ours


def test_values_of_a_rope_are_named_with_it():
    said = {"factor": 2.0, "mine": 3, "truncate": None}
    fields = read_fields({**SAID, "rope_scaling": said, "rope_parameters": {"factor": 0}}, {})
    assert fields["rope_scaling"] == {"factor": 2.0, "mine": 3, "truncate": False}
    with pytest.raises(InputError, match=r"rope_parameters\.factor=0 must be a number above 0"):
        fields["rope_parameters"]


def test_no_more_is_described_than_any_model_is():
    for layers, experts in ((8, 16 * K), (2 * K, 64)):
        read_fields({"num_hidden_layers": layers, "n_routed_experts": experts}, {})
        message = rf"{layers} layers of {experts + 1} experts are more than 131072 in all"
        with pytest.raises(InputError, match=message if experts < 16 * K else "must be a whole"):
            read_fields({"num_hidden_layers": layers, "n_routed_experts": experts + 1}, {})
    read_fields({**SAID, "layer_types": ["a"] * 4}, {})
    for count in (3, 5):
        with pytest.raises(InputError, match=f"layer_types has {count} entries, the model has 4 l"):
            read_fields({**SAID, "layer_types": ["a"] * count}, {})
    with pytest.raises(InputError, match="quantization_config=3 must be an object"):
        read_fields({**SAID, "quantization_config": 3}, {})


@pytest.mark.parametrize(
    ("length", "shown"), [(80, "'" + "x" * 78 + "'"), (81, "'" + "x" * 76 + "...")]
)
def test_a_long_value_is_shown_in_short(length, shown):
    with pytest.raises(InputError) as error:
        read_fields({**SAID, "vocab_size": "x" * (length - 2)}, {})["vocab_size"]
    assert str(error.value).startswith(f"vocab_size={shown} must be")
