"""Whoever measures on text that calibration has shown is told so."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.report.comparison import Comparison
from pruning.text.calibration import TokenBatch
from pruning.text.held_out import MUCH, RUN, not_held_out, seen_shares
from pruning.text.windows import make_windows
from tests.support import command


def runs(tokens: np.ndarray, valid: np.ndarray) -> set[tuple]:
    rows = (row[mask].tolist() for row, mask in zip(tokens, valid, strict=True))
    return {tuple(row[i : i + RUN]) for row in rows for i in range(len(row) - RUN + 1)}


@settings(deadline=None)
@given(st.data())
def test_a_share_is_that_of_the_sets_of_runs(data):
    words = st.integers(0, data.draw(st.sampled_from([1, 2, 50])))
    length = data.draw(st.integers(RUN - 1, 40))
    tokens = np.array(data.draw(st.lists(st.lists(words, min_size=length, max_size=length),
                                         min_size=1, max_size=4)), np.int32)  # fmt: skip
    filled = data.draw(st.lists(st.integers(0, length), min_size=len(tokens),
                                max_size=len(tokens)))  # fmt: skip
    valid = np.arange(length) < np.array(filled)[:, None]
    own = data.draw(st.lists(words, min_size=2, max_size=40))
    text = [*own, *tokens[0, : data.draw(st.integers(0, length))].tolist()]
    windows = make_windows(text, window=data.draw(st.integers(2, 30)))
    known, wanted = runs(tokens, valid), runs(windows.tokens, windows.valid)
    found = seen_shares(TokenBatch(tokens, valid), {"text": windows})["text"]
    assert found == (len(wanted & known) / len(wanted) if wanted else None)


@pytest.mark.parametrize(("length", "wanted"), [(12, None), (13, 1.0), (14, 0.5)])
def test_a_share_needs_a_row_of_thirteen_tokens(length, wanted):
    known = TokenBatch(np.arange(13, dtype=np.int32)[None], np.ones((1, 13), bool))
    windows = make_windows(list(range(length)), window=length)
    assert seen_shares(known, {"text": windows}) == {"text": wanted}


def test_only_a_share_that_matters_is_spoken_of():
    assert not_held_out({}) == not_held_out({"short": None, "other": 0.99 * MUCH}) == ""
    said = not_held_out({"wiki": 1.0, "other": 0.0, "code": MUCH})
    assert "100% of wiki, 10% of code" in said and "other" not in said.split("so the loss")[0]


def test_a_run_that_measures_on_its_own_calibration_text_says_so_everywhere(
    models, texts, tmp_path, capsys
):
    other = tmp_path / "other.txt"
    other.write_text("Pack my box with five dozen liquor jugs; how vexingly quick they are. " * 5)
    capsys.readouterr()
    assert command.run(
        "compress", models / "single", *command.given(texts, tmp_path / "out"), "--bits", 16,
        "--evaluation", texts / "good.txt", other,
    ) == 0  # fmt: skip
    said = "Calibration has shown at least 100% of good (runs of 13 tokens)"
    shown = capsys.readouterr()
    before_work = shown.err.index(said) < shown.err.index("score ")
    assert before_work and said in " ".join(shown.out.split())
    seen = json.loads((tmp_path / "out/report.json").read_text())["evaluation"]["seen"]
    assert seen == {"good": 1.0, "other": 0.0}
    card = tmp_path / "out/exports/ragged-bf16/README.md"
    assert said in card.read_text() and said in (tmp_path / "out/report.html").read_text()


def test_a_comparison_on_its_own_calibration_text_says_so(models, texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert command.run(
        "compare", models / "single", *command.read(texts, out), "--block", 8,
        "--evaluation", texts / "good.txt", "--rules", "random", "--prune-rate", 0.5,
    ) == 0  # fmt: skip
    said = "Calibration has shown at least 100% of good"
    assert said in " ".join(capsys.readouterr().err.split())
    assert said in (out / "compare.html").read_text()
    # A folder of a version that did not know is gone on with.
    stored = json.loads((out / "compare.json").read_text())
    assert stored.pop("seen") == {"good": 1.0}
    (out / "compare.json").write_text(json.dumps(stored))
    assert Comparison.load(out / "compare.json").seen == {}
    assert command.run(
        "compare", models / "single", *command.read(texts, out), "--block", 8,
        "--evaluation", texts / "good.txt", "--rules", "random", "--prune-rate", 0.5,
    ) == 0  # fmt: skip
