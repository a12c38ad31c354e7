"""A damaged or foreign checkpoint is refused by name, before its weights are read."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import CheckpointError, SafetensorsFolder, load_model, open_checkpoint
from tests.support import tiny

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
LAYERED = {"model_type": "ragged_qwen2_moe", "unpruned_intermediate_size": 16}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = tiny.tiny_model("qwen2_moe")
    tiny.save(model, folder / "single")
    tiny.save(model, folder / "sharded", max_shard_size="40KB")
    return folder


@pytest.fixture
def single(pristine, tmp_path):
    return shutil.copytree(pristine / "single", tmp_path / "model")


@pytest.fixture
def sharded(pristine, tmp_path):
    return shutil.copytree(pristine / "sharded", tmp_path / "model")


def change_tensors(folder, **changes):
    """Replace tensors; None removes one. Dots of names are written as slashes."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("/", "."): v for name, v in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def equal(found, wanted):
    """Whether two models have the same weights, bit for bit."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


def write_header(folder, entries, data=b"\0" * 64):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    content = len(text).to_bytes(8, "little") + text + data
    (folder / "model.safetensors").write_bytes(content)


def test_all_wrong_tensors_are_listed_in_one_error(single):
    change_tensors(
        single,
        **{
            EXPERT: None,
            "model.layers.0.mlp.gate.weight": np.zeros((7, 32), np.float32),
            "model.layers.9.mlp.gate.weight": np.zeros((8, 32), np.float32),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(single)
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert f"{EXPERT} is missing" in text
    assert "model.layers.0.mlp.gate.weight has shape [7, 32]; config.json asks for [8, 32]" in text
    assert "model.layers.9.mlp.gate.weight is not part of a qwen2_moe" in text


def test_a_tensor_stored_fused_and_separately_is_refused(single):
    fused = np.zeros((8, 32, 16), np.float32)
    change_tensors(single, **{"model.layers.1.mlp.experts.down_proj": fused})
    with pytest.raises(CheckpointError, match=r"experts\.3\.down_proj\.weight is stored twice"):
        open_checkpoint(single)


@pytest.mark.parametrize("keep", [4, 20, 5000, -3])
def test_a_truncated_file_is_refused(single, keep):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"truncated|header"):
        open_checkpoint(single)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"shard {shard.name} is missing"):
        open_checkpoint(sharded)


def test_an_index_that_contradicts_its_shards_is_rebuilt_and_said(sharded, caplog):
    path = sharded / "model.safetensors.index.json"
    before = load_model(sharded)
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    names = [name for name, shard in index["weight_map"].items() if shard == shards[0]]
    index["weight_map"][names[0]] = shards[1]
    del index["weight_map"][names[1]]
    index["weight_map"]["ghost"] = shards[0]
    path.write_text(json.dumps(index))
    equal(load_model(sharded), before)
    assert "names 1 tensor(s), such as ghost, that no shard has" in caplog.text
    assert f"does not name 1 tensor(s), such as {names[1]}," in caplog.text
    assert f"puts 1 tensor(s), such as {names[0]}, into the wrong shard" in caplog.text


def test_a_shard_that_no_entry_names_and_a_lost_index_are_read_from_headers(sharded, caplog):
    path = sharded / "model.safetensors.index.json"
    before, index = load_model(sharded), json.loads(path.read_text())
    last = max(index["weight_map"].values())
    index["weight_map"] = {n: file for n, file in index["weight_map"].items() if file != last}
    path.write_text(json.dumps(index))
    equal(load_model(sharded), before)
    path.unlink()
    equal(load_model(sharded), before)
    assert f"{path.name} is missing; the tensors are read as" in caplog.text


def test_a_needed_tensor_that_the_index_names_and_no_shard_has_is_refused(sharded):
    path = sharded / "model.safetensors.index.json"
    file = json.loads(path.read_text())["weight_map"][EXPERT]
    tensors = load_file(sharded / file)
    del tensors[EXPERT]
    save_file(tensors, sharded / file)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(sharded)
    assert caught.value.problems == (f"{EXPERT} is missing",)


def test_a_stale_index_beside_a_whole_file_is_refused(single):
    (single / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="remove the one that is stale"):
        open_checkpoint(single)


@pytest.mark.parametrize("name", ["../outside.safetensors", "x" * 50_000])
def test_a_shard_name_with_a_path_is_refused(sharded, name):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a plain shard name") as caught:
        open_checkpoint(sharded)
    assert len(str(caught.value)) < 1000


def entry(start, stop, dtype="F32", shape=(4,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 16), "b": entry(8, 24)}, "b overlaps a"),
        ({"a": entry(0, 12)}, "has 12 bytes but its shape"),
        ({"a": entry(0, 400, shape=(100,))}, "truncated"),
        ({"a": entry(0, 16, dtype="F99")}, "'F99' is none of"),
        ({"a": entry(-16, 0)}, "natural numbers"),
        ({"a": 3}, "is none of"),
        (b'{"a": {}, "a": {}}', "twice"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe", "header is not valid JSON"),
    ],
)
def test_a_hostile_header_is_refused(tmp_path, header, message):
    write_header(tmp_path, header)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(tmp_path)


def test_a_header_length_beyond_the_file_is_refused_without_reading_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="exceeds the file"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_layer_with_nan_or_infinity_is_refused_by_tensor_name(single, value):
    bad = np.zeros((16, 32), np.float32)
    bad[3, 5] = value
    change_tensors(single, **{EXPERT: bad})
    source = open_checkpoint(single)
    source.layer(0)
    with pytest.raises(CheckpointError, match=f"{EXPERT} holds NaN or infinity"):
        source.layer(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # spelt like one family, but its tensors are another's
        ({"model_type": "qwen3_mo"}, "sizes are those of a 'qwen2_moe': if it computes the same"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_experts": None}, "lacks num_experts"),
        ({"num_experts_per_tok": 9}, "experts_per_token=9"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type='spiral'"),
        ({"model_type": "ragged_qwen2_moe"}, "expert_intermediate_sizes must have"),
        ({**LAYERED, "moe_intermediate_size": 16}, "must be a list of one width per layer"),
        ({**LAYERED, "moe_intermediate_size": [16]}, "the architecture has 2 layers"),
        ({**LAYERED, "moe_intermediate_size": [16, 0]}, r"size\[1\]=0 must be at least 1"),
        ({**LAYERED, "moe_intermediate_size": [16, "8"]}, r"size\[1\]='8' must be at least 1"),
        (
            {**LAYERED, "mlp_only_layers": [0], "moe_intermediate_size": [16, 16]},
            r"size\[0\]=16 must be 0, since the layer has no experts",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is fp8"),
    ],
)
def test_an_unsupported_config_is_refused_with_the_reason(single, change, message):
    change_config(single, **change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(single)


def test_a_folder_without_config_or_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="only safetensors are read"):
        SafetensorsFolder(tmp_path)


def test_the_fingerprint_follows_weights_and_config_but_not_the_place(single, tmp_path):
    first = open_checkpoint(single).fingerprint
    copy = shutil.copytree(single, tmp_path / "copy")
    assert open_checkpoint(copy).fingerprint == first
    change_tensors(copy, **{EXPERT: np.ones((16, 32), np.float32)})
    assert open_checkpoint(copy).fingerprint != first
    change_config(single, norm_topk_prob=True)
    assert open_checkpoint(single).fingerprint != first
