"""The audit: its sample, its rank correlations, and the command on a tiny model."""

import csv
import json
import re

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from pruning.measure.ablation_record import RECORD, read_record
from pruning.measure.agreement import agreement, audit_report, sample_ablations, spearman, to_csv
from pruning.report.audit_figures import plot_misalign
from pruning.report.drawing import BLUE, ORANGE
from pruning.runs import audit as audit_stage
from pruning.scores.ablation import Ablation
from pruning.scores.channel_criteria import CHANNEL_CRITERIA
from pruning.scores.expert_criteria import EXPERT_CRITERIA
from tests.support import command, synthetic

few = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12)


@given(few)
def test_rank_correlation_is_that_of_scipy_ties_included(pairs):
    one, two = np.array(pairs, float).T
    found = spearman(one, two)
    if np.ptp(one) == 0 or np.ptp(two) == 0:
        assert found is None
    else:
        assert found == pytest.approx(scipy.stats.spearmanr(one, two).statistic, abs=1e-12)


def test_agreement_inside_layers_does_not_see_differences_between_them():
    layer = np.repeat([0, 1], 4)
    proxy = np.array([1, 2, 3, 4, 11, 12, 13, 14.0])
    falls = np.array([4, 3, 2, 1, 14, 13, 12, 11.0])
    found = agreement(proxy, falls, layer)
    assert found["within_layer"] == pytest.approx(-1)
    assert found["global"] > 0
    # Two experts of a layer have no rank correlation worth a mean.
    assert agreement(proxy[:2], falls[:2], layer[:2])["within_layer"] is None


@given(st.integers(0, 40), st.integers(0, 100), st.integers(0, 3))
def test_a_sample_is_spread_over_the_layers_and_names_nothing_twice(experts, channels, seed):
    layers = (0, 2, 3)
    found = sample_ablations(layers, (8, 12), experts, channels, seed)
    assert len(set(found)) == len(found)
    assert found == sample_ablations(layers, (8, 12), experts, channels, seed)
    whole = [one for one in found if one.channel is None]
    parts = [one for one in found if one.channel is not None]
    assert len(whole) == 2 * min(experts, 24) and len(parts) == channels
    assert {(o.layer, o.expert) for o in whole if o.reroute} == {
        (o.layer, o.expert) for o in whole if not o.reroute
    }
    for group in (whole, parts):
        counts = [sum(one.layer == layer for one in group) for layer in layers]
        assert max(counts) - min(counts) <= (2 if group is whole else 1)


def test_a_sample_of_all_has_every_expert_and_channel_once():
    found = sample_ablations((0, 2), (2, 5), 9, 20)
    whole = [(layer, e, None) for layer in (0, 2) for e in range(2) for _ in range(2)]
    parts = [(layer, e, c) for layer in (0, 2) for e in range(2) for c in range(5)]
    key = lambda one: (one[0], one[1], -1 if one[2] is None else one[2])  # noqa: E731
    assert sorted(((o.layer, o.expert, o.channel) for o in found), key=key) == sorted(
        whole + parts, key=key
    )


def test_a_report_ranks_the_attribution_it_was_made_from_perfectly():
    statistics = synthetic.statistics(2, 6, 4, gradients=False, expert_details=False)
    rng = np.random.default_rng(0)
    increases = {}
    for slot, layer in enumerate((1, 5)):
        for e in range(6):
            increases[Ablation(layer, e)] = float(statistics.kappa[slot, e])
            increases[Ablation(layer, e, reroute=True)] = float(rng.normal())
            increases[Ablation(layer, e, 2)] = float(statistics.energy[slot, e, 2])
    found = audit_report(statistics, (1, 5), increases)
    perfect = {"global": pytest.approx(1), "within_layer": pytest.approx(1)}
    assert found["experts"]["proxies"]["self"]["masked"] == perfect
    assert found["channels"]["proxies"]["energy"]["masked"] == perfect
    assert found["experts"]["proxies"]["uniform"]["masked"] == {
        "global": None, "within_layer": None,
    }  # fmt: skip
    assert "nll_ig" in found["experts"]["not_collected"]
    assert "wanda" in found["channels"]["not_collected"]
    rerouted = [v for one, v in increases.items() if one.reroute]
    assert found["experts"]["harmful_rerouted"] == np.mean(np.array(rerouted) < 0) > 0
    assert found["experts"]["harmful_masked"] == 0


