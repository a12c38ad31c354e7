"""A sweep's files say what its plans weigh and lose, and its page shows it."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from pruning.report.rates import Sweep, SweepPoint
from pruning.report.rates_page import plot_sizes, plot_texts, sweep_page
from tests.support.command import refused, run

RATES = (0.5, 0, 0.25)


def rows(folder) -> list[dict]:
    return list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def planned(scored, tmp_path_factory):
    out = shutil.copytree(scored, tmp_path_factory.mktemp("planned") / "out")
    assert run("--quiet", "plan", out, "--prune-rate", *RATES) == 0
    return out


def test_a_sweep_of_plans_says_what_each_keeps(planned):
    found = rows(planned)
    assert [(row["model"], float(row["rate"])) for row in found] == [
        ("dense", 0), ("pruned", 0), ("pruned", 0.25), ("pruned", 0.5),
    ]  # fmt: skip
    sums = load_file(planned / "statistics.safetensors")
    score = np.maximum(sums["shapley"], 0.0)
    for row in found[1:]:
        keep = load_file(planned / "plans" / str(float(row["rate"])) / "plan.safetensors")
        masks = np.stack([keep["keep.0"], keep["keep.1"]])
        assert int(row["kept"]) == masks.sum()
        layers = (score * masks).sum(axis=(1, 2)) / score.sum(axis=(1, 2))
        assert float(row["coverage"]) == pytest.approx(layers.mean(), rel=1e-9)
    assert found[0]["kept"] == found[1]["kept"] == str(2 * 8 * 64)


def test_the_predicted_bytes_are_those_of_the_written_file(planned):
    for row in rows(planned)[1:]:
        folder = planned / "plans" / str(float(row["rate"]))
        assert run("--quiet", "export", folder, "--overwrite", "--export", "ragged-bf16") == 0
        written = folder / "exports" / "ragged-bf16" / "model.safetensors"
        assert int(row["bytes_ragged-bf16"]) == written.stat().st_size


def test_an_evaluated_sweep_has_the_numbers_of_its_json(scored, texts, tmp_path, capsys):
    out = shutil.copytree(scored, tmp_path / "out")
    other = tmp_path / "other.txt"
    other.write_text("Pack my box with five dozen liquor jugs. " * 6)
    names = [str(texts / "good.txt"), str(other)]
    json_path = tmp_path / "q.json"
    arguments = ("--prune-rate", 0.5, 0.25, "--text", *names, "--json", json_path)
    assert run("eval", out, *arguments) == 0
    assert "out/sweep.html" in capsys.readouterr().out
    measured = json.loads(json_path.read_text())["texts"]
    found = rows(out)
    assert len(found) == 3 * 2
    for row in found:
        name = "dense" if row["model"] == "dense" else f"prune-rate {row['rate']}"
        expected = measured[name][row["text"]]
        assert float(row["nll"]) == expected["nll"] and int(row["tokens"]) == expected["tokens"]
        added = expected["nll"] - measured["dense"][row["text"]]["nll"]
        assert float(row["added"]) == pytest.approx(added, abs=1e-12)
        for key in ("kl", "top1"):
            assert row[key] == ("" if name == "dense" else str(expected[key]))
    text = (out / "sweep.html").read_text()
    assert text.count('src="data:image/png;base64,') == len(re.findall("src=", text)) == 2


def test_one_rate_is_no_sweep(scored, texts, tmp_path):
    out = shutil.copytree(scored, tmp_path / "out")
    assert run("--quiet", "plan", out, "--prune-rate", 0.25) == 0
    assert run("--quiet", "eval", out, "--prune-rate", 0.25, "--text", texts / "good.txt") == 0
    assert not list(out.glob("sweep.*"))


def test_a_bad_rate_writes_nothing(scored, tmp_path, capsys):
    out = shutil.copytree(scored, tmp_path / "out")
    shown = refused(capsys, tmp_path, "plan", out, "--prune-rate", 0.25, 0.999)
    assert "the budget of 1 channels is below" in shown


def sweep(texts=()) -> Sweep:
    """Two formats at two rates, by hand."""

    def point(rate, loss):
        quality = {t: {"nll": 2 + n + loss * (n + 1), "perplexity": 1.0, "tokens": 9, "kl": loss,
                       "top1": 1 - loss} for n, t in enumerate(texts)}  # fmt: skip
        size = round(1e6 * (4 - 3 * rate))
        return SweepPoint(rate, round(96 * (1 - rate)), 1 - rate / 2,
                          {"ragged-int4": size // 4, "ragged-bf16": size}, quality)  # fmt: skip

    return Sweep("act", point(0.0, 0.0), (point(0.25, 0.1), point(0.5, 0.3)))


def test_losses_are_averaged_over_texts_and_sizes_shown_in_megabytes():
    table = sweep(["a.txt", "b.txt"]).table()
    assert table.rows[0] == ["dense", "96", "100.0%", "1.00", "4.00", "0", "", ""]
    # added 0.1 and 0.2
    assert table.rows[1][3:] == ["0.81", "3.25", "+0.1500", "0.1000", "90.0%"]
    assert sweep().table().header[-1] == "MB ragged-bf16"


def test_the_size_plot_has_every_format_at_its_megabytes_and_says_its_units():
    (axes,) = plot_sizes(sweep(["a.txt"])).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_allclose(lines["ragged-bf16"].get_xdata(), [4.0, 3.25, 2.5])
    np.testing.assert_allclose(lines["ragged-bf16"].get_ydata(), [0.0, 0.1, 0.3])
    assert "MB" in axes.get_xlabel() and axes.get_ylabel() == "nats per token added"
    (axes,) = plot_sizes(sweep()).axes
    assert axes.get_ylabel() == "share of act removed"
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), [0.0, 0.125, 0.25])
    (axes,) = plot_texts(sweep(["a.txt", "b.txt"])).axes
    np.testing.assert_allclose(axes.get_lines()[1].get_ydata(), [0.0, 0.2, 0.6])


def test_the_page_loads_nothing_and_says_when_no_loss_was_measured():
    for found, pictures in ((sweep(), 1), (sweep(["<b>.txt", "c"]), 2)):
        text = sweep_page(found)
        assert not re.search(r"https?://|<script|<link|<b>\.txt", text)
        assert text.count("data:image/png") == pictures
        assert ("No text was measured" in text) == (pictures == 1)
