"""Extra attributions from the command line to plans."""

import dataclasses
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_model
from pruning.budget.importance import PlannerOptions, layer_weights
from pruning.recipe.recipe import CompressionRecipe
from pruning.scores.criteria import channel_scores
from pruning.scores.curvature import nll_grad2
from pruning.scores.end_to_end import nll_ablate, nll_ig
from pruning.scores.statistics import load_statistics
from pruning.stages import extra_scores
from pruning.stages.job import open_job
from tests.support import command, synthetic
from tests.support.plans import plan_of


@pytest.fixture(scope="module")
def folder(models, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("extra") / "out"
    flags = ("--nll-ig", 2, "--nll-ablate", "--nll-grad2")
    assert command.run("score", models / "single", *command.given(texts, out), *flags) == 0
    return out


def test_every_attribution_is_stored_and_serves_a_plan(folder, capsys):
    statistics, notes = load_statistics(folder / "statistics.safetensors")
    assert statistics.groups == {"nll-ig", "nll-ablate", "nll-grad2"}
    assert notes["nll_ig_steps"] == 2
    for name in ("nll_ig", "nll_ablate", "nll_grad2"):
        scores = channel_scores(statistics, attribution=name)
        raw = getattr(statistics, name) / statistics.total_tokens
        np.testing.assert_array_equal(scores.expert, np.maximum(raw, 0))
        assert command.run("plan", folder, "--attribution", name) == 0
    # The three estimate one thing: on a tiny random model they should at least agree in direction.
    flat = [getattr(statistics, n).ravel() for n in ("nll_ig", "nll_ablate", "nll_grad2")]
    assert np.corrcoef(flat).min() > 0.3


@pytest.mark.slow
def test_prompts_are_in_none_of_them_where_answers_alone_count(models, tmp_path):
    model = shutil.copytree(models / "single", tmp_path / "model")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    rows = [{"prompt": f"What is {n} and {n}?", "completion": f"{2 * n}, say."} for n in range(40)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "model": str(model), "output": str(tmp_path / "out"), "loss_on": "answers",
        "calibration": [str(tmp_path / "chat.jsonl")], "window": 64, "max_tokens": 512,
        "nll_ig": 2, "nll_ablate": True, "nll_grad2": True, "planner": "fair",
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    assert command.run("score", "--recipe", path) == 0
    statistics, _ = load_statistics(tmp_path / "out" / "statistics.safetensors")
    job = open_job(CompressionRecipe(**recipe))
    text = job.calibration
    assert text.counted is not None and 0.1 < text.counted[text.valid].mean() < 0.9
    asked = job.base, text.tokens, text.valid, text.counted
    wanted = {"nll_ig": nll_ig(*asked, steps=2), "nll_ablate": nll_ablate(*asked)}
    wanted["nll_grad2"] = nll_grad2(load_model(model, jnp.bfloat16), *asked[1:])
    for name, found in wanted.items():
        close = {"rtol": 2e-3, "atol": 2e-3 * np.abs(found).max()}
        np.testing.assert_allclose(getattr(statistics, name), found, **close)


def test_other_steps_are_measured_again_and_equal_ones_are_not(folder, models, texts, capsys):
    before = (folder / "statistics.safetensors").stat().st_mtime_ns
    args = ("score", models / "single", *command.given(texts, folder), "--nll-ablate")
    args += ("--nll-grad2",)
    assert command.run(*args, "--nll-ig", 2) == 0
    assert (folder / "statistics.safetensors").stat().st_mtime_ns == before


def test_the_cost_is_said_before_the_sweep(models, texts, tmp_path, capsys):
    given = command.given(texts, tmp_path / "out")
    assert command.run("score", models / "single", *given, "--nll-ig", 2) == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().err)
    # 2 layers of experts: 2 + 2 * 2 * (2 + 1) visits against 2.
    said = "nll_ig: 14 layer visits for each text, about 7 times the plain sweep's"
    assert said in shown
    assert shown.index(said) < shown.index("score")


def test_second_derivatives_of_a_large_model_are_refused_before_the_sweep(
    models, texts, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(extra_scores, "free_memory", lambda: 1000)
    given = command.given(texts, tmp_path / "out")
    assert command.run("score", models / "single", *given, "--nll-grad2") == 2
    shown = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "nll_grad2 differentiates the whole model twice" in shown and "--nll-ig 4" in shown
    assert not (tmp_path / "out" / "statistics.safetensors").exists()


def test_second_derivatives_are_refused_where_products_have_none(
    models, texts, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(extra_scores, "on_cpu", lambda: False)
    given = command.given(texts, tmp_path / "out")
    assert command.run("score", models / "single", *given, "--nll-grad2") == 2
    assert "nll_grad2 needs second derivatives" in capsys.readouterr().err
    assert not (tmp_path / "out" / "statistics.safetensors").exists()


def test_layers_may_be_weighed_by_their_end_to_end_loss():
    loss = np.array([[1.0, 3.0], [8.0, 8.0], [-5.0, 1.0]])
    statistics = synthetic.statistics(3, 2, 4, nll_ig=loss)
    options = PlannerOptions(layer_loss="nll_ig", passes=0)
    weights = layer_weights(channel_scores(statistics), options)
    np.testing.assert_allclose(weights, np.array([4.0, 16.0, 0.0]) / (20.0 / 3.0))
    given = {"layer_loss": "nll_ig", "passes": 0, "prune_rate": 0.5, "experts_per_token": 1}
    kept = plan_of(statistics, **given).counts
    assert kept.sum(axis=1).argmax() == 1 and kept.sum(axis=1).argmin() == 2


def test_layer_weights_that_were_not_measured_name_the_flag():
    scores = channel_scores(synthetic.statistics(3, 2, 4))
    with pytest.raises(ValueError, match=r"layer_loss='nll_ig' needs .*--nll-ig 4"):
        layer_weights(scores, PlannerOptions(layer_loss="nll_ig"))


@pytest.mark.parametrize("name", ["nll_ig", "nll_ablate", "nll_grad2"])
def test_an_attribution_that_was_not_collected_names_its_flag(name):
    with pytest.raises(
        ValueError, match=rf"'{name}' was not collected.*--{name.replace('_', '-')}"
    ):
        channel_scores(synthetic.statistics(2, 3, 4), attribution=name)


def test_attributions_of_two_texts_add_up():
    one, two = (
        synthetic.statistics(2, 3, 4, nll_ig=np.full((2, 3), value)) for value in (1.0, 2.0)
    )
    merged = one.merge(dataclasses.replace(two, **{n: getattr(one, n) for n in NORMS}))
    np.testing.assert_array_equal(merged.nll_ig, np.full((2, 3), 3.0))


NORMS = ("down_norm", "up_norm", "gate_norm", "down_l1", "up_l1", "gate_l1")