def test_the_rows_of_a_report_are_what_was_measured_beside_every_proxy():
    statistics = synthetic.statistics(2, 4, 3, gradients=False, expert_details=False)
    rng = np.random.default_rng(1)
    experts = [(layer, e) for layer in (5, 1) for e in (3, 0, 2)]
    masked, rerouted = rng.normal(size=(2, 6))
    increases = {}
    for (layer, e), one, two in zip(experts, masked, rerouted, strict=True):
        increases[Ablation(layer, e, reroute=True)] = float(two)
        increases[Ablation(layer, e)] = float(one)
    increases |= {Ablation(5, 1, 2): -0.5, Ablation(1, 3, 0): 0.25, Ablation(1, 0, 1): 0.0}
    found = audit_report(statistics, (1, 5), increases)
    assert (found["experts"]["count"], found["channels"]["count"]) == (6, 3)
    rows = found["experts"]["rows"]
    assert [(row["layer"], row["expert"]) for row in rows] == sorted(experts)
    for row in rows:
        number = experts.index((row["layer"], row["expert"]))
        assert (row["masked"], row["rerouted"]) == (masked[number], rerouted[number])
        slot = (1, 5).index(row["layer"])
        assert row["usage"] == statistics.tokens[slot, row["expert"]] / 100
    layer = np.array([place[0] for place in experts])
    assert found["experts"]["masked_and_rerouted"] == agreement(masked, rerouted, layer)
    assert found["experts"]["harmful_masked"] == np.mean(masked < 0)
    cut = found["channels"]
    assert [(r["layer"], r["expert"], r["channel"], r["masked"]) for r in cut["rows"]] == [
        (1, 0, 1, 0.0), (1, 3, 0, 0.25), (5, 1, 2, -0.5)
    ]  # fmt: skip
    assert cut["rows"][2]["energy"] == statistics.energy[1, 1, 2] / 100
    assert cut["harmful_masked"] == 1 / 3 and "masked_and_rerouted" not in cut
    first, *lines = to_csv(found).splitlines()
    assert first.startswith("kind,layer,expert,channel,masked,rerouted,") and len(lines) == 9
    assert lines[0].startswith(f"expert,1,0,,{masked[4]},{rerouted[4]},")
    assert lines[8].startswith("channel,5,1,2,-0.5,,")
    nothing = audit_report(statistics, (1, 5), {})
    assert nothing["experts"]["harmful_masked"] is None and nothing["channels"]["count"] == 0


def test_the_figure_shows_bars_in_the_order_of_the_score_and_harm_in_orange():
    increase = np.array([0.5, -0.2, 1.5, 0.1])
    panels = [("usage", np.array([1.0, 4.0, 2.0, 3.0]), 0.25), ("ala", np.ones(4), None)]
    figure = plot_misalign(panels, increase, top=3)
    first, second, line, _ = figure.axes
    assert [bar.get_height() for bar in first.patches] == [-0.2, 0.1, 1.5]
    assert [matplotlib_hex(bar) for bar in first.patches] == [ORANGE, BLUE, BLUE]
    assert first.get_title("left") == "ranked by usage: Spearman 0.25"
    assert second.get_title("left") == "ranked by ala: Spearman undefined"
    # Experts 1, 3, 2 by usage, as shares of the highest score.
    np.testing.assert_allclose(line.get_lines()[0].get_ydata(), [1.0, 0.75, 0.5])


def matplotlib_hex(bar) -> str:
    from matplotlib.colors import to_hex

    return to_hex(bar.get_facecolor())


