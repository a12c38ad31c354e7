"""The report survives its file, stands alone as a page, and refuses broken numbers."""

import json
import re

import numpy as np
import pytest

from pruning.plots import concentration
from pruning.report import CompressionReport, figures, html

L, E, F = 3, 4, 8


def report(**changes) -> CompressionReport:
    rng = np.random.default_rng(0)
    fractions, curves = concentration(rng.lognormal(size=(L, E, F)), points=5)
    size = {"bytes": 250, "parameters": 400, "bits_per_parameter": 5.0, "padded_bytes": None}
    quality = {"nll": 2.0, "perplexity": 7.4, "tokens": 9, "kl": None, "top1": None}
    check = {"export": "ragged-int4", "check": "reload", "ok": True, "detail": "a < b"}
    fields = {
        "model": {"path": "<b>m</b>", "family": "f", "parameters": 500, "bytes": 1000},
        "recipe": {"prune_rate": 0.5},
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
        "sizes": {"source_bytes": 1000, "channels": 96, "channels_kept": 48,
                  "exports": {"ragged-int4": size}},
        "quality": {"held-out": {"dense": quality}},
        "evaluation": {"window": 16, "stride": 16},
        "stages": [{"name": "score", "seconds": 1.0, "peak_memory_bytes": 10}],
        "sample": {"prompt": "<script>x</script>", "dense": "a", "compressed": "b"},
        "verification": [check],
    }  # fmt: skip
    return CompressionReport(**{**fields, **changes})


def test_a_saved_report_loads_equal(tmp_path):
    report().save(tmp_path)
    assert CompressionReport.load(tmp_path / "report.json") == report()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_report_of_another_version_is_refused(tmp_path):
    report().save(tmp_path)
    file = tmp_path / "report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))
    with pytest.raises(ValueError, match="version 1"):
        CompressionReport.load(file)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(broken):
    with pytest.raises(ValueError, match="layer_coverage"):
        report(layer_coverage=[0.5, broken, 0.5])


def test_the_page_loads_nothing_shows_every_plot_and_escapes_text():
    page = html(report())
    assert not re.search(r"https?://|<script|<link|<b>", page)
    assert page.count('src="data:image/png;base64,') == len(re.findall("src=", page)) == 4
    assert "&lt;script&gt;" in page and "&lt;b&gt;m&lt;/b&gt;" in page


def test_every_plot_says_what_its_axes_are():
    for figure, caption in figures(report()):
        panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
        assert caption and all(axes.get_ylabel() for axes in panels)
        assert panels[-1].get_xlabel()


def test_concentration_is_the_share_of_the_best_channels():
    fractions, curves = concentration(np.array([[[1.0, 4.0, 2.0, 3.0], [0.0] * 4]]), points=5)
    np.testing.assert_allclose(fractions, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(curves[0], [[0, 0.4, 0.7, 0.9, 1], fractions], atol=1e-15)
