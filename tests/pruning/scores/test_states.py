"""Scratch files of hidden states: where they lie, what was foreseen, and a disk without room."""

import collections
import errno
import os
import re
import shutil

import numpy as np
import pytest

from pruning import CompressionRecipe, collect_statistics, estimate, weight_gradient_scores
from pruning.scores import states, sweep_log
from pruning.scores.end_to_end import nll_ig
from tests.pruning.scores.test_layer import CONFIG
from tests.support.command import given, refused, run
from tests.support.loud import loud_model, unequal_text

SWEEPS = {
    "gradients": lambda *a, **k: collect_statistics(*a, gradients=True, **k).taylor,
    "weight gradients": weight_gradient_scores,
    "nll-ig": lambda *a, **k: nll_ig(*a, steps=2, **k),
}


@pytest.fixture
def allocated(monkeypatch):
    """Folder and bytes of every scratch file."""
    found, true = [], os.posix_fallocate

    def watch(descriptor, start, size):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        # Freed with the process, however that ends, but for what a killed sweep goes on from.
        assert path.endswith(" (deleted)") or sweep_log.STATES.fullmatch(os.path.basename(path))
        true(descriptor, start, size)
        assert os.fstat(descriptor).st_blocks * 512 >= size
        found.append((os.path.dirname(path), size))

    monkeypatch.setattr(os, "posix_fallocate", watch)
    return found


@pytest.mark.parametrize("sweep", SWEEPS)
def test_states_in_a_scratch_file_give_the_same_scores(sweep, tmp_path, monkeypatch, allocated):
    model, (tokens, valid) = loud_model(CONFIG), unequal_text()
    wanted = SWEEPS[sweep](model, tokens, valid, batch=2)
    assert not allocated
    monkeypatch.setattr(states, "MEMORY_STATES", 0)
    found = SWEEPS[sweep](model, tokens, valid, batch=2, scratch=tmp_path / "new")
    np.testing.assert_array_equal(found, wanted)
    windows = 2 * -(-len(tokens) // 2) * (2 if sweep == "nll-ig" else 1)
    slots = CONFIG.num_layers * 2 + (2 if sweep == "gradients" else 0)
    size = slots * windows * tokens.shape[1] * CONFIG.d_model * 4
    assert allocated == [(str(tmp_path / "new"), size)]
    assert list((tmp_path / "new").iterdir()) == []


FLAGS = {
    "gradients": ("--gradients",),
    "weight gradients": ("--weight-gradients",),
    "nll-ig": ("--nll-ig", 4),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_scratch_files_are_those_that_estimate_foresaw(
    flags, models, texts, tmp_path, monkeypatch, allocated
):
    monkeypatch.setattr(states, "MEMORY_STATES", 0)
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    options = (*given(texts, out), "--window", 64, "--max-tokens", 256, *FLAGS[flags])
    assert run("--quiet", "score", models / "single", *options) == 0
    assert {folder for folder, _ in allocated} == {str(out)}
    name = flags.replace(" ", "_").replace("-", "_")
    recipe = CompressionRecipe(
        model=str(models / "single"), output=str(out), window=64, max_tokens=256, batch=4,
        **{name: 4 if name == "nll_ig" else True},
    )  # fmt: skip
    (found,) = estimate(recipe, probe=False)
    # Of four windows one is held out, which only whole batches of four do not notice.
    taken = found["disk"]["parts"]["scratch files"] * (3 / 4 if flags == "gradients" else 1)
    assert taken == max(size for _, size in allocated)
    assert not [*out.glob("scoring*")]
    # Elsewhere they are no part of what makes the run: it is finished.
    allocated.clear()
    written = (out / "statistics.safetensors").stat().st_mtime_ns
    arguments = ("--quiet", "score", models / "single", *options, "--scratch", scratch)
    assert run(*arguments) == 0
    assert (out / "statistics.safetensors").stat().st_mtime_ns == written
    assert run(*arguments, "--overwrite", "--seed", 1) == 0
    assert {folder for folder, _ in allocated} == {str(scratch)}
    assert not [*scratch.iterdir()]


def test_a_disk_without_room_for_scratch_is_noticed_before_any_work(
    models, texts, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(states, "MEMORY_STATES", 0)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 1000))
    arguments = ("score", models / "single", *given(texts, tmp_path / "out"), "--window", 64)
    shown = refused(capsys, tmp_path, *arguments, "--weight-gradients")
    # 6 windows in whole batches of 4, before and in the middle of 2 layers, 32 wide, float32
    size = f"scratch files {8 * 64 * 2 * 2 * 32 * 4 / 1e3:.1f} kB"
    assert re.search(rf"out has 1\.0 kB free .*\(statistics \d.* kB, {size}, spare", shown)
    # Four parts of at most two windows, and twice what goes from layer to layer.
    size = f"scratch files {8 * 64 * (2 * 2 + 2) * 32 * 4 / 1e3:.1f} kB"
    elsewhere = refused(capsys, tmp_path, *arguments, "--gradients", "--scratch", "/dev/shm/x")
    assert re.search(rf"/dev/shm/x has 1\.0 kB free .*\({size}, spare", elsewhere)


def test_a_disk_that_fills_up_says_which_file_and_how_large(
    models, texts, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(states, "MEMORY_STATES", 0)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    arguments = ("--quiet", "score", models / "single", *given(texts, out), "--gradients")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert run(*arguments) == 2
    shown = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert re.search(
        rf"{out}/a scratch file of [\d,]+ bytes cannot be written: No space left on device, [\d,]+ "
        "bytes are free; free some space, then the same command goes on from here",
        shown,
    )
    assert "Traceback" not in shown
    assert sorted(path.name for path in out.iterdir()) == ["recipe.yaml"]
    assert run(*arguments) == 0
