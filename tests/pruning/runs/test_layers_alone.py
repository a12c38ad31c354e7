"""Layers that are pruned alone, and what the concentration of their scores foretells of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from convert.checkpoint import open_checkpoint
from moe_jax.stream import forward_hidden
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.measure.concentration import concentration_report
from pruning.report.audit_figures import plot_layers_alone
from pruning.report.audit_page import audit_tables
from pruning.runs import audit as auditing
from pruning.runs import layers_alone
from pruning.runs.layers_alone import RECORD, least_gone, losses_alone
from pruning.scores.criteria import channel_scores
from pruning.scores.statistics import load_statistics
from pruning.shrink.prune import PrunedSource
from pruning.stages.job import open_job
from pruning.stages.stored import stored_recipe
from tests.support import command


@pytest.mark.parametrize(("rate", "count"), [(0.5, 6), (0.25, 3), (0.3, 4), (0.04, 0)])
def test_the_channels_of_least_score_go_whichever_expert_has_them(rate, count):
    channel = np.random.default_rng(0).permutation(36).reshape(3, 4, 3).astype(float)
    keep = least_gone(channel, rate)
    for own, left in zip(channel, keep, strict=True):
        assert sorted(own[~left]) == sorted(own.ravel())[:count]
    assert least_gone(np.zeros((1, 2, 2)), 0.5).tolist() == [[[False, False], [True, True]]]


def report(layers: int = 5) -> tuple[dict, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    channel = rng.exponential(size=(layers, 2, 6)) ** np.linspace(0.5, 3, layers)[:, None, None]
    keep, increase = least_gone(channel, 0.5), rng.random(layers)
    return concentration_report(channel, keep, increase, range(1, layers + 1)), channel, increase


def test_what_concentration_foretells_is_its_correlation_with_the_losses():
    found, channel, increase = report()
    assert [row["layer"] for row in found["rows"]] == [1, 2, 3, 4, 5]
    values: dict[str, list[float]] = {"gini": [], "fraction_holding": [], "score_removed": []}
    for own in channel.reshape(5, -1):
        scores = sorted(own)
        differences = [abs(a - b) for a in own for b in own]
        values["gini"].append(np.mean(differences) / (2 * np.mean(own)))
        held = next(n for n in range(1, 13) if sum(scores[-n:]) >= 0.9 * sum(scores))
        values["fraction_holding"].append(held / 12)
        values["score_removed"].append(sum(scores[:6]) / sum(scores))
    for name, wanted in values.items():
        assert [row[name] for row in found["rows"]] == pytest.approx(wanted)
        assert found["correlations"][name] == {
            "spearman": pytest.approx(scipy.stats.spearmanr(wanted, increase).statistic),
            "pearson": pytest.approx(scipy.stats.pearsonr(wanted, increase).statistic),
        }
    assert [row["masked"] for row in found["rows"]] == increase.tolist()
    one = report(1)[0]["correlations"]
    assert one["gini"] == {"spearman": None, "pearson": None}


def test_tables_and_figure_show_every_layer():
    found = {"rate": 0.5, "criterion": "act", **report()[0]}
    nothing = {"count": 0, "proxies": {}, "rows": [], "not_collected": []}
    layers, foretold = audit_tables({"experts": nothing, "channels": nothing, "layers": found})
    row = found["rows"][1]
    assert layers.rows[1] == [
        "2", f"{row['gini']:.3f}", f"{100 * row['fraction_holding']:.1f}%",
        f"{100 * row['score_removed']:.1f}%", f"{row['masked']:.4f}",
    ]  # fmt: skip
    assert "50% of its channels that score least by act" in layers.note
    rank = found["correlations"]["gini"]["spearman"]
    assert foretold.rows[0][:2] == ["Gini of its score", f"{rank:.2f}"]
    first, second = plot_layers_alone(found).axes
    assert first.get_title(loc="left") == f"Spearman {rank:.2f}"
    for axes, name in ((first, "gini"), (second, "fraction_holding")):
        wanted = [[one[name], one["masked"]] for one in found["rows"]]
        np.testing.assert_allclose(axes.collections[0].get_offsets(), wanted)
        assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "4", "5"]


def test_losses_are_of_a_token_that_is_predicted(monkeypatch):
    lost = np.array([3.0, 6.0])
    monkeypatch.setattr(layers_alone, "losses_alone", lambda *given: lost)
    monkeypatch.setattr(layers_alone, "concentration_report", lambda *given: {"given": given})
    # The first of a window is not predicted, nor what follows padding.
    valid = np.array([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 0]], bool)
    base = SimpleNamespace(config=SimpleNamespace(moe_layers=(1, 2)))
    job: Any = SimpleNamespace(recipe=SimpleNamespace(used_criterion="act"), base=base)
    steps: Any = None
    channel = np.arange(24.0).reshape(2, 3, 4)
    text = (np.zeros((3, 4), np.int32), valid)
    found = layers_alone.report_alone(job, channel, 0.5, text, Path("there"), steps)
    assert (found["rate"], found["criterion"]) == (0.5, "act")
    assert found["given"][2].tolist() == [0.75, 1.5] and found["given"][3] == (1, 2)


def test_each_layer_is_pruned_alone_and_measured_once(scored, models, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = ("audit", scored, "--experts", 1, "--channels", 0, "--tokens", 128, "--output", out)
    assert command.run(*words, "--layers-alone", 0.25) == 0
    found = json.loads((out / "audit.json").read_text())["layers"]
    assert (found["rate"], found["criterion"]) == (0.25, "shapley")
    statistics, _ = load_statistics(scored / "statistics.safetensors")
    scores = channel_scores(statistics).channel
    job = open_job(stored_recipe(scored))
    tokens, valid = auditing.some_windows(job.calibration, 128)
    source, losses = open_checkpoint(models / "single", dtype=job.base.head.weight.dtype), []
    for slot in (None, 0, 1):
        keep = np.ones(scores.shape, bool)
        if slot is not None:
            keep[slot] = scores[slot] > np.sort(scores[slot].ravel())[scores[slot].size // 4 - 1]
        model = PrunedSource(source, PruningPlan(keep, tuple(source.config.moe_layers)))
        logits = np.asarray(source.head(forward_hidden(model, tokens, valid)), np.float64)
        logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        at = np.nonzero(valid[:, :-1] & valid[:, 1:])
        losses.append(-logp[(*at, tokens[at[0], at[1] + 1])].mean())
    wanted = [loss - losses[0] for loss in losses[1:]]
    assert [row["masked"] for row in found["rows"]] == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert "kind,layer" in (out / "audit.csv").read_text().splitlines()[0]
    assert (out / "audit.csv").read_text().splitlines()[-1].startswith("layer,1,")
    assert "What concentration foretells" in (out / "audit.html").read_text()
    # What was measured is remembered, and a damaged record is measured anew.
    hidden, measured = layers_alone.masked_hidden, []

    def masked_hidden(base, tokens, valid, plans, **how):
        measured.extend(plans)
        return hidden(base, tokens, valid, plans, **how)

    monkeypatch.setattr(layers_alone, "masked_hidden", masked_hidden)
    monkeypatch.setattr(layers_alone, "GROUP", 2)

    def again(rate: float) -> tuple[list[float], int]:
        measured.clear()
        keep = least_gone(scores, rate)
        lost = losses_alone(job, keep, (tokens, valid), out, Steps(quiet=True))
        return (lost / len(at[0])).tolist(), len(measured)

    known = [row["masked"] for row in found["rows"]]
    assert again(0.25) == (known, 0)
    assert again(0.5)[1] == 2  # of the dense model there is one loss
    (out / RECORD).write_text("[]")
    assert again(0.25) == (pytest.approx(known, rel=1e-4), 3)


@pytest.mark.parametrize("rate", ["0", "1", "nan", "-0.5"])
def test_a_rate_that_leaves_nothing_to_compare_is_refused(scored, capsys, rate):
    told = command.refused(capsys, scored, "audit", scored, f"--layers-alone={rate}")
    assert "layers_alone=" in told and "must lie in (0, 1); choose e.g. 0.5" in told
