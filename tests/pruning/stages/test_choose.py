"""Planner auto without repair: masked on windows that no statistic saw, the best rule is taken."""

import dataclasses
import errno
import json
import os
import re
import shutil

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from moe_jax.errors import InputError
from pruning.budget.candidates import CANDIDATES
from pruning.budget.plan import PruningPlan
from pruning.budget.rules import RULES
from pruning.measure.choice import take
from pruning.recipe.recipe import CompressionRecipe, load_recipe
from pruning.report.cost_tables import estimate_tables
from pruning.runs.estimate import estimate
from pruning.runs.evaluate import evaluate
from pruning.runs.plan import plan_folder, save_sweep
from pruning.stages import choose, rule_losses
from pruning.stages.job import open_job
from pruning.stages.score import stored_statistics
from pruning.text.calibration import TokenBatch
from pruning.text.kept_out import keep_out, kept_out_size
from tests.support.command import change_config, given, read, run
from tests.support.logits import torch_losses

OPTIONS = ("--bits", 16, "--block", 8, "--prune-rate", 0.5)
LENGTH = 64  # tokens of a window, each a byte


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """Two texts of unlike letters."""
    folder, rng = tmp_path_factory.mktemp("domains"), np.random.default_rng(0)
    for name, letters in (("words", "abcdefghij "), ("digits", "0123456789 +")):
        text = "".join(rng.choice(list(letters), 12 * LENGTH))
        (folder / f"{name}.txt").write_text(text)
    return folder


def command(model, domains, out, *more) -> tuple:
    names = [domains / f"{name}.txt" for name in ("words", "digits")]
    return (model, "--output", out, "--batch", 4, *OPTIONS, *more, "--calibration", *names)


@pytest.fixture(scope="module")
def finished(models, domains, tmp_path_factory):
    out = tmp_path_factory.mktemp("chosen") / "out"
    more = ("--evaluation", domains / "words.txt")
    assert run("--quiet", "compress", *command(models / "single", domains, out, *more)) == 0
    return out


@pytest.fixture(scope="module")
def choice(finished):
    return json.loads((finished / "plan.json").read_text())["provenance"]["choice"]


def masked(folder, plan) -> dict[str, np.ndarray]:
    """Down-projections without the channels that a plan removes."""
    stored, found = load_file(folder / "model.safetensors"), {}
    for layer, keep in zip(plan.layer_indices, plan.keep, strict=True):
        for expert, mask in enumerate(keep):
            name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
            found[name] = np.where(mask, stored[name], np.zeros((), stored[name].dtype))
    return found


@pytest.mark.slow
def test_the_choice_is_that_of_brute_force(models, finished, choice, tmp_path):
    """Every rule planned by its own name, masked by hand, and run by transformers."""
    job = open_job(load_recipe(finished / "recipe.yaml"))
    assert job.kept_out is not None and job.kept_out.valid.all()
    windows, files = job.kept_out.tokens, job.kept_out.files
    assert sorted(set(files)) == [0, 1]
    model = models / "single"
    losses = {"dense": torch_losses(model, {}, windows, tmp_path / "dense")}
    refused = {one["rule"]: one["reason"] for one in choice["refused"]}
    assert "--obs, which were not collected" in refused["hull-fair-obs"]
    for name in CANDIDATES.keys() - refused:
        rule = CANDIDATES[name]
        out, asked = shutil.copytree(finished, tmp_path / name), rule.options
        options = {key: getattr(asked, key) for key in ("criterion", "attribution", "planner",
                                                        "align")}  # fmt: skip
        if asked.width:
            options["width"] = asked.width
        ((_, plan),) = plan_folder(out, **options)
        assert "choice" not in plan.provenance
        losses[name] = torch_losses(model, masked(model, plan), windows, tmp_path / f"{name}-model")
    dense = losses.pop("dense")
    tokens = len(windows) * (LENGTH - 1)
    assert choice["dense"] == pytest.approx(
        {t: dense[files == i].sum() / (files == i).sum() / 63 for i, t in ((0, "words"),
                                                                          (1, "digits"))},
        abs=1e-5,
    )  # fmt: skip
    assert {one["rule"] for one in choice["candidates"]} | {
        one["rule"] for one in choice["refused"]
    } == set(CANDIDATES)
    for one in choice["candidates"]:
        added = losses[one["rule"]] - dense
        assert one["mean"] == pytest.approx(added.sum() / tokens, abs=1e-5)
        for number, text in enumerate(("words", "digits")):
            rows = files == number
            assert one["added"][text] == pytest.approx(added[rows].sum() / rows.sum() / 63,
                                                       abs=1e-5)  # fmt: skip
    measured = {one["rule"]: losses[one["rule"]] for one in choice["candidates"]}
    best, _ = take(measured, dense, np.full(len(dense), 63), files)
    (taken,) = (one["rule"] for one in choice["candidates"] if one["taken"])
    assert taken == best != "fair-shapley"
    plan = PruningPlan.load(finished)
    np.testing.assert_array_equal(plan.keep, PruningPlan.load(tmp_path / best).keep)


