"""Planner auto with repair: rules are measured with what is kept refitted, obs among them."""

import itertools
import json
import shutil
import time
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.numpy import load_file, save_file

from pruning.budget.candidates import CANDIDATES
from pruning.budget.plan import PruningPlan
from pruning.measure.choice import take
from pruning.recipe.recipe import CompressionRecipe, load_recipe
from pruning.runs.estimate import estimate
from pruning.scores.grams import sampled
from pruning.shrink.taken_over import PULL, PULL_OF_TOKENS
from pruning.stages import rule_losses
from pruning.stages.job import open_job
from pruning.stages.score import stored_statistics
from pruning.text.tokenizer import open_codec
from tests.pruning.stages.test_choose import LENGTH, no_measuring
from tests.support import explicit, tiny
from tests.support.command import SIZES, run
from tests.support.logits import torch_losses

EXPERTS, CHANNELS, TOP = 8, 16, 2
LETTERS = "abcdefghij "
DOWN = "model.layers.{}.mlp.experts.{}.down_proj.weight"


def written(folder, doubled: bool) -> None:
    """A tiny model that says letters; the second half of each expert's channels may be the first,
    twice as large."""
    sizes = SIZES | {"num_experts": EXPERTS, "moe_intermediate_size": CHANNELS,
                     "num_experts_per_tok": TOP}  # fmt: skip
    tiny.add_tokenizer(tiny.save(tiny.tiny_model("qwen2_moe", seed=3, **sizes), folder))
    stored, half = load_file(folder / "model.safetensors"), CHANNELS // 2
    for name, value in stored.items():
        if ".experts." in name and "down_proj" not in name and doubled:
            value[half:] = value[:half] * (2 if "up_proj" in name else 1)
        elif ".experts." in name and "down_proj" in name:
            value *= 3  # experts matter
    head = stored["lm_head.weight"]
    said = open_codec(folder, len(head)).encode(LETTERS)
    stored["lm_head.weight"] = np.zeros_like(head)
    stored["lm_head.weight"][said] = 3 * head[said]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def spoken(folder, windows: int) -> str:
    """Letters as the model itself goes on with them, so that whatever changes it adds to its loss,
    in windows of `LENGTH`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    said = torch.tensor(open_codec(folder, model.config.vocab_size).encode(LETTERS))
    places = torch.arange(windows)[:, None] % len(LETTERS)
    chance = torch.Generator().manual_seed(0)
    for _ in range(LENGTH - 1):
        with torch.no_grad():
            logits = model(input_ids=said[places]).logits[:, -1, said]
        one = torch.multinomial(torch.softmax(logits, -1), 1, generator=chance)
        places = torch.cat([places, one], dim=1)
    return "".join(LETTERS[place] for place in places.flatten())


@pytest.fixture(scope="module", params=["plain", "doubled"])
def finished(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    written(place / "model", request.param == "doubled")
    (place / "text.txt").write_text(spoken(place / "model", 200))
    assert run("--quiet", "compress", *command(place, place / "text.txt")) == 0
    return place


def command(place, text) -> tuple:
    options = ("--bits", 16, "--block", 4, "--prune-rate", 0.5, "--repair", "layer")
    texts = ("--window", LENGTH, "--calibration", text, "--evaluation", text)
    return (place / "model", "--output", place / "out", *options, *texts)


def choice_of(folder) -> dict:
    return json.loads((folder / "plan.json").read_text())["provenance"]["choice"]


def taken(said: dict) -> str:
    (name,) = (one["rule"] for one in said["candidates"] if one["taken"])
    return name


def opened(folder):
    job = open_job(load_recipe(folder / "recipe.yaml"))
    return job, stored_statistics(folder, job.base)[0]


def refitted(place, plan: PruningPlan) -> dict[str, np.ndarray]:
    """Down-projections by least squares on every token of the sample written out, pull below."""
    job, statistics = opened(place / "out")
    tokens, valid = sampled(job.calibration.tokens, job.calibration.valid, rule_losses.SHARE)
    assert len(tokens) == 8
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():  # buffers stay precise
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model = model.double()
    model.set_experts_implementation("eager")
    blocks, _ = explicit.write_out(model, tokens, valid, TOP)
    found = {}
    for layer, block in enumerate(blocks):
        for expert, keep in enumerate(plan.keep[layer]):
            down = np.array(block.down[expert])
            seen = np.array([np.sqrt(r.q) * r.w * r.h for r in block.rows[expert]])
            if keep.any() and len(seen):
                whole = statistics.energy[layer, expert] / (down**2).sum(axis=1)
                rows = seen * np.sqrt(whole / (seen**2).sum(axis=0))
                pull = max(PULL, PULL_OF_TOKENS * keep.sum() / len(rows)) * whole[keep].mean()
                rows = np.concatenate([rows[:, keep], np.sqrt(pull) * np.eye(keep.sum())]), rows
                lost = np.zeros((len(rows[0]), down.shape[1]))
                lost[: len(rows[1])] = rows[1][:, ~keep] @ down[~keep]
                down[keep] += np.linalg.lstsq(rows[0], lost, rcond=None)[0]
            down[~keep] = 0.0
            found[DOWN.format(layer, expert)] = down.T
    return found


@pytest.mark.slow
def test_the_choice_is_that_of_brute_force(finished):
    """Every rule planned by its own name, refitted row by row, and run by transformers."""
    out, said = finished / "out", choice_of(finished / "out")
    job, _ = opened(out)
    assert job.kept_out is not None
    windows = job.kept_out.tokens

    def run_by_transformers(changed) -> np.ndarray:
        return torch_losses(finished / "model", changed, windows, finished / "changed")

    dense, losses = run_by_transformers({}), {}
    for one in said["candidates"]:
        rule = CANDIDATES[one["rule"]].options
        names = ["criterion", "attribution", "planner", "align", *["width"] * bool(rule.width)]
        words = [word for n in names for word in (f"--{n}", getattr(rule, n))]
        own = shutil.copytree(out, finished / one["rule"], dirs_exist_ok=True)
        assert run("--quiet", "plan", own, *words) == 0
        plan = PruningPlan.load(own)
        losses[one["rule"]] = run_by_transformers(refitted(finished, plan))
        added = (losses[one["rule"]] - dense).sum() / len(windows) / (LENGTH - 1)
        assert one["mean"] == pytest.approx(added, abs=2e-4)
    best, _ = take(losses, dense, np.full(len(dense), LENGTH - 1), np.zeros(len(dense), int))
    assert taken(said) == best and said["repaired"] and len(losses) > 5


def test_repairs_own_selection_is_taken_where_it_loses_least_and_nowhere_else(finished, tmp_path):
    """Of doubled channels it keeps one each, and all other rules lose far more."""
    plan, said = PruningPlan.load(finished / "out"), choice_of(finished / "out")
    added = {one["rule"]: one["mean"] for one in said["candidates"]}
    if finished.name.startswith("doubled"):
        assert taken(said) == "hull-fair-obs" and plan.provenance["criterion"] == "obs"
        assert added.pop("hull-fair-obs") < 0.7 * min(added.values())
    else:
        assert taken(said) == min(added, key=added.__getitem__) != "hull-fair-obs"
    for where in ("out/report.html", "out/exports/ragged-bf16/README.md"):
        assert "+nats, repaired" in (finished / where).read_text()
    out = shutil.copytree(finished / "out", tmp_path / "out")
    assert run("--quiet", "plan", out, "--prune-rate", 0.125) == 0
    said = choice_of(out)
    assert said["repaired"] and taken(said) != "hull-fair-obs"
    assert PruningPlan.load(out).provenance["criterion"] != "obs"


def test_a_run_that_goes_on_measures_nothing_again(finished, tmp_path, monkeypatch):
    place = tmp_path / "place"
    shutil.copytree(finished, place)
    before = (place / "out" / "choice.json").read_bytes()
    changed = yaml.safe_load((place / "out" / "recipe.yaml").read_text())
    changed |= {"model": str(place / "model"), "output": str(place / "out")}
    (place / "out" / "recipe.yaml").write_text(yaml.safe_dump(changed))
    for name in ("report.json", "plan.json", "plan.safetensors"):
        (place / "out" / name).unlink()
    with monkeypatch.context() as patch:
        no_measuring(patch)
        assert run("--quiet", "compress", *command(place, finished / "text.txt")) == 0
    assert PruningPlan.load(place / "out").is_same(PruningPlan.load(finished / "out"))
    # Masked losses are others, and never stand among these.
    (place / "out" / "recipe.yaml").write_text(yaml.safe_dump(changed | {"repair": "none"}))
    assert run("--quiet", "plan", place / "out") == 0
    said, was = choice_of(place / "out"), choice_of(finished / "out")
    masked, mended = (
        {one["rule"]: one["mean"] for one in each["candidates"]} for each in (said, was)
    )
    assert not said["repaired"] and masked.keys() == mended.keys()
    assert all(masked[name] > mended[name] for name in masked)
    stored, old = json.loads((place / "out" / "choice.json").read_text()), json.loads(before)
    assert (stored["key"]["repaired"], old["key"]["repaired"]) == (False, True)
    assert stored["plans"].keys() == old["plans"].keys() and stored["dense"] == old["dense"]


def test_an_estimate_counts_the_sample_and_what_is_refitted(models, monkeypatch):
    # Every program takes a second: which of them count is asked here, not how fast they were.
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    known: dict[str, Any] = {"model": str(models / "single"), "output": "out", "bits": 16}
    known |= {"max_tokens": 49152}
    others: tuple[dict[str, Any], ...] = ({}, {"repair": "none"}, {"planner": "fair"})
    repaired, masked, named = (
        estimate(CompressionRecipe(**known, **more), probe=True)[0] for more in others
    )
    assert repaired["choosing_seconds"] > masked["choosing_seconds"] > 0
    assert repaired["memory"]["choice"] > masked["memory"]["choice"] > 0
    assert repaired["disk"]["parts"]["statistics"] > masked["disk"]["parts"]["statistics"]
    assert named["choosing_seconds"] == named["memory"]["choice"] == 0
    assert named["disk"]["parts"]["statistics"] == masked["disk"]["parts"]["statistics"]
