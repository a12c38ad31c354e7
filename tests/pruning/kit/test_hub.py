"""Models by their names on the Hugging Face hub: in its cache, and fetched into it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from pruning import CompressionRecipe, InputError, estimate, evaluate
from pruning.demo import DEMO, model_folder
from pruning.kit.hub import pinned
from tests.support.command import given, refused, run
from tests.support.hub import COMMIT, NAME, OLDER, cached, hub


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and an empty folder to work in."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def test_a_name_a_revision_and_the_root_itself_are_found(models, cache):
    root = cached(models / "single", cache)
    cached(models / "other", cache, commit=OLDER, ref="refs/pr/1".rpartition("/")[2])
    (root / "refs" / "v1.0").write_text(f"{OLDER}\n")
    new, old = root / "snapshots" / COMMIT, root / "snapshots" / OLDER
    for name in (NAME, f"{NAME}@main", f"{NAME}@{COMMIT}", root, str(root), f"{root}@main"):
        assert model_folder(name) == new
    for name in (f"{NAME}@v1.0", f"{NAME}@1", f"{NAME}@{OLDER}", f"{root}@v1.0"):
        assert model_folder(name) == old
    for path in (str(new), new):
        assert model_folder(path) == new
    link = cache.parent / "link"
    link.symlink_to(root)
    assert model_folder(link) == link / "snapshots" / COMMIT


def test_demo_and_paths_are_no_names(models, cache):
    cached(models / "single", cache, "demo/demo")
    assert model_folder("demo") == DEMO / "model"
    for path in ("./demo", "./Owner/x", "../Owner/x", "/Owner/x", "a/b/c", "x", "Owner/", "~/x"):
        assert model_folder(path) == Path(path)
    assert model_folder(Path(NAME)) == Path(NAME)


def test_a_folder_of_that_name_wins_and_that_is_said_once(models, cache, caplog):
    shutil.copytree(models / "single", NAME)
    assert model_folder(NAME) == Path(NAME) and not caplog.records
    cached(models / "other", cache)
    for _ in range(2):
        assert model_folder(NAME) == Path(NAME)
    (said,) = caplog.records
    assert f"{NAME} is taken for the folder here, not for the model" in said.getMessage()
    assert pinned(NAME) == NAME


def test_what_is_not_in_the_cache_is_named_with_its_cure(models, cache, capsys):
    said = refused(capsys, cache.parent, "inspect", NAME)
    assert f"{NAME} is no folder here" in said and "or add --download" in said
    root = cached(models / "single", cache, ref=None)
    for name, revision in ((NAME, "main"), (f"{NAME}@v2", "v2"), (f"{root}@../refs", "../refs")):
        said = refused(capsys, cache.parent, "inspect", name)
        assert f"has no snapshot of revision {revision};" in said
        cure = f"{name.partition('@')[0]}@{COMMIT}"
        assert f"it has {cure}; name one that it has, or add --download" in said
        assert run("inspect", cure) == 0


@pytest.mark.parametrize("damage", ["dangling", "shard", "config", "weights"])
def test_what_an_interrupted_download_lacks_is_named(models, cache, capsys, damage):
    root = cached(models / "sharded", cache)
    snapshot = root / "snapshots" / COMMIT
    shards = sorted(path.name for path in snapshot.glob("*.safetensors"))
    lost = {"dangling": ["tokenizer.json"], "shard": shards[1:], "config": ["config.json"],
            "weights": ["model.safetensors.index.json", *shards]}[damage]  # fmt: skip
    for name in lost:
        blob = (snapshot / name).resolve()
        if damage == "dangling":
            blob.rename(blob.with_suffix(".incomplete"))
        else:
            (snapshot / name).unlink()
    assert run("inspect", NAME) == 2
    said = capsys.readouterr().err
    named = ["model.safetensors"] if damage == "weights" else lost[:5]
    assert f"is not complete; it lacks {', '.join(named)}" in said
    assert ("(1 files came in part)" in said) == (damage == "dangling")
    assert "finish it with --download" in said
    if damage != "config":  # which alone suffices there
        assert model_folder(NAME, weights=False) == snapshot


def test_a_config_alone_suffices_for_an_estimate(models, cache):
    small = cache.parent / "small"
    small.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(models / "sharded" / name, small)
    cached(small, cache)
    recipe = CompressionRecipe(model=NAME, output="out", weights_only=True)
    (found,) = estimate(recipe)
    assert found["parameters"]["total"] and found["scoring_seconds"] is None


def test_a_recipe_keeps_the_commit_and_repeats_after_the_cache_moved_on(
    models, texts, cache, tmp_path
):
    root, out = cached(models / "single", cache), tmp_path / "out"
    assert run("score", NAME, *given(texts, out), "--bits", 16) == 0
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["model"] == f"{NAME}@{COMMIT}"
    cached(models / "other", cache, commit=OLDER)
    assert model_folder(NAME) == root / "snapshots" / OLDER
    assert run("plan", out, "--prune-rate", 0.5) == 0
    assert run("export", out, "--export", "padded-bf16") == 0
    assert run("verify", out) == 0
    assert run("apply", out, f"{NAME}@{COMMIT}", "--output", tmp_path / "b", "--bits", 16) == 0
    stored = yaml.safe_load((tmp_path / "b" / "recipe.yaml").read_text())
    assert stored["model"] == f"{NAME}@{COMMIT}"
    export = out / "exports" / "padded-bf16"
    assert not any(path.is_symlink() for path in export.iterdir())
    tokenizer = (export / "tokenizer.json").read_bytes()
    assert tokenizer == (models / "single" / "tokenizer.json").read_bytes()
    assert f"base_model: {NAME}" in (export / "README.md").read_text()
    loss = [evaluate(name, [texts / "good.txt"])["texts"] for name in (f"{NAME}@main", NAME)]
    assert loss[0] == loss[1]


COMMAND = [sys.executable, "-m", "pruning", "inspect"]
PLACES = {
    "HF_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub",
    "HOME": ".cache/huggingface/hub",
}  # fmt: skip


def environment(**changes) -> dict[str, str]:
    """That of a command on a machine where none of ours is set."""
    dropped = (*PLACES, "HF_HUB_OFFLINE", "HF_ENDPOINT", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    kept |= {"HOME": "/nonexistent", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    return kept | {name: str(value) for name, value in changes.items()}


def test_the_cache_is_where_the_library_has_it(models, tmp_path):
    for number, (variable, below) in enumerate(PLACES.items()):
        place = tmp_path / str(number)
        cached(models / "single", place / below)
        found = subprocess.run(
            [*COMMAND, NAME, "--json", "-"], env=environment(**{variable: place}),
            capture_output=True, check=True, text=True,
        )  # fmt: skip
        folder = Path(json.loads(found.stdout)["folder"])
        assert folder.is_relative_to(place / below) and folder.name == COMMIT


def fetch(tmp_path, *arguments, **changes) -> subprocess.CompletedProcess:
    settings = environment(HF_HOME=tmp_path / "home", **changes)
    return subprocess.run(
        [*COMMAND, *arguments, "--json", "-"], env=settings, capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_download_brings_what_we_read_and_is_found_without_a_network(models, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(models / "sharded", source)
    wanted = {path.name for path in source.iterdir()}
    wanted |= {"tokenization_own.py", "chat_template.jinja", "LICENSE", "README.md"}
    unwanted = {"pytorch_model.bin", "consolidated.safetensors", "model.gguf", "figure.png"}
    for name in (wanted | unwanted) - {path.name for path in source.iterdir()}:
        (source / name).write_text(name)
    with hub(source) as (address, asked):
        found = fetch(tmp_path, NAME, "--download", HF_ENDPOINT=address)
        assert found.returncode == 0, found.stderr
        folder = Path(json.loads(found.stdout)["folder"])
        assert {path.name for path in folder.iterdir()} == wanted
        assert "Fetching" in found.stderr
        for name in wanted:
            assert (folder / name).read_bytes() == (source / name).read_bytes()
        assert not any(name in path for path in asked for name in unwanted)
        before = len(asked)
        assert fetch(tmp_path, NAME, HF_ENDPOINT=address).returncode == 0
        assert len(asked) == before  # without the flag nobody is asked
        (folder / "tokenizer.json").unlink()
        (folder / sorted(wanted & {p.name for p in folder.glob("*.safetensors")})[0]).unlink()
        again = fetch(tmp_path, NAME, "--download", "--quiet", HF_ENDPOINT=address)
        assert again.returncode == 0 and again.stderr == ""
        assert {path.name for path in folder.iterdir()} == wanted
    offline = fetch(tmp_path, f"{NAME}@{COMMIT}", HF_ENDPOINT=address)
    assert offline.returncode == 0


def test_a_download_that_fails_says_why_and_what_helps(models, tmp_path):
    gone = {"A/gated": (403, "GatedRepo"), "A/none": (404, "RepoNotFound"),
            f"{NAME}/revision/v9": (404, "RevisionNotFound"), "A/down": (503, "busy")}  # fmt: skip
    with hub(models / "single", gone) as (address, _):
        for name, words in (
            ("A/gated", f"A/gated is gated; accept its terms at {address}/A/gated and log in"),
            ("A/none", f"A/none is not at {address}/A/none, or not for you; check the spelling"),
            (f"{NAME}@v9", f"has no revision v9; look at {address}/{NAME}/commits/main"),
            ("A/down", f"A/down cannot be had from {address}: "),
            ("A", "A is no name OWNER/NAME; leave out --download"),
            ("demo", "demo is no name OWNER/NAME; leave out --download"),
            (".", ". is a folder here; leave out --download"),
        ):
            found = fetch(tmp_path, name, "--download", HF_ENDPOINT=address)
            assert found.returncode == 2 and "Traceback" not in found.stderr
            assert words in found.stderr
    lost = fetch(tmp_path, NAME, "--download", HF_ENDPOINT=address)
    assert lost.returncode == 2 and "try again when the machine is online" in lost.stderr
    barred = fetch(tmp_path, NAME, "--download", HF_ENDPOINT=address, HF_HUB_OFFLINE=1)
    assert barred.returncode == 2 and "HF_HUB_OFFLINE forbids to look further" in barred.stderr


def test_every_command_with_a_model_takes_the_flag(models, cache, capsys):
    (cache.parent / "work" / "x").mkdir()
    for command in (
        ("compress", "x", "--output", "o"), ("score", "x", "--output", "o"), ("inspect", "x"),
        ("estimate", "x"), ("apply", "p", "x", "--output", "o"), ("eval", "x", "--text", "t"),
        ("audit", "x"), ("compare", "x", "--output", "o"),
    ):  # fmt: skip
        assert "x is a folder here" in refused(capsys, cache.parent, *command, "--download")
    Path("recipe.yaml").write_text("model: x\noutput: o\n")
    said = refused(capsys, cache.parent, "compress", "--recipe", "recipe.yaml", "--download")
    assert "x is a folder here" in said


def test_bad_input_is_an_error_of_python_too(cache):
    with pytest.raises(InputError, match="no model of this name"):
        evaluate("No/model", ["text"])
