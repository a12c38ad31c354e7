"""One sweep over a text in parts: resumed layer by layer, and judged by prefixes of the text."""

import json
import shutil
import signal

import numpy as np
import pytest

from convert.checkpoint import Checkpoint
from convert.reader import SafetensorsFolder
from pruning.recipe.recipe import CompressionRecipe
from pruning.scores.collect import collect_statistics
from pruning.scores.own import STATISTICS, Statistic
from pruning.scores.parts import rows_of_parts
from pruning.scores.statistics import load_statistics
from pruning.stages.job import open_job
from tests.pruning.stages.test_resume import stopped
from tests.support.command import given, run


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """Layers in the order of their readings."""
    found, true = [], Checkpoint.layer

    def layer(self, index):
        found.append(index)
        return true(self, index)

    monkeypatch.setattr(Checkpoint, "layer", layer)
    return found


def same(out, calm) -> None:
    ours, theirs = ((folder / "statistics.safetensors").read_bytes() for folder in (out, calm))
    assert ours == theirs
    ours, theirs = (json.loads((f / "statistics.json").read_text()) for f in (out, calm))
    assert ours == theirs
    names = {"recipe.yaml", "model.json", "statistics.json", "statistics.safetensors"}
    assert {path.name for path in out.iterdir()} == names


@pytest.fixture(scope="module")
def calm(models, texts, tmp_path_factory):
    """Folders of runs that nothing disturbed, by flags."""
    found = {}

    def of(*flags):
        if flags not in found:
            out = tmp_path_factory.mktemp("calm") / "out"
            assert run("--quiet", "score", models / "single", *given(texts, out), *flags) == 0
            found[flags] = out
        return found[flags]

    return of


DETAILS, GRADIENTS = ("--expert-details",), ("--gradients",)


