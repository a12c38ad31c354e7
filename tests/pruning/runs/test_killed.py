"""Every stage, killed and out of disk again and again, ends like one that was not disturbed."""

import errno
import os
import re
import shutil

import numpy as np
import pytest

from pruning.runs import audit, plan_groups
from pruning.scores import states
from tests.support.command import given, read, run
from tests.support.killing import EVENTS, WRITES, Killed, contents, counting

STAGES = {
    "score": ("--gradients", "--expert-details", "--weight-gradients", "--nll-ig", 2),
    "plan": ("--prune-rate", 0.25, 0.5),
    "export": ("--overwrite",),
    "export new": ("--export", "padded-bf16", "ragged-bf16"),
    "compare": ("--rules", "uniform-act", "layer-topk-energy", "--prune-rate", 0.5),
    "audit": ("--experts", 2, "--channels", 2, "--sample-tokens", 64),
    "compress": (),
}
IN_FOLDER = ("plan", "export", "export new", "audit")


@pytest.fixture(scope="module")
def coded(models, texts, tmp_path_factory):
    """A plan whose exports take GPTQ."""
    out = tmp_path_factory.mktemp("coded") / "out"
    options = (*given(texts, out), "--quantizer", "gptq", "--export", "ragged-int4", "padded-int4")
    assert run("--quiet", "score", models / "single", *options) == 0
    assert run("--quiet", "plan", out, "--prune-rate", 0.5) == 0
    return out


def kill(event: str) -> None:
    raise Killed(event)


def fill_disk(event: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_disturbed_stage_ends_like_an_undisturbed_one(
    stage, models, texts, coded, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(states, "MEMORY_STATES", 0)  # all states go to scratch files
    monkeypatch.setattr(plan_groups, "GROUP", 1)
    monkeypatch.setattr(audit, "TOGETHER", 2)

    def go(out) -> int:
        if stage in IN_FOLDER:
            return run("--quiet", stage.split()[0], out, *STAGES[stage])
        words = (given if stage in ("score", "compress") else read)(texts, out)
        return run("--quiet", stage, models / "single", *words, *STAGES[stage])

    calm, out = tmp_path / "calm", tmp_path / "out"
    for folder in (calm, out) if stage in IN_FOLDER else ():
        shutil.copytree(coded, folder)
    with counting(calm, 0, kill) as events:
        assert go(calm) == 0
    random, ended = np.random.default_rng(0), []
    for act in (kill, fill_disk, kill, fill_disk, kill):
        capsys.readouterr()
        # Early in what is left to do, so that each attempt has something to end.
        at = int(random.integers(1, 2 + len(events) // 8))
        with counting(out, at, act, EVENTS if act is kill else WRITES):
            try:
                ended.append(go(out))
            except Killed:
                ended.append(act)
        if act is fill_disk:
            shown = capsys.readouterr().err
            assert ended[-1] == 2 and "No space left on device" in shown, shown
            assert shown.endswith("free some space, then the same command goes on from here\n")
            assert not [path for path in out.rglob("*") if re.search(r"\.(tmp|lock)\b", path.name)]
    assert go(out) == 0
    assert ended == [kill, 2, kill, 2, kill]
    found, wanted = contents(out), contents(calm)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []


def test_a_single_export_that_was_whole_when_the_command_died_is_not_in_its_own_way(
    coded, tmp_path
):
    def go(out) -> int:
        return run("--quiet", "export", out, "--export", "ragged-bf16")

    calm = shutil.copytree(coded, tmp_path / "calm")
    with counting(calm, 0, kill) as events:
        assert go(calm) == 0
    resumed = 0
    for back in range(5):
        out = shutil.copytree(coded, tmp_path / f"out-{back}")
        with counting(out, len(events) - back, kill), pytest.raises(Killed):
            go(out)
        begun, whole = (
            (out / "exports" / name).exists() for name in (".begun.json", "ragged-bf16")
        )
        resumed += begun and whole
        assert go(out) == (2 if whole and not begun else 0), (
            back
        )  # in its last moments it has ended
        found, wanted = contents(out), contents(calm)
        assert found.keys() == wanted.keys()
        assert [name for name in found if found[name] != wanted[name]] == []
        assert go(out) == 2
    assert resumed
