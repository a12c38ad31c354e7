"""The paper's tables by one command: rows are those of `compare` and of `recover`'s exports."""

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_jax.errors import InputError
from pruning.budget.plan import PruningPlan
from pruning.recipe.paper_options import PaperOptions
from pruning.recipe.task_options import TaskOptions
from pruning.report.compared import Repaired, Result
from pruning.report.comparison import Comparison
from pruning.report.paper import Method
from pruning.runs import paper_recovery
from pruning.runs.paper_folder import begin
from pruning.runs.paper_recovery import Trainer
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
    plain = {(name, "") for name in ("unpruned", *RULES)}
    assert set(measured) == plain | {("auto", "layer")}  # of the others nothing is repaired
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


def test_another_run_in_the_folder_is_replaced_only_if_asked_and_nothing_else_goes(tmp_path):
    begun = begin(tmp_path, {"model": "a/b", "seed": 1}, overwrite=False)
    assert begun["model"] == "b"
    (tmp_path / "compare").mkdir()
    for name in ("compare/compare.json", "paper.md", "mine.txt"):
        (tmp_path / name).write_text(name)
    before = (tmp_path / "paper.yaml").read_bytes()
    # An unfinished run goes on, with --overwrite too.
    for overwrite in (False, True):
        assert begin(tmp_path, {"model": "a/b", "seed": 1}, overwrite=overwrite) == begun
    assert (tmp_path / "paper.yaml").read_bytes() == before
    with pytest.raises(InputError, match="holds tables of another seed; name another folder or"):
        begin(tmp_path, {"model": "a/b", "seed": 2}, overwrite=False)
    assert (tmp_path / "paper.md").is_file()
    begin(tmp_path, {"model": "a/b", "seed": 2}, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "paper.yaml"}
    (tmp_path / "paper.html").write_text("finished")
    assert begin(tmp_path, {"model": "a/b", "seed": 2}, overwrite=False)
    assert (tmp_path / "paper.html").is_file()
    begin(tmp_path, {"model": "a/b", "seed": 2}, overwrite=True)
    assert not (tmp_path / "paper.html").exists()


@pytest.fixture
def trainer(monkeypatch, tmp_path):
    """A trainer that trains nothing, and the plans that it was to train."""
    recipe = SimpleNamespace(first_tokens=True, batch=2, dtype="float32", scratch=None)
    job: Any = SimpleNamespace(recipe=recipe, output=tmp_path / "compare", base="base")
    judged, made = TaskOptions(tasks=("t",)), []
    steps: Any = None
    (tmp_path / "recovered").mkdir()
    found = Trainer(job, tmp_path, PaperOptions(), (16, 4), judged, {"t": "loaded"}, steps)

    def trained(self, group, plan, references):
        made.append((group[0].name, [one.bits for one in group], plan))
        quality = {"x": {"nll": 0.5, "tokens": 3, "kl": 0.1, "top1": 0.9}}
        tasks = [{"of": group[0].rate}] if self.judged else []
        return [dataclasses.replace(one, quality=quality, tasks=tasks)
                for one in group]  # fmt: skip

    monkeypatch.setattr(Trainer, "_trained", trained)
    return found, made