@pytest.fixture(scope="module")
def audited(models, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit") / "out"
    assert command.run("audit", models / "single", *arguments(texts, out)) == 0
    return out


def arguments(texts, out, experts: int = 6) -> tuple:
    sizes = ("--experts", experts, "--channels", 5, "--tokens", 128)
    return (*command.read(texts, out), *sizes)


def test_an_audit_writes_numbers_rows_and_a_page(audited):
    found = json.loads((audited / "audit.json").read_text())
    assert found["experts"]["count"] == 6 and found["channels"]["count"] == 5
    for kind, registry in (("experts", EXPERT_CRITERIA), ("channels", CHANNEL_CRITERIA)):
        part = found[kind]
        assert part["proxies"].keys() | set(part["not_collected"]) == registry.keys()
        assert {"nll_ig", "taylor"} & set(part["not_collected"])
    rows = list(csv.DictReader((audited / "audit.csv").read_text().splitlines()))
    assert [row["kind"] for row in rows] == ["expert"] * 6 + ["channel"] * 5
    increases = [float(row["masked"]) for row in rows]
    assert np.isfinite(increases).all() and np.any(increases)
    by_hand = scipy.stats.spearmanr(
        [float(row["ala"]) for row in rows[:6]], increases[:6]
    ).statistic
    stored = found["experts"]["proxies"]["ala"]["masked"]["global"]
    assert stored == pytest.approx(by_hand)
    page = (audited / "audit.html").read_text()
    assert "data:image/png;base64" in page and "Scores of channels" in page
    # Misalignment, loss curves, router entropy and the sizes of outputs.
    assert page.count("data:image/png;base64") == 4 and "What routers and experts do" in page
    assert "@TITLE@" not in page and not re.search(r'(src|href)="(?!data:)', page)


@pytest.mark.slow
def test_an_interrupted_audit_goes_on_where_it_stopped(audited, models, texts, monkeypatch):
    record = audited / RECORD
    lines = record.read_text().splitlines(keepends=True)
    wanted = json.loads((audited / "audit.json").read_text())
    record.write_text("".join(lines[:8]) + lines[8][:20])  # killed in the middle of a line
    measured = []

    def watch(source, text, valid, ablations, **how):
        measured.extend(ablations)
        return ablate(source, text, valid, ablations, **how)

    ablate = audit_stage.ablate
    monkeypatch.setattr(audit_stage, "ablate", watch)
    assert command.run("audit", models / "single", *arguments(texts, audited)) == 0
    assert len(measured) == 17 - 7
    assert json.loads((audited / "audit.json").read_text()) == wanted
    measured.clear()
    assert command.run("audit", models / "single", *arguments(texts, audited)) == 0
    assert not measured
    assert command.run("audit", models / "single", *arguments(texts, audited), "--overwrite") == 0
    assert len(measured) == 17 and json.loads((audited / "audit.json").read_text()) == wanted


def test_losses_of_another_text_are_not_taken_over(audited, models, texts, tmp_path):
    record = audited / RECORD
    (tmp_path / RECORD).write_text(record.read_text())
    assert read_record(record, json.loads(record.read_text().splitlines()[0]))
    assert not read_record(record, {"model_hash": "other"})


def test_a_scored_folder_is_audited_without_scoring_again(scored, tmp_path, capsys):
    before = command.snapshot(scored)
    out = tmp_path / "elsewhere"
    assert command.run("audit", scored, "--experts", 2, "--channels", 0, "--output", out) == 0
    assert command.snapshot(scored) == before
    assert {path.name for path in out.iterdir()} == {
        "audit.json", "audit.csv", "audit.html", RECORD,
    }  # fmt: skip
    shown = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "4 of 4 ablations left to measure" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--experts", -1), "experts=-1 must be at least 0; change --experts"),
        (("--tokens", 1), "tokens=1 must be at least 2"),
        (("--experts", 0, "--channels", 0), "leave nothing to measure"),
    ],
)
def test_a_sample_that_measures_nothing_is_refused(scored, capsys, flags, message):
    assert message in command.refused(capsys, scored, "audit", scored, *flags)


@pytest.mark.slow
def test_a_record_keeps_what_was_measured_under_every_key(scored, tmp_path, capsys):
    out = tmp_path / "out"

    def left(tokens: int) -> tuple[str, bytes]:
        sizes = ("--experts", 2, "--channels", 0, "--tokens", tokens, "--output", out)
        assert command.run("audit", scored, *sizes) == 0
        shown = re.sub(r"\s+", " ", capsys.readouterr().err)
        return re.search(r"audit: (\d) of 4 ablations", shown)[1], (out / "audit.json").read_bytes()

    count, first = left(64)
    assert count == "4"
    count, second = left(256)  # another text
    assert count == "4" and second != first
    assert left(64) == ("0", first) and left(256) == ("0", second)
    record = out / RECORD
    record.write_text(record.read_text() + '{"layer"')  # killed in the middle of a line
    assert left(64) == ("0", first)
    for line in ("[]", "{", "{}", "1"):
        record.write_text(line + "\n")
        shown = command.refused(capsys, out, "audit", scored, "--experts", 2, "--output", out)
        assert "ablations.jsonl:1 is damaged; remove the file" in shown
