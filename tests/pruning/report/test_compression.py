"""The report survives its file, stands alone as a page, and refuses broken numbers."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from pruning.budget.planners import PLANNERS
from pruning.budget.widths import WIDTHS
from pruning.report import compression_page
from pruning.report.compression import CompressionReport
from pruning.report.compression_page import (
    ONE_LEVEL,
    checks_table,
    main_figures,
    other_figures,
    page,
)
from pruning.report.compression_tables import (
    POLICIES,
    allocation_table,
    causes_table,
    layer_table,
    losses_table,
    verification_table,
)
from pruning.report.figures import concentration
from pruning.report.html import section_html
from pruning.report.severity import SCALE
from pruning.report.table import TextTable
from tests.support.command import run

L, E, F = 3, 4, 8
UNEVEN = {
    "gini": [0.1234, 0.5, 0.25], "fraction_holding": [0.75, 0.5, 0.625],
    "model": {"gini": 0.4321, "fraction_holding": 0.3125},
}  # fmt: skip


def report(**changes) -> CompressionReport:
    rng = np.random.default_rng(0)
    fractions, curves = concentration(rng.lognormal(size=(L, E, F)), points=5)
    size = {"bytes": 250, "parameters": 400, "bits_per_parameter": 5.0, "padded_bytes": None}
    quality = {"nll": 2.0, "perplexity": 7.4, "tokens": 9, "kl": None, "top1": None}
    check = {"export": "ragged-int4", "check": "reload", "ok": True, "detail": "a < b"}
    fields = {
        "model": {"path": "<b>m</b>", "family": "f", "parameters": 500, "bytes": 1000},
        "recipe": {"prune_rate": 0.5},
        "environment": {"date": "2026-11-24", "cores": 2},
        "calibration": {"tokens": 64, "sources": []},
        "plan": {},
        "layer_indices": [1, 2, 4],
        "d_expert": F,
        "counts": rng.integers(0, F + 1, (L, E)).tolist(),
        "attribution": rng.random((L, E)).tolist(),
        "expert_coverage": rng.random((L, E)).tolist(),
        "layer_coverage": rng.random(L).tolist(),
        "layer_loss": {"raw": [1.0, 2.0, 3.0], "smoothed": [0.8, 1.0, 1.2]},
        "concentration": {"fractions": fractions.tolist(), "curves": curves.tolist()},
        "quantization": [],
        "sizes": {"source_bytes": 1000, "channels": 96, "channels_kept": 48,
                  "exports": {"ragged-int4": size}},
        "quality": {"held-out": {"dense": quality}},
        "evaluation": {"window": 16, "stride": 16},
        "stages": [{"name": "score", "seconds": 1.0, "peak_memory_bytes": 10}],
        "sample": {"prompt": "<script>x</script>", "dense": "a", "compressed": "b",
                   "export": "ragged-int4"},
        "verification": [check],
    }  # fmt: skip
    return CompressionReport(**{**fields, **changes})


def figures(found: CompressionReport) -> list:
    return [*main_figures(found), *other_figures(found)]


def test_a_saved_report_loads_equal(tmp_path):
    report().save(tmp_path)
    compression_page.save(report(), tmp_path)
    assert CompressionReport.load(tmp_path / "report.json") == report()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_report_of_another_version_is_refused(tmp_path):
    report().save(tmp_path)
    file = tmp_path / "report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 1}))
    with pytest.raises(ValueError, match="version 3"):
        CompressionReport.load(file)


@pytest.mark.parametrize(
    ("field", "damage"),
    [
        ("sizes", lambda r: r["sizes"]["exports"]["ragged-int4"].pop("bits_per_parameter")),
        ("sizes", lambda r: r["sizes"]["exports"]["ragged-int4"].update(bytes=0)),
        ("sizes", lambda r: r["sizes"]["exports"].clear()),
        ("quality", lambda r: r["quality"]["held-out"].clear()),
        ("quality", lambda r: r["quality"]["held-out"]["dense"].update(nll="2.0")),
        ("quality", lambda r: r["quality"]["held-out"]["dense"].update(nll=1e6)),
        ("counts", lambda r: r["counts"][1].pop()),
        ("attribution", lambda r: r["attribution"].pop()),
        ("layer_coverage", lambda r: r["layer_coverage"].__setitem__(0, 1e200)),
        ("layer_loss", lambda r: r["layer_loss"].update(raw={})),
        ("concentration", lambda r: r["concentration"]["curves"][0][0].pop()),
        ("concentration", lambda r: r["concentration"].update(gini=[0.5] * L)),
        ("concentration", lambda r: r["concentration"].update(UNEVEN, gini=[0.5])),
        ("concentration", lambda r: r["concentration"].update(UNEVEN, model={"gini": 0.5})),
        ("calibration", lambda r: r["calibration"].update(sources=[{"path": "x"}])),
        ("calibration", lambda r: r["calibration"].update(stability={"tokens": [1]})),
        ("quantization", lambda r: r["quantization"].append({"nearest": 1.0})),
        ("plan", lambda r: r["plan"].update(starved_experts=[1])),
        ("plan", lambda r: r["plan"].update(coverage_optimum=0.5)),
        ("verification", lambda r: r["verification"][0].update(more=1)),
        ("verification", lambda r: r["verification"][0].update(ok="yes")),
        ("random", lambda r: r.update(random={"seed": 0})),
        ("loading", lambda r: r.update(loading={"ragged-int4": {}})),
        ("alone", lambda r: r.update(alone={"ragged-int4": {"pruned_bytes": 1}})),
        ("alone", lambda r: r.update(alone={"a": {"pruned_bytes": 0, "rounded_bytes": None}})),
        ("alone", lambda r: r.update(alone={"a": {"pruned_bytes": 1, "rounded_bytes": -1}})),
        ("environment", lambda r: r["environment"].pop("date")),
        ("stages", lambda r: r["stages"][0].update(seconds=None)),
    ],
)
def test_a_report_that_is_damaged_at_depth_is_refused_by_the_name_of_its_field(
    field, damage, tmp_path, capsys
):
    report().save(tmp_path)
    page, file = tmp_path / "report.html", tmp_path / "report.json"
    page.write_text("of an earlier run")
    values = json.loads(file.read_text())
    damage(values)
    file.write_text(json.dumps(values))
    assert run("--quiet", "report", tmp_path) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert shown == f"moe-compress: {file} is damaged ({field}); remove it and compress again"
    assert page.read_text() == "of an earlier run"


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(broken):
    with pytest.raises(ValueError, match="layer_coverage"):
        report(layer_coverage=[0.5, broken, 0.5])


def test_the_page_loads_nothing_shows_every_plot_and_escapes_text():
    text = page(report())
    assert not re.search(r"https?://|<script|<link|<b>m", text)
    assert text.count('src="data:image/png;base64,') == len(re.findall("src=", text)) == 5
    assert "&lt;script&gt;" in text and "&lt;b&gt;m&lt;/b&gt;" in text


def test_what_gptq_did_in_every_layer_is_drawn_and_its_fallbacks_are_told():
    layers = [{"nearest": 0.02, "gptq": 0.01, "matrices": 30, "fallbacks": 2},
              {"nearest": 0.03, "gptq": 0.02, "matrices": 30, "fallbacks": 1}]  # fmt: skip
    (figure, caption), = [pair for pair in figures(report(quantization=layers))
                          if "rounded to nearest" in pair[1]]  # fmt: skip
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in figure.axes[0].lines}
    np.testing.assert_array_equal(lines["GPTQ"], [0.01, 0.02])
    np.testing.assert_array_equal(lines["rounded to nearest"], [0.02, 0.03])
    assert "3 of 60 matrices" in caption


def settled(**changes) -> CompressionReport:
    stability = {"tokens": [10, 20, 40], "jaccard": [None, 0.9, 0.95], "halves": 0.8, **changes}
    return report(calibration={"tokens": 40, "sources": [], "stability": stability},
                  recipe={"prune_rate": 0.5, "until_stable": 0.98})  # fmt: skip


def test_the_page_shows_how_the_kept_set_settled_if_that_is_known():
    text = page(settled())
    assert text.count("data:image/png") == 6 and "here 80.0%" in text
    unknown = settled(jaccard=[None] * 3, halves=None)  # a criterion that needs the whole text
    assert len(figures(unknown)) == 5
    figure, _ = figures(settled())[-1]
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    curve = lines["before and after each part"]
    np.testing.assert_array_equal(curve.get_xdata(), [20, 40])
    np.testing.assert_array_equal(curve.get_ydata(), [0.9, 0.95])
    assert set(lines["halves of the text"].get_ydata()) == {0.8}
    assert set(lines["enough to stop"].get_ydata()) == {0.98}
    # 48 of 96 channels: two random halves share a quarter of all and cover three quarters.
    np.testing.assert_allclose(lines["random sets"].get_ydata(), 1 / 3)


def test_two_halves_that_were_not_compared_are_left_out_of_the_plot():
    figure, caption = figures(settled(halves=None))[-1]
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert "halves of the text" not in labels and "here" not in caption


def test_a_report_without_text_says_so_everywhere():
    recipe = {"prune_rate": 0.5, "criterion": "weight", "attribution": "aimer"}
    found = report(
        calibration={"tokens": 0, "sources": [], "stability": None}, recipe=recipe,
        layer_loss={"raw": [1.0] * L, "smoothed": [1.0] * L},
    )  # fmt: skip
    text = page(found)
    assert "No calibration text was read: the weights alone decided (criterion weight" in text
    assert "<p>No text.</p>" in text and "all layers count alike" in text
    assert text.count("data:image/png") == 4
    assert found.headlines()[2].number == "no text"
    assert "No calibration text" not in page(report())


def test_the_page_shows_the_routers_of_a_text():
    routers = {"router_entropy": [1.0, 0.5, 0.7], "usage": np.full((L, E), 1 / E).tolist()}
    found = report(calibration={"tokens": 64, "sources": [], **routers})
    assert len(figures(found)) == len(figures(report())) + 1
    figure = next(f for f, caption in figures(found) if "entropy of the router" in caption)
    assert figure.axes[0].get_lines()[0].get_ydata().tolist() == routers["router_entropy"]


def test_the_page_draws_the_smoothing_of_the_recipe_thickest():
    found = report(recipe={"prune_rate": 0.5, "smoothing": "huber"})
    figure = next(f for f, caption in figures(found) if "under each smoothing" in caption)
    widths = {line.get_label(): line.get_linewidth() for line in figure.axes[0].get_lines()}
    assert max(widths, key=lambda label: widths[label]) == "Huber tail"


def test_every_plot_says_what_its_axes_are():
    for figure, caption in figures(settled()):
        panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
        assert caption and all(axes.get_ylabel() for axes in panels)
        assert panels[-1].get_xlabel()


def test_concentration_is_the_share_of_the_best_channels():
    fractions, curves = concentration(np.array([[[1.0, 4.0, 2.0, 3.0], [0.0] * 4]]), points=5)
    np.testing.assert_allclose(fractions, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(curves[0], [[0, 0.4, 0.7, 0.9, 1], fractions], atol=1e-15)


def measured() -> CompressionReport:
    """Two texts of very different length, with quality by hand."""

    def value(nll, tokens, kl=None, top1=None):
        return {"nll": nll, "perplexity": np.exp(nll), "tokens": tokens, "kl": kl, "top1": top1}

    quality = {
        "a-long-name-of-a-text-file-in-a-folder": {
            "dense": value(2.0, 300),
            "ragged-int4": value(2.2, 300, 0.1, 0.9),
        },
        "b": {"dense": value(3.0, 100), "ragged-int4": value(3.6, 100, 0.4, 0.5)},
    }
    return report(quality=quality)


def test_the_headline_is_the_mean_over_all_tokens_of_the_smallest_export():
    smaller, lost, tokens = measured().headlines()
    assert smaller.number == "4.00" and "ragged-int4" in smaller.detail
    assert lost.number == "+0.300"  # (300 * 0.2 + 100 * 0.6) / 400
    assert "1.350" in lost.detail and "80.0%" in lost.detail  # exp(0.3); 0.75 * 90 + 0.25 * 50
    assert tokens.number == "64" and "400" in tokens.detail


def test_the_headline_says_so_when_nothing_was_measured():
    _, lost, tokens = report(quality={}).headlines()
    assert "--evaluation" in lost.detail and "none" in tokens.detail


def test_parameters_and_those_that_a_token_meets_stand_beside_what_they_were():
    sizes = report().sizes | {"active_parameters": {"source": 2_500_000, "exports": 1_234_567}}
    sizes["exports"] = {"ragged-int4": sizes["exports"]["ragged-int4"] | {"parameters": 4_000_000}}
    model = report().model | {"parameters": 9_990_000}
    rows = allocation_table({}, sizes, model, {}).rows
    assert rows[0] == ["parameters", "4.00 M", "of 9.99 M"]
    assert rows[1][:2] == ["active parameters", "1.23 M"] and "2.50 M" in rows[1][2]
    assert rows[2][0] != "active bytes"
    sizes["exports"] = {name: sizes["exports"]["ragged-int4"] | {"active_bytes": read}
                        for name, read in (("ragged-bf16", 52_300_000), ("ragged-int4", 14_600_000))
                        }  # fmt: skip
    assert allocation_table({}, sizes, model, {}).rows[2] == [
        "active bytes", "14.6 MB", "that a token reads: ragged-bf16 52.3 MB; ragged-int4 14.6 MB"
    ]  # fmt: skip


def test_how_unevenly_channels_share_the_score_stands_by_layer_and_for_the_model():
    about = ([[8] * E] * L, [1.0] * L, [1, 2, 4], F, "act")
    table = layer_table(*about, report().concentration | UNEVEN)
    assert table.header[-2:] == ["Gini", "hold 90%"]
    assert [row[-2:] for row in table.rows] == [
        ["0.123", "75.0%"], ["0.500", "50.0%"], ["0.250", "62.5%"],
    ]  # fmt: skip
    assert layer_table(*about, report().concentration).header == table.header[:-2]
    rows = allocation_table({}, report().sizes, report().model, UNEVEN).rows
    assert ["Gini of the score", "0.432", "31.2% of the channels hold 90% of the score"] in rows


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_narrow_terminal_folds_names_and_cuts_nothing(columns):
    console = Console(width=columns, file=io.StringIO(), record=True)
    console.print(measured().terminal_table())
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= columns
    text = "\n".join(lines)
    assert "…" not in text
    quality = text[text.index("Quality") : text.index("Verification")]
    first = "".join(line.split()[0] for line in quality.splitlines() if line.strip())
    assert "a-long-name-of-a-text-file-in-a-folder" in first.replace("ragged-int4", "")


def test_numbers_stand_on_the_right_and_words_on_the_left():
    quality = next(table for table in measured().tables() if table.title == "Quality")
    kinds = {name: quality.is_number(i) for i, name in enumerate(quality.header)}
    words = {name for name, number in kinds.items() if not number}
    assert words == {"text", "model"}


def test_every_width_policy_is_said_in_words():
    assert set(POLICIES) == set(WIDTHS)


def test_names_are_not_broken_at_their_hyphens_and_paths_may_be():
    path = "data/" + "very-long-name/" * 4
    html = section_html(TextTable("Rules", ["rule", "text"], [["fair-shapley", path]]))
    assert "<td><span>fair-shapley</span></td>" in html and f"<td>{path}</td>" in html


def test_the_page_has_a_row_for_every_layer():
    table = page(measured()).split("Layer by layer")[1].split("</table>")[0]
    assert table.count("<tr>") == 1 + L


def value(nll: float, tokens: int = 100, **more) -> dict:
    quality = {"nll": nll, "perplexity": np.exp(nll), "tokens": tokens, "kl": 0.1, "top1": 0.9}
    return quality | more


def whole(**changes) -> CompressionReport:
    """Everything that a report of today holds: one text lost much, the other little."""
    dense = {"kl": None, "top1": None}
    quality = {
        "long": {"dense": value(2.0, 300, **dense), "pruned": value(2.02, 300),
                 "ragged-int4": value(2.04, 300)},
        "short": {"dense": value(3.0, **dense), "pruned": value(3.1),
                  "ragged-int4": value(3.3)},
    }  # fmt: skip
    fields = {
        "recipe": {"model": "m", "output": "out", "prune_rate": 0.5},
        "quality": quality,
        "random": {"seed": 0, "kept": 48,
                   "quality": {"long": value(2.1, 300), "short": value(3.4)}},
        "alone": {"ragged-int4": {"pruned_bytes": 500, "rounded_bytes": 400}},
        "samples": [{"text": "long", "prompt": "<i>Once", "dense": " upon", "compressed": " a",
                     "export": "ragged-int4"},
                    {"text": "short", "prompt": "Two", "dense": "x", "compressed": "y",
                     "export": "ragged-int4"}],
        "loading": {"ragged-int4": {
            "form": "ragged-int4", "has_tokenizer": True, "has_latent_attention": False,
            "has_linear_attention": False,
            "clients": {"transformers 5": ["slower", "a loop"], "vLLM": ["no", "a reason"]},
        }},
        "command": "moe-compress compress 'my model' --output out",
    }  # fmt: skip
    return report(**{**fields, **changes})


def test_the_numbers_that_everybody_asks_for_first():
    found = whole()
    assert found.times_smaller() == found.times_smaller("ragged-int4") == 4.0
    assert found.bytes == 250 and found.kept_share == 0.5
    assert found.added_loss("short") == pytest.approx(0.3)
    assert found.added_loss() == pytest.approx((300 * 0.04 + 100 * 0.3) / 400)
    assert found.added_loss("long", "pruned") == pytest.approx(0.02)
    assert found.perplexity("short", "dense") == pytest.approx(np.exp(3.0))
    assert found.loss(model="random") == pytest.approx((300 * 2.1 + 100 * 3.4) / 400)
    # before rounding: 0.04 of 0.175
    assert found.of_random() == pytest.approx(0.04 / 0.175)
    assert found.of_random("short") == pytest.approx(0.25)
    assert [found.severity(text) for text in (None, "long", "short")] == [
        "noticeable", "small", "severe",
    ]  # fmt: skip


def test_what_was_not_measured_is_refused_by_name():
    with pytest.raises(ValueError, match="compress again with --evaluation"):
        report(quality={}).perplexity()
    with pytest.raises(ValueError, match="did you mean 'short'"):
        whole().added_loss("shrot")
    with pytest.raises(ValueError, match="model='random' is unknown"):
        whole(random={}).added_loss(model="random")
    with pytest.raises(ValueError, match="export='padded-int4' is unknown"):
        whole().times_smaller("padded-int4")
    assert whole(random={}).of_random() is None
    helpful = whole().random | {"quality": {"long": value(1.9, 300), "short": value(3.0)}}
    assert whole(random=helpful).of_random() is None  # random channels lose nothing


def test_the_page_answers_in_the_order_of_a_users_questions():
    text = page(whole())
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles == [
        "How much smaller, and by what", "How much worse", "What it writes", "How to load it",
        "How to repeat it", "What was checked", "What is kept", "Words",
    ]  # fmt: skip
    for words in (
        "Noticeable: ragged-int4 adds 0.105 nats per token to 2 texts",
        "0.23 of what random channels",
        "moe-compress compress &#39;my model&#39; --output out",
        "&lt;i&gt;Once", "<code>trust_remote_code</code>",
        "AutoModelForCausalLM.from_pretrained", "a reason",
    ):  # fmt: skip
        assert words in text
    assert "vllm serve" not in text


def test_sizes_of_pruning_and_of_rounding_alone_stand_beside_both():
    found = whole()
    rows = causes_table(found.sizes, found.alone).rows
    assert [(row[0], row[3]) for row in rows] == [
        ("as it was", "1.00"), ("pruning alone", "2.00"), ("rounding alone", "2.50"),
        ("pruning and rounding", "4.00"),
    ]  # fmt: skip
    assert rows[1][1] == "ragged-bf16"
    sizes = found.sizes | {"exports": {"ragged-bf16": found.sizes["exports"]["ragged-int4"]}}
    rows = causes_table(sizes, {"ragged-bf16": {"pruned_bytes": 250, "rounded_bytes": None}}).rows
    assert [row[0] for row in rows] == ["as it was", "pruning"]


def test_every_text_has_a_word_for_each_model_and_random_channels_beside_them():
    found = whole()
    table = losses_table(found.quality, found.random["quality"])
    rows = {(text, row[1]): row for text, row in zip("llllssss", table.rows, strict=True)}
    assert rows["s", "random channels"][2:5] == ["", "+0.4000", ""]
    assert rows["s", "pruned"][2:5] == ["noticeable", "+0.1000", "0.25"]
    assert rows["s", "ragged-int4"][2:5] == ["severe", "+0.3000", ""]
    assert rows["l", "ragged-int4"][2] == "small" and SCALE.words() in table.note
    assert "not measured" in losses_table(found.quality, {}).note


def test_a_report_of_an_earlier_version_renders_and_says_what_it_lacks(tmp_path):
    report().save(tmp_path)
    file = tmp_path / "report.json"
    stored = json.loads(file.read_text())
    for name in ("samples", "random", "alone", "loading", "command", "not_run"):
        del stored[name]
    file.write_text(json.dumps(stored))
    found = CompressionReport.load(file)
    assert found == report()
    text = page(found)
    assert "not measured: the report is of an earlier version" in text
    assert "does not say; the README.md of every export does" in text
    assert "moe-compress compress &#39;&lt;b&gt;m&lt;/b&gt;&#39; --prune-rate 0.5" in text
    assert "&lt;script&gt;" in text  # the one sample that it has
    del stored["counts"]
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="version 3"):
        CompressionReport.load(file)


def test_what_was_not_run_says_why():
    found = whole(
        quality={}, random={}, samples=[], verification=[], sample=dict.fromkeys(
            ("prompt", "dense", "compressed", "export"), ""),
        not_run={"random": "no text was named", "samples": "the model is too large"},
    )  # fmt: skip
    results = {row[0]: row[1:] for row in checks_table(found).rows}
    assert results["every export holds what was planned"] == ["not run", "not run"]
    assert results["loss on text"][0] == "not run"
    assert results["loss of random channels"] == ["not run", "no text was named"]
    assert results["text written by both models"] == ["not run", "the model is too large"]
    assert results["the choice repeats on other text"][0] == "not run"
    text = page(found)
    assert "No sample: the model is too large." in text and "Not measured: there was no" in text
    failed = [{"export": "ragged-int4", "check": "reload", "ok": False, "detail": ""}]
    assert checks_table(whole(verification=failed)).rows[0][1] == "1 FAILED"


@pytest.mark.slow
def test_a_check_of_an_export_is_ok_failed_or_not_done_and_says_why():
    name, row = "logits in transformers", "every export computes the same in transformers"
    said = {"export": "ragged-int4", "check": name, "ok": True, "detail": "not done: 1 GB is free"}
    other = {**said, "check": "tensors", "detail": "7 tensors"}
    for changes, word, result in (
        ({"done": False}, "not done", ["not run", "ragged-int4: not done: 1 GB is free"]),
        ({"done": True}, "ok", ["ok", "see below"]),
        ({}, "ok", ["ok", "see below"]),  # of an earlier version
        ({"ok": False, "done": True}, "FAILED", ["FAILED", "see below"]),
    ):
        found = whole(verification=[other, {**said, **changes}])
        rows = {line[0]: line[1:] for line in checks_table(found).rows}
        assert rows[row] == result
        assert verification_table(found.verification).rows[1][2] == word
        undone = ", 1 of them not done" if word == "not done" else ""
        assert rows["every export holds what was planned"][1] == f"2 checks{undone}"
        assert f"<td>{word}</td>" in page(found)
    nobody = {line[0]: line[1:] for line in checks_table(whole(verification=[other])).rows}
    assert nobody[row] == ["not run", "ragged-int4: it was not asked"]


def test_figures_that_do_not_matter_for_the_planner_are_folded():
    smoothings = "under each smoothing"
    for planner, weights, shown in (
        ("paper", None, True), ("mine", None, True), ("fair", None, False), ("fair", "paper", True),
    ):  # fmt: skip
        found = report(recipe={"prune_rate": 0.5, "planner": planner, "weights": weights})
        assert any(smoothings in caption for _, caption in main_figures(found)) == shown
        assert any(smoothings in caption for _, caption in other_figures(found)) != shown
    one_width = report(plan={"width": "uniform"})
    assert not any("widest first" in caption for _, caption in main_figures(one_width))
    assert set(PLANNERS) >= ONE_LEVEL
    text = page(report())
    for title in ("More figures", "Allocation", "Stages"):
        assert f"<details><summary>{title}" in text


def test_links_to_words_lead_to_the_glossary():
    text = page(whole())
    links = set(re.findall('href="#(.*?)"', text))
    assert len(links) > 5 and links <= set(re.findall('<dt id="(.*?)"', text))


def test_a_report_shows_headlines_and_tables_in_a_notebook():
    shown = report()._repr_html_()
    assert shown.startswith("<p><b>4.00 times smaller</b>") and "<h2>Quality</h2>" in shown
    assert "a &lt; b" in shown
