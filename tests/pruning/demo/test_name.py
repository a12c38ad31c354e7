"""`demo` is the embedded model, `./demo` and a path are a folder of that name."""

import json
import shutil
from pathlib import Path

import pytest

from pruning import CompressionRecipe, evaluate
from pruning.demo import DEMO, model_folder
from tests.support.command import run


@pytest.fixture
def beside(models, scored, texts, tmp_path, monkeypatch):
    """Work beside a folder named demo, which holds another model and its scores."""
    shutil.copytree(models / "single", tmp_path / "demo")
    shutil.copytree(scored, tmp_path / "demo", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return str(texts / "good.txt")


def test_every_command_tells_them_apart(beside, capsys):
    def told(*arguments) -> dict:
        capsys.readouterr()
        assert run("--quiet", *arguments, "--json", "-") == 0
        return json.loads(capsys.readouterr().out)

    for name, family in (("demo", "qwen3_moe"), ("./demo", "qwen2_moe")):
        assert told("inspect", name)["family"] == family
    names = ("demo", "./demo")
    estimates = [told("estimate", name, "--weights-only", "--no-probe") for name in names]
    assert estimates[0] != estimates[1]
    own = json.loads(Path("demo/config.json").read_text())
    windows = [told("eval", name, "--text", beside)["window"] for name in names]
    assert windows == [256, min(2048, own["max_position_embeddings"])] and len(set(windows)) == 2


def test_audit_of_demo_takes_no_folder_for_it(beside, capsys):
    audit = ("audit", "demo", "--experts", 1, "--channels", 1, "--sample-tokens", 64)
    assert run(*audit, "--max-tokens", 64, "--window", 32) == 2
    assert "output is missing" in capsys.readouterr().err


def test_python_has_text_for_the_model_and_paths_for_folders(beside):
    assert model_folder("demo") == DEMO / "model"
    for folder in (Path("demo"), "./demo", Path("./demo")):
        assert model_folder(folder) == Path("demo")
        recipe = CompressionRecipe(model=folder, output="o")
        assert model_folder(recipe.model) == Path("demo")
    assert model_folder(CompressionRecipe(model="demo", output="o").model) == DEMO / "model"
    losses = [evaluate(name, [beside])["texts"][beside]["nll"] for name in ("demo", Path("demo"))]
    assert losses[0] != losses[1]
