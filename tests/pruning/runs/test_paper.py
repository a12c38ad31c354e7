"""The paper's tables by one command: rows are those of `compare` and of `recover`'s exports."""

import csv
import io
import json
import math
from pathlib import Path

import pytest

from pruning.budget.plan import PruningPlan
from pruning.report.comparison import Comparison
from tests.support.command import read, refused, run

RULES = ("auto", "experts-reap", "experts-usage")
MORE = ("--prune-rate", 0.5, "--rules", *RULES, "--bits", 4, "--window", 32,
        "--recover", "router", "--recover-tokens", 128, "--figure-blocks", 32)  # fmt: skip


def words(models: Path, texts: Path, out: Path, *more) -> tuple:
    measured = ("--evaluation", texts / "good.txt", "--evaluation-tokens", 64)
    return ("--quiet", "paper", models / "single", *read(texts, out), *measured, *MORE, *more)


@pytest.fixture(scope="module")
def made(models, texts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("paper") / "out"
    assert run(*words(models, texts, out)) == 0
    return out


@pytest.mark.slow
def test_rows_are_those_of_the_comparison_and_of_the_recovered_exports(made, texts):
    found = Comparison.load(made / "compare/compare.json")
    measured = {(one.rule, one.repair): one.quality["good"]["nll"] for one in found.results}
    best = min(RULES[1:], key=lambda name: measured[name, ""])
    rows = csv.DictReader(io.StringIO((made / "paper.csv").read_text()))
    shown = {(row["rule"], row["repair"], row["recovery"]): float(row["value"]) for row in rows}
    told = "router on 128 tokens at most"
    assert shown == {
        **{(*name, ""): measured[name] for name in
           (("unpruned", ""), ("auto", "layer"), ("auto", ""), (best, ""))},
        **{name: shown[name] for name in (("auto", "layer", told), (best, "", told))},
    }  # fmt: skip
    # Another command measures the exports on the same windows.
    text = ("--text", texts / "good.txt", "--evaluation-tokens", 80, "--window", 32)
    for rule, repair in (("auto", "layer"), (best, "")):
        export, numbers = made / f"recovered/{rule}-0.5/exports/ragged-int4", made.parent / "e.json"
        assert run("--quiet", "eval", export, *text, "--json", numbers) == 0
        quality = json.loads(numbers.read_text())["texts"]
        (quality,) = quality.values()
        assert quality["tokens"] == found.dense["good"]["tokens"] == 79
        assert math.isclose(quality["nll"], shown[rule, repair, told], rel_tol=1e-6)


@pytest.mark.slow
def test_what_planner_auto_takes_is_planned_repaired_and_trained_as_it_is(made):
    plan = PruningPlan.load(made / "students/auto-0.5")
    choice = plan.provenance["choice"]
    (taken,) = (one["rule"] for one in choice["candidates"] if one["taken"])
    (about,) = {one.about for one in Comparison.load(made / "compare/compare.json").results
                if one.rule == "auto"}  # fmt: skip
    assert about == f"{taken}, which loses least on calibration windows kept out"
    assert choice["repaired"] and (made / "students/auto-0.5/repair/repair.json").is_file()
    report = json.loads((made / "recovered/auto-0.5/recover.json").read_text())
    assert report["student"]["plan"] == plan.content_hash and report["student"]["repair"]


@pytest.mark.slow
def test_the_same_command_again_writes_the_same_bytes(models, texts, made, capsys):
    pages = ("paper.md", "paper.csv", "paper.html", "paper.yaml", "recovered/compare.json")
    before = {name: (made / name).read_bytes() for name in pages}
    (made / "paper.html").unlink()  # killed before it was written
    (made / "recovered/compare.json").unlink()  # what is trained is measured again
    assert run(*words(models, texts, made)) == 0
    assert {name: (made / name).read_bytes() for name in pages} == before
    shown = refused(capsys, made, *words(models, texts, made, "--recover-tokens", 96))
    assert "holds tables of another recover_tokens; name another folder or add" in shown


@pytest.mark.parametrize(
    ("more", "words_"),
    [
        (("--recover", "none"), "recover='none' trains nothing; leave one of the two out"),
        (("--recover-text", "missing.txt"), "missing.txt"),
        (("--figure-blocks", 0), "figure_blocks=0 must be at least 1"),
        (("--rules", "fair-nothing"), "fair-nothing"),
        (("--bits", 5), "'5' is unknown; choose among 4, 8, 16"),
        (("--max-tokens", 64), "fewer than 4; give more text, or a shorter --window"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(models, texts, tmp_path, capsys, more, words_):
    out = tmp_path / "out"
    if more[0] == "--bits":
        with pytest.raises(SystemExit):
            run(*words(models, texts, out, *more))
        assert words_ in capsys.readouterr().err
    else:
        assert words_ in refused(capsys, tmp_path, *words(models, texts, out, *more))


def test_training_on_the_windows_that_are_measured_on_is_refused(models, texts, tmp_path, capsys):
    given = ("paper", models / "single", *read(texts, tmp_path / "out"), "--window", 32)
    assert "name other text to measure on with --evaluation" in refused(capsys, tmp_path, *given)


def test_a_folder_of_something_else_is_left_alone(models, texts, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    for more in ((), ("--overwrite",)):
        shown = refused(capsys, tmp_path, *words(models, texts, tmp_path, *more))
        assert "is no folder of `paper` (it has no paper.yaml)" in shown


@pytest.mark.parametrize("more", [("--draws", 2), ("--target-bytes", "1MB")])
def test_a_chosen_rule_is_compared_at_rates_of_one_text_alone(
    models, texts, tmp_path, capsys, more
):
    given = ("compare", models / "single", *read(texts, tmp_path / "out"), "--rules", "auto", *more)
    assert "rule 'auto' is chosen" in refused(capsys, tmp_path, *given)