def test_windows_kept_out_are_in_no_statistic(models, domains, finished, tmp_path):
    """Their text is another one, and everything that scoring leaves is the same."""
    job = open_job(load_recipe(finished / "recipe.yaml"))
    assert job.kept_out is not None
    place = tmp_path / "domains"
    place.mkdir()
    changed = 0
    for number, name in enumerate(("words", "digits")):
        text = (domains / f"{name}.txt").read_text()
        for row in job.kept_out.tokens[job.kept_out.files == number]:
            old = "".join(map(chr, load_bytes(job, row)))
            assert text.count(old) == 1
            text = text.replace(old, old[::-1])
            changed += 1
        (place / f"{name}.txt").write_text(text)
    assert changed == len(job.kept_out.tokens) == 2
    out = tmp_path / "out"
    text = ("--evaluation", domains / "words.txt")
    assert run("--quiet", "score", *command(models / "single", place, out, *text)) == 0
    ours, theirs = (load_file(f / "statistics.safetensors") for f in (out, finished))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    said, before = (json.loads((f / "statistics.json").read_text()) for f in (out, finished))
    assert said["kept_out"]["sha256"] != before["kept_out"]["sha256"]
    assert said["tokens"] == before["tokens"] == (2 * 12 - 2) * LENGTH
    # with one rule all of the text is scored
    more = (*text, "--overwrite", "--planner", "fair")
    assert run("--quiet", "score", *command(models / "single", place, out, *more)) == 0
    said = json.loads((out / "statistics.json").read_text())
    assert said["tokens"] == 2 * 12 * LENGTH and "kept_out" not in said


def load_bytes(job, row) -> bytes:
    return job.codec.decode(row.tolist()).encode()


