"""Texts at the edges: a separator that is not the padding, shares that fill whole windows."""

import json

import numpy as np
import pytest

from pruning.text.calibration import calibration_batch, hold_out
from pruning.text.source import TextSource
from pruning.text.windows import make_windows

END = 7  # neither the padding nor a letter


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def in_pairs(text: str) -> list[int]:
    """A tokenizer of two tokens a character."""
    return [code for c in text for code in (1000, ord(c))]


def lines(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextSource(path)


def test_the_separator_stands_between_documents_and_the_padding_after_them(tmp_path):
    source = lines(tmp_path / "a.jsonl", "a" * 37, "b" * 41, "c" * 29)
    batch = calibration_batch([source], encode, length=25, max_tokens=1000, separator=END)
    stream = batch.tokens[batch.valid]
    assert batch.total == 37 + 41 + 29 + 2 == stream.size
    inside = np.flatnonzero(stream == END)
    parts = ["".join(map(chr, part)) for part in np.split(stream[stream != END], inside - [0, 1])]
    assert sorted(parts) == ["a" * 37, "b" * 41, "c" * 29]
    assert not batch.tokens[~batch.valid].any() and (~batch.valid).sum() == 125 - 109
    assert batch.valid[:4].all() and batch.valid[4].tolist() == [True] * 9 + [False] * 16
    without = calibration_batch([source], encode, length=25, max_tokens=1000)
    assert without.total == 107 and END not in without.tokens


def test_a_separator_counts_towards_the_tokens_and_ends_no_text(tmp_path):
    source = lines(tmp_path / "a.jsonl", *("x" * 30 for _ in range(4)))
    for most in (91, 92, 93, 94, 123):
        batch = calibration_batch([source], encode, length=31, max_tokens=most, separator=END)
        wanted = ([*[ord("x")] * 30, END] * 4)[:-1][:most]
        assert batch.tokens[batch.valid].tolist() == wanted


@pytest.mark.parametrize("share", [64, 96, 128])
def test_a_share_that_fills_whole_windows_has_no_window_of_padding(tmp_path, share):
    for name, size in (("a", 32), ("b", 1000)):
        (tmp_path / name).write_text(name * size)
    sources = [TextSource(tmp_path / "a"), TextSource(tmp_path / "b")]
    batch = calibration_batch(sources, encode, length=32, max_tokens=32 + share)
    assert batch.tokens.shape == (1 + share // 32, 32) and batch.valid.all()
    assert [note["tokens"] for note in batch.sources] == [32, share]
    assert (batch.tokens[0] == ord("a")).all() and (batch.tokens[1:] == ord("b")).all()
    one_more = calibration_batch(sources, encode, length=32, max_tokens=33 + share)
    assert one_more.tokens.shape == (2 + share // 32, 32)
    assert one_more.valid.sum() == 33 + share and one_more.valid[-1].sum() == 1


def test_the_number_of_tokens_is_kept_by_a_tokenizer_of_more_than_one_a_character(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(100 + i % 50) for i in range(500)))
    for most in (64, 65, 999, 1000):
        batch = calibration_batch([TextSource(tmp_path / "a.txt")], in_pairs, length=50,
                                  max_tokens=most)  # fmt: skip
        wanted = in_pairs((tmp_path / "a.txt").read_text())[:most]
        assert batch.tokens[batch.valid].tolist() == wanted


def test_windows_set_aside_are_spread_over_the_files(tmp_path):
    sources = []
    for name in "abcd":
        (tmp_path / name).write_text(name * 320)
        sources.append(TextSource(tmp_path / name))
    batch = calibration_batch(sources, encode, length=10, max_tokens=1280)
    left, held = hold_out(batch)
    assert len(held.tokens) == 8 and len(left.tokens) == 120
    counts = [int((held.tokens[:, 0] == ord(name)).sum()) for name in "abcd"]
    assert counts == [2, 2, 2, 2]
    assert not (held.tokens[:, 0][:-1] > held.tokens[:, 0][1:]).any()


@pytest.mark.parametrize("size", [2, 7, 8, 9, 12, 16, 17, 20, 24])
@pytest.mark.parametrize("stride", [1, 4, 7, None])
def test_every_token_but_the_first_is_scored_once_with_the_most_it_may_see(size, stride):
    text = np.arange(100, 100 + size)
    windows = make_windows(text, window=8, stride=stride)
    seen: dict[int, int] = {}
    for row, valid, scored in zip(windows.tokens, windows.valid, windows.scored, strict=True):
        tokens = row[valid].tolist()
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        assert not row[~valid].any() and not scored[len(tokens) - 1 :].any()
        for t in np.flatnonzero(scored):
            assert int(row[t + 1]) not in seen
            seen[int(row[t + 1])] = t + 1  # tokens before it in the window
    assert sorted(seen) == list(range(101, 100 + size))
    step = stride or 4
    assert all(before == token - 100 for token, before in seen.items() if token < 108)
    assert all(before >= 8 - step for token, before in seen.items() if token >= 108)
    # No window that scores nothing, and none is longer than the text.
    assert windows.scored.any(axis=1).all()
    assert len(windows.tokens) == 1 + max(0, -(-(size - 8) // step))
