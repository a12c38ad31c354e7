"""Folders whose layers have bits of their own."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import load_model, open_checkpoint
from convert.export import Export
from convert.export_format import MIXED, STORAGES, ExportFormat
from moe_jax.errors import InputError
from pruning.stages.sizes import folder_bytes
from tests.support import tiny
from tests.support.variants import EXPORTED

BITS = (4, 16, 8, 4)
TOKENS = np.random.default_rng(1).integers(0, 96, (2, 12)).astype(np.int32)


def of_layer(name: str) -> int | None:
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model, the second of its layers dense, in each of the bits and in all of them."""
    folder = tmp_path_factory.mktemp("mixed")
    sizes = EXPORTED["qwen2_moe"] | {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
    }
    tiny.save(tiny.half(tiny.tiny_model("qwen2_moe", **sizes)), folder / "base")
    base = open_checkpoint(folder / "base", dtype=jnp.bfloat16)
    forms = {str(bits): ExportFormat(f"ragged-{how}", 32) for bits, how in STORAGES.items()}
    forms[MIXED] = ExportFormat(MIXED, 32, layer_bits=BITS)
    for name, form in forms.items():
        export = Export(base.about, base.about.widths, form)
        export.write(base, folder / name)
        assert export.nbytes == folder_bytes(folder / name)
    return folder


def test_each_layer_is_to_the_byte_what_a_folder_of_its_bits_holds(folders):
    single = {bits: load_file(folders / str(bits) / "model.safetensors") for bits in (4, 8, 16)}
    mixed = load_file(folders / MIXED / "model.safetensors")
    expected = {}
    for bits, tensors in single.items():
        for name, value in tensors.items():
            layer = of_layer(name)
            if layer is None or BITS[layer] == bits:
                expected[name] = value
    assert mixed.keys() == expected.keys()
    for name, value in expected.items():
        assert mixed[name].dtype == value.dtype
        assert mixed[name].tobytes() == value.tobytes(), name


def test_programs_read_the_bits_of_each_layer(folders):
    config = json.loads((folders / MIXED / "config.json").read_text())["quantization_config"]
    said = [
        (group["weights"]["num_bits"], group["targets"])
        for group in config["config_groups"].values()
    ]
    assert [bits for bits, _ in said] == [4, 8]
    for bits, (target,) in said:
        pattern = re.compile(target.removeprefix("re:"))
        for prefix in ("model.", ""):  # a bare model of transformers has none
            found = [i for i in range(44) if pattern.match(f"{prefix}layers.{i}.mlp.gate_proj")]
            assert found == [index for index, own in enumerate(BITS) if own == bits]
    assert {"lm_head", "model.layers.1.mlp.up_proj"} <= set(config["ignore"])
    theirs, info = tiny.load_export(folders / MIXED, trust=True)
    assert not any(info.values()), info
    ours = load_model(folders / MIXED)
    found = tiny.torch_logits(theirs, TOKENS, np.ones(TOKENS.shape, bool))
    expected = np.asarray(ours(jnp.asarray(TOKENS), dtype=jnp.float32))
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def test_bits_of_layers_are_said_of_the_one_format_that_has_them():
    form = ExportFormat(MIXED, 64, layer_bits=BITS)
    assert (form.layout, form.bits, form.step) == ("ragged", 4, 64)
    assert (form.is_packed, form.is_integer, form.is_int4) == (True, True, False)
    assert [form.of_layer(index).name for index in range(4)] == [
        "ragged-int4", "ragged-bf16", "ragged-int8", "ragged-int4"
    ]  # fmt: skip
    wide = ExportFormat(MIXED, 64, layer_bits=(16, 16))
    assert not wide.is_packed and not wide.is_integer and wide.step == 1
    plain = ExportFormat("ragged-int8")
    assert plain.of_layer(3) is plain
    for name, bits in (("ragged-int4", (4, 4)), (MIXED, (4, 5))):
        with pytest.raises(InputError, match=r"layer_bits=\(.*must be 4, 8 or 16 for each layer"):
            ExportFormat(name, layer_bits=bits)
