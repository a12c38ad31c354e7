"""What the name of a format says, and the widths that its folder stores."""

import pytest

from convert.export_format import FORMATS, ExportFormat
from convert.formats.wrapped import wrapped_config
from moe_jax.errors import InputError

# Name -> layout, storage, bits, packed, integers, 4-bit floats, 8-bit floats, step.
SAID = {
    "ragged-bf16": ("ragged", "bf16", 16, False, False, False, False, 1),
    "ragged-int4": ("ragged", "int4", 4, True, True, False, False, 64),
    "layered-bf16": ("layered", "bf16", 16, False, False, False, False, 1),
    "layered-int4": ("layered", "int4", 4, True, True, False, False, 64),
    "padded-bf16": ("padded", "bf16", 16, False, False, False, False, 8),
    "padded-int4": ("padded", "int4", 4, True, True, False, False, 64),
    "padded-mxfp4": ("padded", "mxfp4", 4, True, False, True, False, 32),
    "padded-fp8": ("padded", "fp8", 8, True, False, False, True, 128),
    "ragged-int8": ("ragged", "int8", 8, True, True, False, False, 64),
    "padded-int8": ("padded", "int8", 8, True, True, False, False, 64),
    "ragged-mixed": ("ragged", "mixed", 4, True, True, False, False, 64),
}


def form_of(name: str, **options) -> ExportFormat:
    return ExportFormat(name, 32 if name == "padded-mxfp4" else 64, **options)


@pytest.mark.parametrize("name", FORMATS)
def test_a_name_says_what_a_folder_is(name):
    form = form_of(name)
    assert (
        form.layout, form.storage, form.bits, form.is_packed, form.is_integer, form.is_float4,
        form.is_float8, form.step,
    ) == SAID[name]  # fmt: skip
    kinds = {"ragged": form.is_ragged, "layered": form.is_layered, "padded": form.is_padded}
    assert [kind for kind, so in kinds.items() if so] == [form.layout]
    assert form.is_int4 == (form.storage == "int4")
    assert form.holds_constants(True) and form.holds_constants(False) == form.is_ragged


def test_what_is_no_format_is_refused():
    for name in ("padded", "ragged-mxfp4", "ragged-fp8", "layered-int8", ""):
        with pytest.raises(InputError, match=f"export='{name}' is unknown; choose among ragged-bf"):
            ExportFormat(name)
    with pytest.raises(InputError, match="mtp='some' is unknown; choose among drop, keep, prune"):
        ExportFormat("ragged-bf16", mtp="some")
    with pytest.raises(InputError, match="group_size=64 must be 32 for padded-mxfp4"):
        ExportFormat("padded-mxfp4", 64)
    plain = ExportFormat("ragged-bf16")
    assert (plain.group_size, plain.constants, plain.mtp, plain.requantize) == (
        32, False, "drop", False
    )  # fmt: skip


def test_one_part_of_a_format_is_changed_and_the_rest_stays():
    form = ExportFormat("ragged-int4", 64, True, "keep", True)
    assert form.like() == form
    assert form.like(layout="padded") == ExportFormat("padded-int4", 64, True, "keep", True)
    assert form.like(storage="bf16") == ExportFormat("ragged-bf16", 64, True, "keep", True)
    with pytest.raises(InputError, match="'ragged-fp8' is unknown"):
        form.like(storage="fp8")


WIDTHS = ((3, 70, 0), (), (9, 1, 8))


@pytest.mark.parametrize(
    ("name", "layers", "padded"),
    [
        ("layered-bf16", [70, 0, 9], 70), ("padded-bf16", [72, 0, 72], 72),
        ("layered-int4", [128, 0, 64], 128), ("padded-int4", [128, 0, 128], 128),
        ("padded-mxfp4", [96, 0, 96], 96), ("padded-fp8", [128, 0, 128], 128),
    ],
)  # fmt: skip
def test_experts_are_as_wide_as_the_widest_that_they_share_a_width_with(name, layers, padded):
    form = form_of(name)
    assert form.layer_widths(WIDTHS) == layers and form.padded_width(WIDTHS) == padded
    stored = tuple((layers[i],) * len(counts) for i, counts in enumerate(WIDTHS))
    assert form.stored_widths(WIDTHS) == stored
    assert form_of("ragged-bf16").stored_widths(WIDTHS) == WIDTHS
    # Of nothing there is one channel, or as many as go together.
    step = form.step
    assert form.stored_widths(((0, 0), ())) == ((step, step), ())
    assert form.padded_width(((step, 1),)) == step and form.padded_width(((step + 1,),)) == 2 * step


def test_a_text_model_goes_back_into_the_whole_that_it_is_of():
    outer = {
        "model_type": "eyes", "text_config": {"model_type": "words", "hidden_size": 3, "old": 1},
        "vision_config": {"x": 1}, "torch_dtype": "float32", "dtype": "float32",
        "quantization_config": {"a": 1}, "image_token_id": 7, "tie_word_embeddings": False,
        "auto_map": {"AutoModel": "m.Model", "AutoTokenizer": "t.T", "AutoProcessor": "p.P"},
    }  # fmt: skip
    config = {
        "model_type": "text", "architectures": ["Text"], "hidden_size": 4, "dtype": "bfloat16",
        "quantization_config": {"b": 2}, "tie_word_embeddings": True, "new": 2,
    }  # fmt: skip
    before = {**outer}, {**config}
    found = wrapped_config(config, outer)
    assert found == {
        "model_type": "eyes", "vision_config": {"x": 1}, "image_token_id": 7,
        "auto_map": {"AutoTokenizer": "t.T", "AutoProcessor": "p.P"}, "dtype": "bfloat16",
        "quantization_config": {"b": 2}, "tie_word_embeddings": True,
        "text_config": {"model_type": "words", "hidden_size": 4, "dtype": "bfloat16",
                        "tie_word_embeddings": True, "new": 2},
    }  # fmt: skip
    assert (outer, config) == before
    del outer["auto_map"], outer["text_config"]["model_type"]
    outer["text_config"]["architectures"] = ["Words"]
    again = wrapped_config({**config, "quantization_config": {}}, outer)
    assert "auto_map" not in again and again["quantization_config"] == {}
    assert again["text_config"]["architectures"] == ["Words"]
    assert "model_type" not in again["text_config"]
