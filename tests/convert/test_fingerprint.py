"""A model is identified by all its weights and its configuration, however they are stored."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import SafetensorsFolder, open_checkpoint
from convert import fingerprint as fingerprints
from convert.fingerprint import WeightsHash
from tests.support import tiny
from tests.support.command import change_config


def fingerprint(folder) -> str:
    return open_checkpoint(folder).fingerprint


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 16}
    return tiny.save(tiny.tiny_model("qwen2_moe", **sizes), tmp_path_factory.mktemp("m") / "model")


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "model")


def test_one_changed_byte_of_any_tensor_changes_it(folder):
    file, first = folder / "model.safetensors", fingerprint(folder)
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    seen, spans = {first}, SafetensorsFolder(folder)._specs.values()
    for spec in spans:
        for place in {spec.start, (spec.start + spec.stop) // 2, spec.stop - 1}:
            assert place >= start
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            seen.add(fingerprint(folder))
    assert len(seen) == 1 + sum(len({s.start, (s.start + s.stop) // 2, s.stop - 1}) for s in spans)
    file.write_bytes(content)
    assert fingerprint(folder) == first


def test_spaces_shards_versions_and_names_of_folders_do_not(models, tmp_path):
    first = fingerprint(models / "single")
    assert len(list((models / "sharded").glob("*.safetensors"))) > 1
    assert fingerprint(models / "sharded") == first != fingerprint(models / "other")
    other = shutil.copytree(models / "sharded", tmp_path / "renamed")
    config = json.loads((other / "config.json").read_text())
    config |= {"transformers_version": "9.9", "_name_or_path": "elsewhere"}
    (other / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert fingerprint(other) == first
    change_config(other, norm_topk_prob=not config["norm_topk_prob"])
    assert fingerprint(other) != first


@pytest.mark.parametrize(
    "other",
    [
        {"b": np.arange(6, dtype=np.float32).reshape(2, 3)},
        {"a": np.arange(6, dtype=np.float32).reshape(3, 2)},
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3).view(np.int32)},
        {"a": np.arange(3, dtype=np.float32), "b": np.arange(3, 6, dtype=np.float32)},
    ],
)
def test_names_shapes_and_dtypes_count(tmp_path, other):
    found = []
    for name, tensors in (
        ("one", {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}),
        ("two", other),
    ):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        found.append(WeightsHash(SafetensorsFolder(tmp_path / name)).finish())
    assert found[0] != found[1]


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss"])
def test_checking_the_weights_gives_the_same_without_a_second_reading(
    family, tmp_path, monkeypatch
):
    folder = tiny.save(tiny.tiny_model(family), tmp_path / "model")
    monkeypatch.setattr(fingerprints, "CHUNK", 64)
    alone = fingerprint(folder)
    monkeypatch.undo()
    base, read = open_checkpoint(folder), []
    original = SafetensorsFolder.read_part

    def counting(self, name, first, shape):
        read.append(name)
        return original(self, name, first, shape)

    monkeypatch.setattr(SafetensorsFolder, "read_part", counting)
    for view in base._views.values():
        view.read()
    needed = sorted(read)
    read.clear()
    base.check_finite()
    assert sorted(read) == needed
    assert base.fingerprint == alone and sorted(read) == needed


def test_tensors_that_no_check_reads_count_too(tmp_path):
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 16}
    folder = tiny.save(tiny.tiny_model("qwen2_moe", **sizes), tmp_path / "model")
    tensors = SafetensorsFolder(folder)
    weights, whole = WeightsHash(tensors), WeightsHash(tensors).finish()
    name = max(tensors.names, key=lambda name: np.prod(tensors.spec(name)[1]))
    rows, columns = tensors.spec(name)[1]
    with weights.watching():  # the end first, then the start twice
        tensors.read_part(name, columns, (rows - 1, columns))
        tensors.read_part(name, 0, (1, columns))
        tensors.read_part(name, 0, (1, columns))
    done = []
    assert weights.finish(lambda *bytes_: done.append(bytes_)) == whole
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert done[-1][0] == done[-1][1] < size and len(done) == len(tensors.names)


def test_a_write_leaves_a_trace_even_where_time_and_size_are_put_back(folder):
    file = folder / "model.safetensors"
    before, told = open_checkpoint(folder).tensors.stamps, file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with open(file, "r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert file.stat().st_mtime_ns == told.st_mtime_ns
    assert open_checkpoint(folder).tensors.stamps != before
