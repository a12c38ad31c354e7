"""Sets of calibration text: how they are named, mixed, scored alone and measured on all."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from moe_jax.errors import InputError
from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe
from pruning.runs import compare as comparing
from pruning.runs import plan_groups
from pruning.runs.calibration_sets import mixed, parse_sets
from pruning.runs.compared import task_plan
from pruning.runs.task import Task
from pruning.scores.statistics import load_statistics
from pruning.stages.job import open_job
from pruning.text.calibration import TokenBatch
from tests.support import command

WINDOW = 32


def test_sets_are_named_files():
    assert parse_sets(["web=a.txt,code=b,c.txt", "web=d.jsonl=0.5:field=x"]) == {
        "web": ("a.txt", "d.jsonl=0.5:field=x"), "code": ("b,c.txt",),
    }  # fmt: skip
    assert parse_sets(["a=x", "b.2=y:template='{q}, {a}'"]) == {
        "a": ("x",), "b.2": ("y:template='{q}, {a}'",)
    }  # fmt: skip
    assert parse_sets([]) == {}


@pytest.mark.parametrize(("words", "message"), [
    (["web.txt"], "'web.txt' must be NAME=FILE"), (["web="], "'web=' must be"),
    (["=a.txt,b=c"], "'=a.txt' must be"), (["../x=a,b=c"], "'../x=a' must be"),
    (["web=a.txt", "web=b.txt"], "calibration_sets=web is one set"),
])  # fmt: skip
def test_other_words_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        parse_sets(words)


def batch(count: int, start: int, files: int = 1, counted: bool = False) -> TokenBatch:
    tokens = np.arange(start, start + count * 4, dtype=np.int32).reshape(count, 4)
    sources = tuple({"path": f"{start}-{n}"} for n in range(files))
    return TokenBatch(tokens, tokens % 5 > 0, sources, tokens % 2 > 0 if counted else None,
                      np.arange(count) % files)  # fmt: skip


def test_a_mixture_has_equal_parts_of_all_as_large_as_the_largest():
    one, two = batch(8, 0, files=2), batch(3, 1000, counted=True)
    found = mixed([one, two])
    # Four of eight from the first to the last, and the three there are.
    rows = [(one, row) for row in (0, 2, 5, 7)] + [(two, row) for row in range(3)]
    for name in ("tokens", "valid"):
        wanted = np.array([getattr(text, name)[row] for text, row in rows])
        np.testing.assert_array_equal(getattr(found, name), wanted)
    counted = [text.valid[row] if text is one else text.counted[row] for text, row in rows]
    np.testing.assert_array_equal(found.counted, counted)
    assert found.files.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert found.sources == (
        {"path": "0-0", "windows": 4}, {"path": "0-1", "windows": 4},
        {"path": "1000-0", "windows": 3},
    )  # fmt: skip
    assert mixed([one, batch(8, 100)]).counted is None


@pytest.fixture(scope="module")
def asked(models, texts, tmp_path_factory) -> CompressionRecipe:
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for name, letters in (("one", "abcd "), ("two", "vwxyz 12")):
        (folder / f"{name}.txt").write_text("".join(rng.choice(list(letters), 700)))
    return CompressionRecipe(
        model=str(models / "single"), output=str(folder / "out"), batch=4, block=8, window=WINDOW,
        evaluation=(str(texts / "good.txt"),), evaluation_tokens=60,
    )  # fmt: skip


def sets(asked: CompressionRecipe, **more: str) -> dict[str, tuple[str, ...]]:
    folder = Path(asked.output).parent
    return {"one": (str(folder / "one.txt"),), "two": (str(folder / "two.txt"),)} | {
        name: (file,) for name, file in more.items()
    }


def test_each_set_is_planned_for_alone_and_all_are_measured_on_what_none_has_shown(
    asked, monkeypatch
):
    given = {"calibration_sets": sets(asked), "steps": Steps(quiet=True)}
    found = comparing.compare(asked, [0.5], ["uniform-act"], **given)
    assert [(r.calibration, r.rule) for r in found.results] == [
        (name, "uniform-act") for name in ("", "one", "two")
    ]  # fmt: skip
    assert list(found.dense) == ["one", "two", "good"] and len(found.lines()) == 1
    # Of some 22 windows one of each set is measured on, and shown by no statistics.
    out = Path(asked.output)
    job = open_job(dataclasses.replace(asked, bits=16, planner="fair", repair="none",
                                       calibration=sets(asked)["one"]))  # fmt: skip
    windows = job.calibration.tokens
    assert found.dense["one"]["tokens"] == WINDOW - 1
    plans = {}
    for name in ("", "one", "two"):
        folder = out / "sets" / name if name else out
        statistics, noted = load_statistics(folder / "statistics.safetensors")
        task = Task("uniform-act", 0.5, calibration=name)
        plans[name] = task_plan(job, statistics, noted, task, 512).keep
        if name == "one":
            assert noted["tokens"] == job.calibration.total - WINDOW
            assert noted["sources"][0]["path"].endswith("one.txt")
        if not name:
            assert [source["windows"] for source in noted["sources"]] == [len(windows) // 2] * 2
    for result in found.results:
        own, main = plans[result.calibration], plans[""]
        assert result.overlap == pytest.approx((own & main).sum() / (own | main).sum())
    assert len({r.quality["good"]["nll"] for r in found.results}) == 3
    # What one set gives alone, calibrated on that text and measured on the same.
    assert "By calibration set and text measured on" in (out / "compare.html").read_text()
    before = (out / "compare.json").read_bytes()
    monkeypatch.setattr(plan_groups, "_run_group", None)  # nothing is left to measure
    assert comparing.compare(asked, [0.5], ["uniform-act"], **given) == found
    assert (out / "compare.json").read_bytes() == before


def test_what_cannot_be_compared_is_refused_before_any_work(asked, models, texts, tmp_path, capsys):
    other = dataclasses.replace(asked, output=str(tmp_path / "out"))

    def refused(message, **given):
        with pytest.raises(InputError, match=message):
            comparing.compare(other, [0.5], ["uniform-act"], steps=Steps(quiet=True), **given)
        assert not (tmp_path / "out" / "statistics.json").exists()

    short = sets(asked, short=str(texts / "short.txt"))
    refused("calibration set 'short': .* gives only 63 tokens", calibration_sets=short)
    (tmp_path / "more.txt").write_text("x" * 70)
    more = sets(asked, more=str(tmp_path / "more.txt"))
    refused("calibration set 'more' has 3 windows of 32 tokens", calibration_sets=more)
    named = sets(asked, good=str(texts / "good.txt"))
    refused("good names a calibration set and an evaluation text", calibration_sets=named)
    refused("draws are of one calibration text", calibration_sets=sets(asked), draws=2)
    words = ("compare", models / "single", "--output", tmp_path / "out")
    told = command.refused(capsys, tmp_path, *words, "--calibration-sets", "web=a.txt")
    assert "calibration_sets=web is one set" in told
