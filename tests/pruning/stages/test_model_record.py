"""The weights of a model are read once for its identity, and again only if a file has changed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from convert import fingerprint as fingerprints
from convert.checkpoint import open_checkpoint
from convert.reader import SafetensorsFolder
from pruning.stages.model_record import MODEL
from tests.support import command
from tests.support.command import given, refused, run


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the tensors that were read for their hash alone."""
    names: list[str] = []
    complete = fingerprints.WeightsHash._complete

    def counting(self, name):
        if self._reached[name] == 0:
            names.append(name)
        return complete(self, name)

    monkeypatch.setattr(fingerprints.WeightsHash, "_complete", counting)
    return names


@pytest.fixture
def model(models, tmp_path) -> Path:
    return shutil.copytree(models / "single", tmp_path / "model")


def test_every_command_after_scoring_knows_the_model_without_reading_it(
    model, texts, tmp_path, hashed
):
    out = tmp_path / "out"
    score = ("--quiet", "score", model, *given(texts, out), "--bits", 16)
    assert run(*score) == 0
    told = json.loads((out / MODEL).read_text())
    assert told["files"] == open_checkpoint(model).tensors.stamps
    for arguments in (
        score,
        ("--quiet", "plan", out, "--prune-rate", 0.5),
        ("--quiet", "plan", out, "--prune-rate", 0.25, 0.5),
        ("--quiet", "export", out, "--export", "ragged-bf16"),
        ("--quiet", "export", out / "plans" / "0.5", "--export", "ragged-bf16"),
        ("--quiet", "verify", out),
        ("--quiet", "eval", out, "--prune-rate", 0.5, "--text", texts / "good.txt"),
    ):
        assert run(*arguments) == 0
    assert not hashed
    assert json.loads((out / MODEL).read_text()) == told


def test_a_changed_file_is_read_again_and_its_model_refused(
    models, model, texts, tmp_path, hashed, capsys
):
    out = tmp_path / "out"
    assert run("--quiet", "score", model, *given(texts, out)) == 0
    weights = model / "model.safetensors"
    told = weights.stat()
    weights.write_bytes((models / "other" / "model.safetensors").read_bytes())
    os.utime(weights, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert weights.stat().st_size == told.st_size
    shown = refused(capsys, tmp_path, "plan", out)
    assert "was measured on model" in shown and hashed


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"weights": 3}', '{"weights": "zz", "files": {}}']
)
def test_a_damaged_record_counts_as_none(model, texts, tmp_path, hashed, content):
    out = tmp_path / "out"
    assert run("--quiet", "score", model, *given(texts, out)) == 0
    good = (out / MODEL).read_bytes()
    (out / MODEL).write_text(content)
    assert run("--quiet", "plan", out) == 0
    assert hashed and (out / MODEL).read_bytes() == good


def test_a_moved_model_is_not_scored_again(model, texts, tmp_path):
    out, moved = tmp_path / "out", tmp_path / "elsewhere"
    arguments = (*given(texts, out), "--bits", 16)
    assert run("--quiet", "score", model, *arguments) == 0
    statistics = out / "statistics.safetensors"
    before = statistics.stat().st_mtime_ns
    shutil.copytree(model, moved)
    shutil.rmtree(model)
    assert run("--quiet", "score", moved, *arguments) == 0
    assert statistics.stat().st_mtime_ns == before
    assert yaml.safe_load((out / "recipe.yaml").read_text())["model"] == str(moved)
    assert run("--quiet", "plan", out) == 0


def test_another_model_at_the_place_of_ours_is_refused(models, model, texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--quiet", "score", model, *given(texts, out)) == 0
    shown = refused(capsys, tmp_path, "score", models / "other", *given(texts, out))
    assert "is not an interrupted run of this recipe" in shown
    shutil.rmtree(model)
    shown = refused(capsys, tmp_path, "plan", out)
    assert f"names the model {model}, which is not there" in shown and "give `score`" in shown


def test_inspect_reads_headers_and_the_weights_on_request(models, tmp_path, monkeypatch):
    said = tmp_path / "said.json"
    asked = ("--quiet", "inspect", models / "single", "--json", said)
    assert run(*asked, "--fingerprint") == 0
    expected = open_checkpoint(models / "single").fingerprint
    assert json.loads(said.read_text())["fingerprint"] == expected
    monkeypatch.delattr(SafetensorsFolder, "read_part")
    assert run(*asked) == 0
    assert "fingerprint" not in json.loads(said.read_text())


def test_stored_paths_mean_the_same_from_another_folder(
    model, texts, tmp_path, monkeypatch, capsys
):
    shutil.copytree(texts, tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    flags = ("--output", "out", "--batch", 4, "--bits", 16)
    texts_ = ("--calibration", "texts/good.txt=2.5", "--evaluation", "./texts/good.txt")
    score = ("--quiet", "score", "model", *flags, *texts_)
    assert run(*score) == 0
    stored = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    good = str(tmp_path / "texts" / "good.txt")
    assert stored["model"] == str(model) and stored["output"] == str(tmp_path / "out")
    assert stored["calibration"] == [f"{good}=2.5"] and stored["evaluation"] == [good]
    before = command.snapshot(tmp_path / "out")[tmp_path / "out" / "statistics.safetensors"]
    assert run(*score) == 0  # the same recipe, said in relative paths
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    assert run("--quiet", "plan", "../out", "--prune-rate", 0.5) == 0
    assert run("--quiet", "audit", "../out", "--experts", 1, "--channels", 0) == 0
    after = command.snapshot(tmp_path / "out")[tmp_path / "out" / "statistics.safetensors"]
    assert after == before


def test_the_demo_stays_the_demo(tmp_path):
    out = tmp_path / "out"
    assert run("--quiet", "score", "demo", "--output", out, "--weights-only") == 0
    assert yaml.safe_load((out / "recipe.yaml").read_text())["model"] == "demo"