@pytest.mark.parametrize("scratch", [None, "other"])
def test_predictions_are_charged_to_the_disk_that_they_lie_on(trainer, monkeypatch, scratch):
    found, _ = trainer
    (found.output / "recovered").rmdir()
    vars(found.job.recipe).update(scratch=scratch, evaluation=("text",), model="m")
    found.job.base, found.job.codec = SimpleNamespace(about="about"), "codec"
    options = SimpleNamespace(window=8, tokens=9, train="full", mode="model")
    wanted = SimpleNamespace(filled=lambda: options)
    monkeypatch.setattr(Trainer, "recover_options", lambda self, output: wanted)
    text = SimpleNamespace(total=4)
    trained = {"full": {"memory_bytes": {"model": 0}, "checkpoint_bytes": 5}}
    costs = {"trained": trained, "predictions_bytes": 7}
    charged: list[tuple[Path, dict[str, int]]] = []
    known = {
        "training_text": lambda *_: (text, text), "recovery_costs": lambda *_: costs,
        "dense_bytes": lambda _: 16, "require_space": lambda *asked: charged.append(asked),
    }  # fmt: skip
    for name, function in known.items():
        monkeypatch.setattr(paper_recovery, name, function)
    found.check(2)
    own = {"recovered exports, at most": 2 * (16 + 4), "checkpoints": 5}
    if scratch is None:
        assert charged == [(found.output, own | {"predictions": 7})]
    else:
        assert charged == [(Path("other"), {"predictions": 7}), (found.output, own)]


def pruned(*results: Result, asked: tuple = ()) -> Comparison:
    dense = {"x": {"nll": 0.0, "tokens": 3, "kl": None, "top1": None}}
    quality = {"x": {"nll": 1.0, "tokens": 3, "kl": 0.1, "top1": 0.9}}
    own = (dataclasses.replace(one, quality=quality) for one in results)
    return Comparison({"model": 1}, dense, tuple(own), (), {"dense": 9, "experts": 3},
                      asked={"tasks": list(asked)})  # fmt: skip


def test_each_plan_is_trained_once_for_all_bits_and_what_is_there_is_not_trained_again(trainer):
    found, made = trainer
    kinds: tuple[tuple[str, Repaired], ...] = (("auto", "layer"), ("auto", ""), ("uniform", ""))
    rows = [Result(rule, rate, bits=bits, repair=repair) for rule, repair in kinds
            for rate in (0.25, 0.5) for bits in (16, 4)]  # fmt: skip
    methods = [Method("ours", "auto", "layer"), Method("u", "uniform")]
    given = pruned(*rows, Result("unpruned", 0.0, bits=4), asked=("t",))
    out = found.results(given, methods, lambda one: f"plan of {one.name} {one.rate}")
    names = [("auto+layer", 0.25), ("auto+layer", 0.5), ("uniform", 0.25), ("uniform", 0.5)]
    assert made == [(name, [16, 4], f"plan of {name} {rate}") for name, rate in names]
    assert [(one.rule, one.repair, one.rate, one.bits) for one in out.results] == [
        (one.rule, one.repair, one.rate, one.bits) for one in rows if (one.rule, one.repair) !=
        ("auto", "")]  # fmt: skip
    assert {one.quality["x"]["nll"] for one in out.results} == {0.5}
    made.clear()
    # Fewer rates show less and train nothing; other tasks are asked anew.
    fewer = pruned(*(one for one in rows if one.rate == 0.5), asked=("t",))
    again = found.results(fewer, methods, lambda one: "")
    assert {one.rate for one in again.results} == {0.5} and not made
    found.results(pruned(*rows[:2], asked=("other",)), methods, lambda one: "plan")
    assert made == [("auto+layer", [16, 4], "plan")]


def test_recovered_exports_are_asked_what_the_dense_model_was_with_answers_kept(
    trainer, monkeypatch, tmp_path
):
    found, _ = trainer
    calls = []

    def ask(model, loaded, place, asked, how, steps):
        calls.append((model.name, model.source, place, loaded, asked.names, how["window"]))
        return {"results": model.source}

    row = SimpleNamespace(to_dict=lambda: {"a": "row"})
    monkeypatch.setattr(paper_recovery, "ask", ask)
    monkeypatch.setattr(
        paper_recovery, "compare_results",
        lambda dense, other: [row] if (dense, other) == ("base", "export") else [],
    )  # fmt: skip
    assert found._answers("export", "name") == [{"a": "row"}]
    same = (tmp_path / "compare/tasks", {"t": "loaded"}, ["t"], None)
    assert calls == [("dense", "base", *same), ("name", "export", *same)]
