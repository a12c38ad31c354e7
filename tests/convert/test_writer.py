"""Written folders are complete or absent, and transformers reads what was written."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import tokenizers
import transformers
from safetensors import safe_open

from convert import (
    Checkpoint,
    SafetensorsFolder,
    expected_tensors,
    layer_tensors,
    open_checkpoint,
    outer_tensors,
    portable_config,
    write_folder,
)
from tests.support import tiny

SPECS = {
    "a": (np.dtype(np.uint8), (3,)),
    "b": (np.dtype(ml_dtypes.bfloat16), (2, 5)),
    "c": (np.dtype(np.float16), (3, 1)),
    "d": (np.dtype(np.int64), (2,)),
    "e": (np.dtype(np.int32), (7,)),
    "f": (np.dtype(np.float32), ()),
}


def some_tensors():
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.uniform(0, 9, s)).astype(d) for name, (d, s) in SPECS.items()}


def all_tensors(source: Checkpoint):
    yield from outer_tensors(source)
    for index in range(len(source)):
        yield from layer_tensors(source, source.layer(index), index)


def copy_model(source: Checkpoint, target, **options):
    shapes = expected_tensors(source.about.family, source.config)
    specs = {name: (np.dtype(np.float32), shape) for name, shape in shapes.items()}
    config = portable_config(source.about.hf_config)
    return write_folder(target, specs, all_tensors(source), config, source.about.folder, **options)


@pytest.mark.parametrize("shard_bytes", [5e9, 30])
def test_every_dtype_round_trips_byte_for_byte_in_one_file_and_in_shards(tmp_path, shard_bytes):
    tensors = some_tensors()
    backwards = reversed(list(tensors.items()))
    folder = write_folder(
        tmp_path / "out", SPECS, backwards, {"x": 1}, None, shard_bytes=shard_bytes
    )
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 30)
    ours = SafetensorsFolder(folder)
    assert ours.names == tuple(SPECS)
    for name, value in tensors.items():
        assert ours.spec(name) == SPECS[name]
        assert ours.read(name).tobytes() == value.tobytes()
    for file in files:
        with safe_open(file, "np") as theirs:
            assert theirs.metadata() == {"format": "pt"}
            for name in theirs.keys():
                assert theirs.get_tensor(name).tobytes() == tensors[name].tobytes()
    index = folder / "model.safetensors.index.json"
    if len(files) > 1:
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(v.nbytes for v in tensors.values())
        assert set(content["weight_map"].values()) == {file.name for file in files}
    else:
        assert not index.exists()


def refused(tmp_path, tensors, message, error=ValueError, **options):
    with pytest.raises(error, match=message):
        write_folder(tmp_path / "out", SPECS, tensors, {}, None, **options)
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_repeated_and_misshaped_tensors_leave_nothing_behind(tmp_path):
    tensors = some_tensors()
    refused(tmp_path, list(tensors.items())[1:], "1 tensors never came: a")
    refused(tmp_path, [*tensors.items(), ("g", np.zeros(1))], "g was not announced")
    refused(tmp_path, [*tensors.items(), ("a", tensors["a"])], "a came twice")
    refused(tmp_path, [("b", tensors["b"].T)], "b is bfloat16")
    refused(tmp_path, [("b", tensors["b"].astype(np.float32))], "b is float32")


def test_an_error_or_an_interrupt_while_streaming_leaves_nothing_behind(tmp_path):
    def interrupted(error):
        yield "a", some_tensors()["a"]
        raise error("stop")

    refused(tmp_path, interrupted(RuntimeError), "stop", RuntimeError)
    refused(tmp_path, interrupted(KeyboardInterrupt), "stop", KeyboardInterrupt)


def test_a_full_disk_is_noticed_before_writing(tmp_path):
    huge = {"a": (np.dtype(np.uint8), (1 << 60,))}
    with pytest.raises(OSError, match="GB free but the export needs"):
        write_folder(tmp_path / "out", huge, [], {}, None)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_overwriting_is_allowed(tmp_path):
    out = tmp_path / "out"
    write_folder(out, SPECS, some_tensors().items(), {"version": 1}, None)
    with pytest.raises(FileExistsError, match="allow overwriting"):
        write_folder(out, SPECS, some_tensors().items(), {"version": 2}, None)
    with pytest.raises(ValueError, match="never came"):
        write_folder(out, SPECS, [], {"version": 2}, None, overwrite=True)
    assert json.loads((out / "config.json").read_text()) == {"version": 1}
    (out / "stale.txt").write_text("x")
    write_folder(out, SPECS, some_tensors().items(), {"version": 2}, None, overwrite=True)
    assert json.loads((out / "config.json").read_text()) == {"version": 2}
    assert not (out / "stale.txt").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_side_files_are_copied_byte_for_byte_and_weights_and_code_are_not(tmp_path):
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    kept = [
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
        "special_tokens_map.json", "added_tokens.json", "generation_config.json",
        "chat_template.jinja", "additional_chat_templates/tool.jinja", "LICENSE",
    ]  # fmt: skip
    for name in [*kept, "modeling.py", "pytorch_model.bin", "old.safetensors", "config.json"]:
        (source / name).write_bytes(f"\r\n{name}\xff".encode("latin-1"))
    out = write_folder(
        tmp_path / "out", SPECS, some_tensors().items(), {}, source,
        extra_files={"model.py": "code", "raw": b"\0", "note": source / "LICENSE"},
    )  # fmt: skip
    found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert found == {*kept, "model.safetensors", "config.json", "model.py", "raw", "note"}
    for name in kept:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "note").read_bytes() == (source / "LICENSE").read_bytes()


@pytest.mark.parametrize(
    "model_type, rope",
    [
        ("qwen2_moe", {"rope_type": "default", "rope_theta": 7e3}),
        ("qwen3_moe", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 7e3,
                       "original_max_position_embeddings": 16}),
    ],
)  # fmt: skip
def test_transformers_reads_an_exported_folder_to_equal_logits(tmp_path, model_type, rope):
    model = tiny.tiny_model(model_type, rope_parameters=rope)
    folder = tiny.save(model, tmp_path / "in")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.save(str(folder / "tokenizer.json"))
    source = open_checkpoint(folder)
    out = copy_model(source, tmp_path / "out", shard_bytes=30e3)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = tiny.tokens_and_mask()
    before, after = (tiny.torch_logits(m, *batch) for m in (model, loaded.eval()))
    np.testing.assert_array_equal(after, before)
    assert open_checkpoint(out).config == source.config


def test_an_exported_config_states_both_spellings_and_keeps_foreign_keys():
    old = {
        "model_type": "qwen3_moe", "num_experts": 8, "rope_theta": 1e6, "torch_dtype": "bfloat16",
        "rope_scaling": {"type": "linear", "factor": 2.0}, "house_key": [1],
        "quantization_config": {"quant_method": "fp8"},
        "auto_map": {"AutoConfig": "configuration_own.OwnConfig"},  # whose file stays behind
    }  # fmt: skip
    before = json.dumps(old)
    new = portable_config(old)
    assert json.dumps(old) == before
    assert new["num_experts"] == new["num_local_experts"] == 8
    assert new["dtype"] == new["torch_dtype"] == "bfloat16"
    assert new["rope_theta"] == new["rope_parameters"]["rope_theta"] == 1e6
    assert new["rope_scaling"]["rope_type"] == new["rope_parameters"]["rope_type"] == "linear"
    assert new["rope_scaling"]["factor"] == 2.0
    assert new["house_key"] == [1]
    assert "quantization_config" not in new and "auto_map" not in new
    assert portable_config(new) == new