def no_measuring(monkeypatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("a rule is measured again")

    monkeypatch.setattr(rule_losses, "masked_hidden", refuse)


def test_nothing_is_measured_twice(models, domains, finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    no_measuring(monkeypatch)
    ((_, plan),) = plan_folder(out)  # the same rate
    assert plan.is_same(PruningPlan.load(finished))
    for name in ("plan.json", "plan.safetensors", "report.json"):
        (out / name).unlink()
    text = ("--evaluation", domains / "words.txt")
    assert run("--quiet", "compress", *command(models / "single", domains, out, *text)) == 0
    assert PruningPlan.load(out).is_same(plan)


def test_a_rate_of_its_own_has_a_choice_of_its_own(finished, tmp_path, monkeypatch, capsys):
    """`plan` measures again at rates that are new, and only there; the plans need not be nested."""
    out = shutil.copytree(finished, tmp_path / "out")
    assert run("plan", out, "--prune-rate", 0.25, 0.75, 0.5) == 0
    shown = capsys.readouterr()
    said = re.sub(r"\s+", " ", shown.err)
    assert all(f"prune rate {rate}: rule " in said for rate in (0.25, 0.75, 0.5))
    titles = [f"Rules measured at prune rate {rate}" for rate in (0.25, 0.75, 0.5)]
    assert [line.strip() for line in shown.out.splitlines() if "Rules measured" in line] == titles
    assert said.count("is taken, ") == 3 and shown.out.count("Rules measured") == 3
    no_measuring(monkeypatch)
    found = dict(plan_folder(out, [0.25, 0.75]))
    for plan in found.values():
        rows = plan.provenance["choice"]["candidates"]
        assert sum(one["taken"] for one in rows) == 1 and "nested_in" not in plan.provenance
    rate = {plan.provenance["prune_rate"]: plan for plan in found.values()}
    assert rate[0.25].keep.sum() > rate[0.75].keep.sum()
    assert rate[0.25].provenance["choice"]["dense"] == rate[0.75].provenance["choice"]["dense"]


def test_rates_of_unlike_rules_are_shown_by_one_score_in_any_order(finished, tmp_path):
    job = open_job(load_recipe(finished / "recipe.yaml"))
    statistics, _ = stored_statistics(finished, job.base)
    plan = PruningPlan.load(finished)
    fewer = PruningPlan(plan.keep & (np.arange(plan.keep.shape[2]) % 4 > 0), plan.layer_indices)
    one, two = (
        dataclasses.replace(job.recipe, criterion=name, attribution="ala", prune_rate=rate)
        for name, rate in (("energy", 0.5), ("act", 0.75))
    )
    pages = []
    for pairs in ([(one, plan), (two, fewer)], [(two, fewer), (one, plan)]):
        save_sweep(tmp_path, job.base, pairs, statistics)
        pages.append((tmp_path / "sweep.csv").read_text())
        assert "share of shapley that is kept" in (tmp_path / "sweep.html").read_text()
    assert pages[0] == pages[1]


def test_a_target_of_bytes_is_one_for_every_rule(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    whole = json.loads((out / "report.json").read_text())["sizes"]["exports"]["ragged-bf16"]
    target = int(0.95 * whole["bytes"])
    assert run("plan", out, "--target-bytes", target) == 0
    shown = capsys.readouterr()
    assert "Rules measured" in [line.strip() for line in shown.out.splitlines()]
    assert "prune rate 0.25" not in shown.out + shown.err
    plan = PruningPlan.load(out)
    kept = {one["rule"]: one["kept"] for one in plan.provenance["choice"]["candidates"]}
    (taken,) = (one["rule"] for one in plan.provenance["choice"]["candidates"] if one["taken"])
    assert kept[taken] == int(plan.counts.sum())
    equal, ragged = kept.pop("uniform-energy"), sorted(kept.values())
    # Blocks of 8 channels; where no expert is as wide as another, one may be emptied, which saves
    # its place in the header too.
    assert equal < ragged[0] and ragged[-1] <= ragged[0] + 8
    assert run("export", out, "--overwrite") == 0
    written = (out / "exports" / "ragged-bf16" / "model.safetensors").stat().st_size
    block = 8 * 3 * 2 * open_job(load_recipe(out / "recipe.yaml")).base.config.d_model
    assert target - block * plan.counts.size < written <= target
    assert run("plan", out, "--target-bytes", 3000) == 2
    assert "bytes" in capsys.readouterr().err.splitlines()[-1]


def test_the_table_is_shown_wherever_the_plan_is(finished, choice):
    report = json.loads((finished / "report.json").read_text())
    assert report["plan"]["choice"] == choice
    (taken,) = (one for one in choice["candidates"] if one["taken"])
    rule = CANDIDATES[taken["rule"]].options
    assert (report["recipe"]["criterion"], report["recipe"]["planner"]) == (
        rule.criterion, rule.planner,
    )  # fmt: skip
    assert report["random"]["kept"] == sum(map(sum, report["counts"]))
    page = re.sub(r"<[^>]+>|\s+", " ", (finished / "report.html").read_text())
    card = (finished / "exports" / "ragged-bf16" / "README.md").read_text()
    for one in choice["candidates"]:
        assert one["rule"] in page and f"{one['mean']:+.4f}" in page
        assert f"| {one['rule']} | {one['mean']:+.4f} |" in card
    # what repeats the run keeps the same windows out
    recipe = yaml.safe_load(card.partition("```yaml")[2].partition("```")[0])
    assert recipe["planner"] == "auto" and "criterion" not in recipe and recipe["width"] == "free"


def test_what_is_named_holds_in_every_candidate(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    ((_, plan),) = plan_folder(out, criterion="energy")  # a rule is named: nothing is measured
    assert (plan.provenance["criterion"], plan.provenance["planner"]) == ("energy", "fair")
    ((_, plan),) = plan_folder(out, criterion="energy", planner="auto")
    assert plan.provenance["criterion"] == "energy"
    found = plan.provenance["choice"]
    assert found["asked"]["criterion"] == "energy"
    names = {one["rule"] for one in found["candidates"]}
    assert "fair-shapley criterion=energy" in names and all("energy" in name for name in names)
    refused = {one["rule"]: one["reason"] for one in found["refused"]}
    same = "it keeps the channels of paper-shapley criterion=energy"
    assert refused["paper-act criterion=energy"] == same


def test_a_rule_that_cannot_is_listed_with_the_reason(finished, tmp_path, monkeypatch):
    needs = dataclasses.replace(
        CANDIDATES["fair-shapley"],
        options=dataclasses.replace(CANDIDATES["fair-shapley"].options, criterion="fisher"),
    )
    monkeypatch.setitem(CANDIDATES, "fair-fisher", needs)
    monkeypatch.setitem(CANDIDATES, "naee", RULES["naee"])
    out = shutil.copytree(finished, tmp_path / "out")
    ((_, plan),) = plan_folder(out, width="capped", cap=48)
    refused = {one["rule"]: one["reason"] for one in plan.provenance["choice"]["refused"]}
    assert refused["uniform-energy"] == "it has width uniform, the recipe asks for capped"
    assert "--gradients, which were not collected" in refused["fair-fisher"]
    assert "fixes experts beforehand" in refused["naee"]
    assert plan.counts.max() <= 48
    taken = [one["rule"] for one in plan.provenance["choice"]["candidates"] if one["taken"]]
    assert len(taken) == 1 and taken[0] not in refused


@pytest.mark.parametrize("weights_only", [False, True])
def test_without_windows_to_measure_on_the_usual_rule_decides_and_says_so(
    models, domains, tmp_path, capsys, weights_only
):
    text = tmp_path / "text.txt"
    text.write_text((domains / "words.txt").read_text()[: 3 * LENGTH])
    files = ("--weights-only",) if weights_only else ("--calibration", text, "--batch", 4)
    plans = []
    for planner in ("auto", "fair"):
        out = tmp_path / planner
        flags = ("--output", out, *OPTIONS, "--planner", planner, *files)
        assert run("score", models / "single", *flags) == 0
        capsys.readouterr()
        assert run("plan", out) == 0
        said = re.sub(r"\s+", " ", capsys.readouterr().err)
        assert ("no rule can be measured and the usual one decides" in said) == (planner == "auto")
        plans.append(PruningPlan.load(out))
        assert not (out / "choice.json").exists()
    assert plans[0].content_hash == plans[1].content_hash
    assert plans[0].provenance["criterion"] == ("noise" if weights_only else "shapley")


def test_a_folder_scored_for_one_rule_measures_none(models, texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--quiet", "score", models / "single", *given(texts, out), *OPTIONS) == 0
    assert run("plan", out, "--planner", "auto") == 0
    assert "no window of calibration text was kept out" in capsys.readouterr().err
    assert PruningPlan.load(out).provenance["planner"] == "fair"


def test_comparing_and_auditing_keep_nothing_out(models, texts, tmp_path):
    for stage in ("compare", "audit"):
        out = tmp_path / stage
        more = {"compare": ("--rules", "random", "--block", 8), "audit": ("--experts", 1,
                "--channels", 0, "--sample-tokens", 64)}[stage]  # fmt: skip
        assert run("--quiet", stage, models / "single", *read(texts, out), *more) == 0
        assert "kept_out" not in json.loads((out / "statistics.json").read_text())


def test_the_calibration_text_must_be_the_one_that_was_scored(
    models, domains, finished, tmp_path, capsys
):
    out = shutil.copytree(finished, tmp_path / "out")
    recipe = load_recipe(out / "recipe.yaml")
    other = tmp_path / "words.txt"
    other.write_text((domains / "words.txt").read_text()[::-1])
    calibration = (str(other), recipe.calibration[1])
    changed = yaml.safe_load((out / "recipe.yaml").read_text()) | {"calibration": calibration}
    (out / "recipe.yaml").write_text(yaml.safe_dump({**changed, "calibration": list(calibration)}))
    assert run("plan", out, "--prune-rate", 0.3) == 2
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "is not the one that" in said and "name a --planner, or score again" in said
    assert run("plan", out, "--prune-rate", 0.3, "--planner", "fair") == 0


def test_evaluation_texts_are_not_read_to_measure_rules(finished, tmp_path):
    """They may be gone: which calibration windows were kept out does not depend on them."""
    out = shutil.copytree(finished, tmp_path / "out")
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["evaluation"]
    recipe["evaluation"] = [str(tmp_path / "gone.txt")]
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run("plan", out, "--prune-rate", 0.3) == 0
    assert "choice" in PruningPlan.load(out).provenance


def test_texts_to_evaluate_are_opened_before_rules_are_measured(finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    no_measuring(monkeypatch)
    with pytest.raises((InputError, OSError), match="gone"):
        evaluate(out, [tmp_path / "gone.txt"], [0.65])


def test_a_folder_that_is_only_read_is_left_as_it_is(domains, finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    before = (out / "choice.json").read_bytes()

    def refuse(file, text):
        raise OSError(errno.EROFS, "Read-only file system", str(file))

    monkeypatch.setattr(rule_losses, "replace_text", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = evaluate(out, [domains / "words.txt"], [0.6], evaluation_tokens=LENGTH)
    assert set(found["texts"]) == {"dense", "prune-rate 0.6"}
    assert (out / "choice.json").read_bytes() == before


def test_what_is_said_of_a_rule_repeats_it(finished, tmp_path, monkeypatch, capsys):
    """Options that a rule of a user's own has beside criterion, attribution and planner, too."""
    monkeypatch.setattr(choose, "CANDIDATES", {"mass": RULES["fair-act-mass"]})
    out = shutil.copytree(finished, tmp_path / "out")
    ((_, plan),) = plan_folder(out, prune_rate=0.4)
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    options = re.search(r"on text kept out: (--[^:]*--weights mass)", said)
    assert options is not None
    words = options[1].split()
    assert run("plan", out, "--prune-rate", 0.4, *words) == 0
    assert PruningPlan.load(out).content_hash == plan.content_hash


def test_an_estimate_counts_the_measuring_of_rules(models):
    known = {"model": str(models / "single"), "output": "out", "bits": 16, "max_tokens": 4096}
    (found,) = estimate(CompressionRecipe(**known), probe=True)
    assert found["kept_out_tokens"] == 3 * LENGTH and found["memory"]["choice"] > 600 << 20
    assert found["choosing_seconds"] > 0
    shown = {row[0]: row[1] for row in estimate_tables(found)[-1].rows}
    assert "memory to measure rules" in shown and "time to measure rules on 192 of them" in shown
    for one in (
        {"planner": "fair"},
        {"criterion": "energy"},
        {"weights_only": True},
        {"weights_only": True, "planner": "auto"},
        {"max_tokens": 3 * LENGTH},  # too few windows to keep one out
    ):
        (found,) = estimate(CompressionRecipe(**{**known, **one}), probe=True)
        assert found["kept_out_tokens"] == found["memory"]["choice"] == 0
        assert found["choosing_seconds"] == 0
        assert not any("rules" in row[0] for row in estimate_tables(found)[-1].rows)


def test_rules_that_tie_are_told_apart_by_their_worst_text():
    tokens, domains = np.full(4, 10), np.array([0, 0, 1, 1])
    dense = np.zeros(4)
    best = np.array([2.0, 3.0, 7.0, 8.0])  # .5 a token; worst text .75
    even = best + np.array([3.1, 1.0, -1.0, -3.0])  # .0025 more, unsure
    losses = {"best": best, "even": even}
    assert take(losses, dense, tokens, domains) == ("even", ["best", "even"])
    # of one text nothing tells them apart but the loss
    assert take(losses, dense, tokens, np.zeros(4, int))[0] == "best"
    # sure, however small
    assert take({"best": best, "more": best + 0.025}, dense, tokens, domains)[0] == "best"
    # far, however unsure
    assert take({"best": best, "far": even + 0.2}, dense, tokens, domains) == ("best", ["best"])
    # a window of more tokens counts for more
    assert take({"a": np.array([1.0, 9.0]), "b": np.array([5.0, 4.0])}, np.zeros(2),
                np.array([10, 90]), np.zeros(2, int))[0] == "b"  # fmt: skip


def test_kept_out_windows_are_few_and_of_every_file():
    def batch(*windows, length=8):
        count = sum(windows)
        files = np.repeat(np.arange(len(windows)), windows)
        valid = np.ones((count, length), bool)
        last = np.cumsum(windows) - 1
        valid[last, 1:] = False  # the last window of a file is padded
        return TokenBatch(np.arange(count)[:, None].repeat(length, 1), valid, files=files)

    for windows in ((4,), (100,), (3, 40), (20, 20, 20), (1000, 24)):
        left, held = keep_out(batch(*windows))
        assert held is not None and held.files is not None
        rows = sorted([*left.tokens[:, 0], *held.tokens[:, 0]])
        assert rows == list(range(sum(windows)))
        assert held.scored.all()  # none is padded
        assert set(held.files) == set(range(len(windows)))
        assert len(held.tokens) <= len(windows) + sum(windows) / 20
    assert keep_out(batch(3))[1] is None
    # of a file of one window nothing would be left
    whole = np.arange(41)[:, None].repeat(8, 1)
    files = np.repeat([0, 1], [40, 1])
    left, held = keep_out(TokenBatch(whole, np.ones(whole.shape, bool), files=files))
    assert held is not None and list(held.files) == [0, 0] and left.files[-1] == 1
    # one of every file would be half of the text
    _, held = keep_out(batch(*[2] * 10))
    assert held is not None and len(held.tokens) == 1
    _, held = keep_out(batch(2000, length=32))
    assert held is not None and held.total == 83 * 32
    _, held = keep_out(batch(2000, length=1024))
    assert held is not None and held.total == 16384


@pytest.mark.parametrize(
    ("windows", "length", "files", "expected"),
    [
        (3, 64, 1, (0, 0)),  # too few windows
        (4, 64, 1, (1, 64)),
        (36, 64, 1, (2, 64)),  # one and a half
        (35, 64, 1, (1, 64)),
        (48, 64, 1, (2, 64)),
        (48, 64, 5, (5, 64)),  # one of every file
        (4000, 32, 1, (167, 32)),
        (40000, 32, 1, (512, 32)),  # 16,384 tokens
        (4, 512, 1, (1, 128)),  # 85 tokens of one, no fewer than 128
        (24, 512, 1, (2, 256)),
        (24, 512, 3, (3, 170)),
        (1000, 4096, 1, (64, 256)),
        (8, 130, 7, (7, 128)),
        (8, 100, 7, (7, 100)),
    ],
)
def test_as_many_windows_are_kept_out_as_their_tokens_say(windows, length, files, expected):
    assert kept_out_size(windows, length, files) == expected


def test_of_long_windows_of_a_short_text_only_the_ends_are_kept_out():
    count, length, begin = 12, 512, 7
    tokens = np.arange(1000, 1000 + count * length, dtype=np.int32).reshape(count, length)
    tokens[:, 0] = begin  # what the tokenizer puts first
    counted = np.ones((count, length), bool)
    counted[:, 0] = counted[:, -2] = False
    batch = TokenBatch(tokens, np.ones((count, length), bool), ({"first": [begin]},) * 3,
                       counted, np.repeat(np.arange(3), 4))  # fmt: skip
    left, held = keep_out(batch)
    assert held is not None and held.files is not None and held.counted is not None
    assert list(held.files) == [0, 1, 2]
    # No more than a window of every file, and no token is lost or seen twice.
    assert held.tokens.shape == held.valid.shape == held.counted.shape == (3, 1 + 128)
    assert (held.tokens[:, 0] == begin).all() and not held.counted[:, 0].any()
    assert not held.counted[:, -2].any() and held.scored[:, 0].all() and held.valid.all()
    seen = [*left.tokens[left.valid], *held.tokens[:, 1:].ravel()]
    assert sorted(seen) == sorted(tokens.ravel())
    assert left.total == batch.total - 3 * 128 and left.tokens.shape == tokens.shape
    # Ends of which no answer is asked cannot be measured on: whole windows then.
    counted[:, 200:] = False
    left, held = keep_out(dataclasses.replace(batch, counted=counted))
    assert held is not None and held.tokens.shape == (3, length) and len(left.tokens) == 9
    # Of more text, more of its windows, as many tokens as one in 24.
    _, held = keep_out(TokenBatch(np.zeros((64, 2048), np.int32), np.ones((64, 2048), bool)))
    assert held is not None and held.tokens.shape == (21, 260)
    _, held = keep_out(TokenBatch(np.zeros((8, 8192), np.int32), np.ones((8, 8192), bool)))
    assert held is not None and held.tokens.shape == (8, 341)


def test_an_estimate_of_long_windows_counts_what_a_run_keeps_out(models, domains, tmp_path):
    model = shutil.copytree(models / "single", tmp_path / "model")
    change_config(model, max_position_embeddings=256)
    files = tuple(str(domains / f"{name}.txt") for name in ("words", "digits"))
    recipe = CompressionRecipe(
        model=str(model), output=str(tmp_path / "out"), calibration=files, max_tokens=1536, bits=16
    )
    job = open_job(recipe, measures=False)
    assert job.recipe.window == 256 and job.kept_out is not None
    (found,) = estimate(recipe, probe=False)
    assert found["kept_out_tokens"] == job.kept_out.total == 2 * 128
