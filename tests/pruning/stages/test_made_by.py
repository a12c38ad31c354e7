"""Which plan and repair made an export, from files made up: nothing is exported."""

from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from moe_jax.errors import InputError
from pruning.budget.plan import PruningPlan
from pruning.budget.record import tool_version
from pruning.shrink.repair_model import SUMMARY
from pruning.stages.made_by import (
    MADE_BY,
    OLDER,
    is_repaired,
    provenance_text,
    repair_hash,
    require_current,
    say_stale,
    stale_exports,
)
from tests.support.told import Told

PLAN = PruningPlan(np.array([[[True, False]]]), (0,))
OTHER = PruningPlan(np.array([[[False, True]]]), (0,))
BASE: Any = SimpleNamespace(fingerprint="abc")


@pytest.fixture(params=["a/out", "out"])
def folder(tmp_path, request):
    """An output folder with a plan and a repair, in a folder that sorts before "exports" or not."""
    out = tmp_path / request.param
    (out / "repair").mkdir(parents=True)
    PLAN.save(out)
    (out / "repair" / SUMMARY).write_text("{}")
    return out


def export(folder, name: str, text: str | bytes):
    path = folder / "exports" / name
    path.mkdir(parents=True)
    (path / MADE_BY).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_an_export_says_its_plan_its_model_and_its_repair(folder):
    told = {"plan": PLAN.content_hash, "model": "abc", "moe-jax": tool_version()}
    assert yaml.safe_load(provenance_text(BASE, PLAN)) == told
    digest = sha256(b"{}").hexdigest()
    assert repair_hash(folder / "repair") == digest and repair_hash(folder) is None
    text = provenance_text(BASE, PLAN, folder / "repair")
    assert yaml.safe_load(text) == {**told, "repair": digest}
    assert list(yaml.safe_load(text)) == ["plan", "model", "repair", "moe-jax"]


def test_exports_of_another_plan_or_repair_are_old(folder):
    plain, repaired = provenance_text(BASE, PLAN), provenance_text(BASE, PLAN, folder / "repair")
    export(folder, "ragged-bf16", plain)
    ours = export(folder, "ragged-int4", repaired)
    old = export(folder, "padded-bf16", provenance_text(BASE, OTHER))
    assert stale_exports(folder, PLAN) == [old]
    require_current(folder / "elsewhere", PLAN)
    with pytest.raises(InputError) as error:
        require_current(folder, PLAN)
    assert str(error.value) == f"{old}: {OLDER}"
    assert is_repaired(ours) and not is_repaired(old) and not is_repaired(folder)
    (folder / "repair" / SUMMARY).write_text("{ }")
    assert set(stale_exports(folder, PLAN)) == {old, ours}
    (folder / "repair" / SUMMARY).unlink()
    assert set(stale_exports(folder, PLAN)) == {old, ours}
    assert len(stale_exports(folder, OTHER)) == 2
    with pytest.raises(InputError, match=r"older plan.*\n.*older plan"):
        require_current(folder, PLAN)


@pytest.mark.parametrize(
    "text", ["", "[]", "plan: 3\nrepair: [a]", "a: b: c", b"\xff\xfe\x00", "[" * 600, "repair: "]
)
def test_an_export_that_says_nothing_of_ours_is_not_judged(folder, text):
    path = export(folder, "ragged-bf16", text)
    assert stale_exports(folder, PLAN) == [] and not is_repaired(path)


def test_it_is_said_of_the_export_that_is_asked_for_or_of_all(folder):
    current = export(folder, "ragged-bf16", provenance_text(BASE, PLAN))
    old = [export(folder, name, provenance_text(BASE, OTHER))
           for name in ("padded-bf16", "padded-int4")]  # fmt: skip

    def said(place) -> list[str]:
        steps: Any = Told()
        say_stale(place, steps)
        return steps.lines

    lines = [f"{path}: {OLDER}" for path in old]
    assert sorted(said(folder)) == lines
    assert [said(path) for path in old] == [[line] for line in lines]
    assert said(current) == said(folder / "exports") == said(folder.parent) == []