# Of two layers: up, up, and with gradients the loss, down, down.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "flags", "left"),
    [
        (1, DETAILS, [1]),
        (1, GRADIENTS, [1, 1, 0]),
        (2, GRADIENTS, [1, 0]),
        (3, GRADIENTS, [1, 0]),
        (4, GRADIENTS, [0]),
    ],
)
def test_a_killed_sweep_goes_on_at_its_layer_and_ends_the_same(
    models, texts, tmp_path, calm, read, step, flags, left
):
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    arguments = ("score", models / "single", *given(texts, out), *flags, "--scratch", scratch)
    killed = stopped(f"scoring/step-{step:05d}.safetensors", signal.SIGKILL, "--quiet", *arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    steps = [path.name for path in sorted((out / "scoring").glob("step-?????.safetensors"))]
    assert steps == [f"step-{number:05d}.safetensors" for number in range(step)]
    (states,) = scratch.iterdir()
    wanted = calm(*flags)
    read.clear()
    assert run("--quiet", *arguments) == 0
    assert read == left
    same(out, wanted)
    assert not states.exists()


def test_progress_of_another_model_or_text_is_not_gone_on_with(models, texts, tmp_path, calm, read):
    model, text, out = tmp_path / "model", tmp_path / "text", tmp_path / "out"
    shutil.copytree(models / "other", model)
    text.mkdir()
    good = (texts / "good.txt").read_text()
    (text / "good.txt").write_text(good.replace("quick", "quiet"))  # as many tokens
    arguments = ("--quiet", "score", model, *given(text, out))

    def kill() -> None:
        killed = stopped("scoring/step-00001.safetensors", signal.SIGKILL, *arguments)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert (out / "scoring" / "step-00000.safetensors").exists()

    kill()
    (text / "good.txt").write_text(good)
    kill()
    shutil.copy(models / "single" / "model.safetensors", model)
    read.clear()
    assert run(*arguments) == 0
    assert read == [0, 1] and not [*out.glob("scoring*")]
    assert (out / "statistics.safetensors").read_bytes() == (
        calm() / "statistics.safetensors"
    ).read_bytes()


def test_damaged_progress_is_named(models, texts, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("--quiet", "score", models / "single", *given(texts, out))
    killed = stopped("statistics.json", signal.SIGKILL, *arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    file = out / "scoring" / "step-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert run(*arguments) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert f"{file} cannot be read" in shown and f"remove {file.parent} and score again" in shown
    shutil.rmtree(file.parent)
    assert run(*arguments) == 0


def test_overwriting_an_interrupted_sweep_with_other_options_leaves_nothing_of_it(
    models, texts, tmp_path, calm
):
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    arguments = ("--quiet", "score", models / "single", *given(texts, out))
    killed = stopped("scoring/step-00003.safetensors", signal.SIGKILL, *arguments, *GRADIENTS,
                     "--scratch", scratch)  # fmt: skip
    assert killed.returncode == -signal.SIGKILL and len([*scratch.iterdir()]) == 1
    assert run(*arguments) == 2  # other options
    assert run(*arguments, "--overwrite") == 0
    same(out, calm())
    assert not [*scratch.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "layers"),
    [(DETAILS, [0, 1]), (GRADIENTS, [0, 1, 1, 0])],
    ids=["details", "gradients"],
)
@pytest.mark.parametrize("parts", [4, 16])
def test_weights_are_read_once_for_each_way_whatever_the_parts(
    models, texts, tmp_path, monkeypatch, read, flags, layers, parts
):
    counted, true = [], SafetensorsFolder.read_part

    def part(self, name, first, shape):
        found = true(self, name, first, shape)
        counted.append(found.nbytes)
        return found

    monkeypatch.setattr(SafetensorsFolder, "read_part", part)
    options = (*flags, "--window", 16, *(("--until-stable", 1) if parts == 16 else ()))
    out = tmp_path / "out"
    assert run("--quiet", "score", models / "single", *given(texts, out), *options) == 0
    assert read == layers
    whole = sum(file.stat().st_size for file in (models / "single").glob("*.safetensors"))
    assert sum(counted) <= 1.3 * whole * len(layers) / 2
    curve = json.loads((out / "statistics.json").read_text())["stability"]["tokens"]
    assert len(curve) == parts or (parts == 16 and len(curve) > 4)


def test_statistics_of_a_stable_prefix_are_those_of_its_windows(models, texts, tmp_path):
    out = tmp_path / "out"
    flags = (*DETAILS, *GRADIENTS, "--window", 16, "--until-stable", 0.05)
    assert run("--quiet", "score", models / "single", *given(texts, out), *flags) == 0
    found, notes = load_statistics(out / "statistics.safetensors")
    assert len(notes["stability"]["tokens"]) == 2
    job = open_job(
        CompressionRecipe(model=str(models / "single"), output=str(tmp_path / "other"), window=16,
                          calibration=(str(texts / "good.txt"),), batch=4, planner="fair")
    )  # fmt: skip
    text = job.calibration
    parts = rows_of_parts(len(text.tokens), True)[:2]
    rows = np.concatenate(parts)
    assert len(rows) < len(text.tokens) / 4
    how = {"gradients": True, "expert_details": True, "batch": max(map(len, parts))}
    whole = collect_statistics(job.base, text.tokens[rows], text.valid[rows], **how)
    # Batches of a part are batches of the whole, but of a model in 16 bits or in its own.
    assert found.total_tokens == whole.total_tokens == notes["stability"]["tokens"][-1]
    for name, wanted in whole.arrays().items():
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(
            found.arrays()[name], wanted, rtol=1e-9, atol=1e-9 * scale, err_msg=name
        )


def test_parts_add_up_to_one_sweep_and_say_how_stable_the_plan_is(models, texts, tmp_path):
    out = tmp_path / "out"
    flags = ("--expert-details", "--prune-rate", 0.5)
    assert run("--quiet", "score", models / "single", *given(texts, out), *flags) == 0
    found, notes = load_statistics(out / "statistics.safetensors")
    job = open_job(
        CompressionRecipe(model=str(models / "single"), output=str(tmp_path / "other"),
                          calibration=(str(texts / "good.txt"),), batch=4, planner="fair")
    )  # fmt: skip
    whole = collect_statistics(
        job.base, job.calibration.tokens, job.calibration.valid, expert_details=True, batch=4
    )
    for name in ("hidden_square", "phi", "tokens", "output_gram", "wanda_up"):
        # float32 sums inside a batch, other batches
        np.testing.assert_allclose(
            getattr(found, name), getattr(whole, name), rtol=1e-4, atol=1e-5, err_msg=name
        )
    stability = notes["stability"]
    assert stability["tokens"][-1] == job.calibration.total
    assert stability["jaccard"][0] is None and len(stability["jaccard"]) >= 4
    assert all(0 < value <= 1 for value in stability["jaccard"][1:])
    assert 0 < stability["halves"] < 1


def test_a_part_of_few_windows_is_not_padded_to_a_whole_batch(models, texts, tmp_path, monkeypatch):
    work = {}
    for batch in (2, 8):

        def seen(rows, batch=batch):
            work[batch] = rows.weight.shape[0]
            return rows.weight

        monkeypatch.setitem(STATISTICS, "seen", Statistic(seen, axes="LE"))
        out = tmp_path / str(batch)
        flags = ("--max-tokens", 6 * 64, "--quiet", "--batch", batch)
        assert run("score", models / "single", *given(texts, out), *flags) == 0
    assert work[8] == work[2]  # four parts of one or two windows


def test_statistics_are_of_no_more_text_than_makes_the_kept_set_stable(
    models, texts, tmp_path, capsys
):
    out = tmp_path / "out"
    arguments = ("score", models / "single", *given(texts, out), "--until-stable", 0.05)
    assert run(*arguments) == 0
    notes = json.loads((out / "statistics.json").read_text())
    assert len(notes["stability"]["tokens"]) == 2
    assert notes["stability"]["tokens"][-1] < notes["tokens"]
    assert "kept set changed by" in capsys.readouterr().err
    written = (out / "statistics.safetensors").stat().st_mtime_ns
    assert run(*arguments) == 0  # found again although it used less than the whole text
    assert (out / "statistics.safetensors").stat().st_mtime_ns == written


def test_gradient_sums_of_parts_add_up_to_those_of_one_sweep(models, texts, tmp_path):
    out = tmp_path / "out"
    assert run("--quiet", "score", models / "single", *given(texts, out), "--gradients") == 0
    found, _ = load_statistics(out / "statistics.safetensors")
    job = open_job(
        CompressionRecipe(model=str(models / "single"), output=str(tmp_path / "other"),
                          calibration=(str(texts / "good.txt"),), batch=4, planner="fair")
    )  # fmt: skip
    text = job.calibration.tokens, job.calibration.valid
    whole = collect_statistics(job.base, *text, gradients=True, batch=4)
    assert whole.groups == found.groups == {"gradients"}
    for name, wanted in whole.arrays().items():
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(
            found.arrays()[name], wanted, rtol=1e-4, atol=1e-5 * scale, err_msg=name
        )
