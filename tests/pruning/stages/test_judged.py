"""What tasks showed of exports: kept as long as the exports are those that were measured."""

import json

import pytest

from moe_jax.errors import InputError
from pruning.measure.paired import Paired
from pruning.stages.judged import COMPARED, RESULTS, compared, keep_compared
from tests.pruning.report.test_compression import report
from tests.support.command import run


def row(task: str, difference: float = -0.25) -> Paired:
    return Paired(task, "acc,none", 5, 40, 0.75, 0.75 + difference, 0.07, 0.08, difference, 0.09,
                  gained=2, lost=12, p=0.01)  # fmt: skip


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "exports" / "ragged-int4"
    folder.mkdir(parents=True)
    (folder / "provenance.yaml").write_text("plan: one\n")
    (tmp_path / RESULTS).mkdir()
    return folder


def tasks(run) -> list[tuple[str, float]]:
    return [(one["task"], one["difference"]) for one in compared(run).get("ragged-int4", [])]


def test_rows_of_other_tasks_stay_and_those_of_the_same_are_replaced(export, tmp_path):
    assert compared(tmp_path) == {}
    keep_compared(tmp_path / RESULTS, export, [row("a"), row("b")])
    assert compared(tmp_path)["ragged-int4"][0] == row("a").to_dict()
    keep_compared(tmp_path / RESULTS, export, [row("b", 0.0), row("c")])
    assert tasks(tmp_path) == [("a", -0.25), ("b", 0.0), ("c", -0.25)]


def test_rows_of_an_export_that_is_gone_or_made_anew_are_not_shown(export, tmp_path):
    keep_compared(tmp_path / RESULTS, export, [row("a")])
    (export / "provenance.yaml").write_text("plan: two\n")
    assert tasks(tmp_path) == []
    keep_compared(tmp_path / RESULTS, export, [row("b")])
    assert tasks(tmp_path) == [("b", -0.25)]
    (export / "provenance.yaml").unlink()
    assert tasks(tmp_path) == []


@pytest.mark.parametrize(
    "change", [{"rows": 1}, {"rows": [{"task": "a"}]}, {"rows": [{**row("a").to_dict(), "p": "x"}]}]
)
def test_a_damaged_file_is_named(export, tmp_path, change):
    path = tmp_path / RESULTS / COMPARED
    path.write_text(json.dumps({"ragged-int4": {"made": "plan: one\n", **change}}))
    with pytest.raises(InputError, match=r"compared\.json is damaged; remove it"):
        compared(tmp_path)


def test_the_report_shows_the_tasks_that_were_measured_since(export, tmp_path):
    report().save(tmp_path)
    assert run("--quiet", "report", tmp_path) == 0
    page = (tmp_path / "report.html").read_text()
    assert "What it can still do" not in page
    keep_compared(tmp_path / RESULTS, export, [row("arc_easy"), row("arc_hard", 0.01)])
    assert run("--quiet", "report", tmp_path) == 0
    page = (tmp_path / "report.html").read_text()
    assert "What it can still do" in page and "ragged-int4 beside the dense model" in page
    for cell in ("arc_easy", "0.7500 ± 0.0700", "-0.2500 ± 0.0900", "14 (+2 -12)", "0.01", ">yes<",
                 "within noise"):  # fmt: skip
        assert cell in page, cell


def test_the_card_of_the_export_shows_them_once_and_stays_as_it_is_otherwise(export, tmp_path):
    card = export / "README.md"
    before, after = "# Name\n\n## Quality\n\nnone\n\n", "## What was compared\n\nbits\n"
    card.write_text(before + after)
    keep_compared(tmp_path / RESULTS, export, [row("a")])
    keep_compared(tmp_path / RESULTS, export, [row("b", 0.0)])
    found = card.read_text()
    assert found.startswith(before) and found.endswith(after)
    section = found.removeprefix(before).removesuffix(after)
    assert section.count("## ") == 1 and section.startswith("## Tasks\n\n| task | metric |")
    assert "| a | acc | 5 | 40 | 0.7500 ± 0.0700 | 0.5000 ± 0.0800 | -0.2500 ± 0.0900 |" in section
    assert "| b | acc | 5 | 40 |" in section and section.endswith("chance.\n\n")
