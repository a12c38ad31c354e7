"""`recover --loss-on answers`, from a file of chats to the losses in its report."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pruning import Steps
from pruning.recipe import recover_options
from pruning.recipe.recover_options import RecoverOptions
from pruning.stages.recover_job import open_recovery
from tests.pruning.recovery.students import placed_student
from tests.pruning.text.test_chat import HEADERS, TALK, as_file
from tests.support.command import run

LONG = [{"role": "user", "content": "Why? " * 12}, {"role": "assistant", "content": "Because."}]


@pytest.fixture(scope="module")
def student(models, tmp_path_factory) -> Path:
    """A plan for a model that chats, and a file of chats."""
    folder = tmp_path_factory.mktemp("chats")
    model = Path(shutil.copytree(models / "single", folder / "model"))
    as_file(model, HEADERS)
    shutil.copy(models / "single/config.json", model)
    talks = [TALK if number % 3 else LONG for number in range(24)]
    (folder / "chat.jsonl").write_text("".join(f"{json.dumps({'messages': t})}\n" for t in talks))
    how = ("--weights-only", "--bits", 16, "--prune-rate", 0.5, "--output", folder / "run")
    assert run("score", folder / "model", *how) == 0 and run("plan", folder / "run") == 0
    return folder


def by_hand(model, tokens: np.ndarray, valid: np.ndarray, counted: np.ndarray) -> float:
    """Nats per token of answers: each by what stands before it in its window."""
    logits = np.asarray(
        jax.jit(lambda model: model(tokens, valid, dtype=jnp.float32))(model), np.float64
    )
    spent = []
    for row in range(len(tokens)):
        for place in range(1, tokens.shape[1]):
            if valid[row, place] and counted[row, place]:
                before = logits[row, place - 1]
                spent.append(np.log(np.exp(before).sum()) - before[tokens[row, place]])
    return float(np.mean(spent))


@pytest.mark.slow
def test_prompts_are_neither_learnt_nor_measured(student, tmp_path):
    text, output = student / "chat.jsonl", tmp_path / "out"
    how = {"tokens": 2048, "window": 64, "batch": 4, "train": "router", "next_token": 1.0}
    options = RecoverOptions(text=(str(text),), output=str(output), loss_on="answers", **how)
    job = open_recovery(student / "run", options.filled(), Steps(quiet=True))
    model = placed_student(job.student.source).model
    assert 0.05 < job.text.counted[job.text.valid].mean() < 0.5  # mostly prompts
    words = [word for name, value in how.items() for word in (f"--{name}", value)]
    words = [str(word).replace("_", "-") for word in words]
    more = ("--loss-on", "answers", "--epochs", 1, "--export", "ragged-bf16", "--output", output)
    assert run("recover", student / "run", "--text", text, *words, *more) == 0
    report = json.loads((output / "recover.json").read_text())
    assert report["text"]["sources"][0]["loss_on"] == "answers"
    held = next(row["held_out"] for row in report["history"] if "held_out" in row)
    wanted = by_hand(model, job.held.tokens, job.held.valid, job.held.counted)
    assert held["nll"] == pytest.approx(wanted, rel=1e-3)
    everything = by_hand(model, job.held.tokens, job.held.valid, np.ones_like(job.held.valid))
    assert abs(everything - wanted) > 0.005 * wanted  # far beyond what is allowed above
    first = next(row for row in report["history"] if row.get("step") == 1 and "nll" in row)
    chosen = job.how.chosen(0, len(job.text.tokens)).ravel()
    parts = (job.text.tokens, job.text.valid, job.text.counted)
    assert first["nll"] == pytest.approx(by_hand(model, *(one[chosen] for one in parts)), rel=1e-3)


def test_the_learning_rate_goes_by_the_width_unless_it_is_named(student, tmp_path, monkeypatch):
    monkeypatch.setattr(recover_options, "RATED_WIDTH", 8)  # this model is 32 wide
    text = {"text": (str(student / "chat.jsonl"),), "output": str(tmp_path / "out")}
    for how, wanted in (
        ({}, 2.5e-4),
        ({"train": "dora"}, 5e-4),
        ({"train": "router"}, 1e-3),
        ({"preset": "paper"}, 1e-4),
        ({"learning_rate": 0.02}, 0.02),
    ):
        options = RecoverOptions(**text, tokens=2048, window=64, **how).filled()
        job = open_recovery(student / "run", options, Steps(quiet=True))
        assert job.how.learning_rate == job.options.learning_rate == wanted, how
