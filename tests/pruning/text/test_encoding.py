"""Tokens that a tokenizer puts first, and what counts: by loops over single tokens."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import InputError
from pruning.text.calibration import calibration_batch, token_stream
from pruning.text.conversation import Conversation
from pruning.text.encoding import encoded, with_first
from pruning.text.source import TextSource
from pruning.text.windows import make_windows, text_hashes


def encode(text) -> list[int]:
    if isinstance(text, Conversation):
        return [9, *(ord(c) for message in text.messages for c in message["content"])]
    return [ord(c) for c in text]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), max_size=2),
       st.integers(3, 9), st.integers(0, 40), st.integers(0, 7))  # fmt: skip
def test_every_window_begins_with_what_the_tokenizer_puts_first(stream, first, length, most, seed):
    counted = np.random.default_rng(seed).random(len(stream)) < 0.5
    tokens, marks = with_first(np.array(stream, np.int32), counted, first, length, most)
    assert tokens.dtype == np.int32 and marks.dtype == bool
    wanted: list[tuple[int, bool]] = []
    left = list(zip(stream, counted.tolist(), strict=True))
    while first and left:
        window = [] if [token for token, _ in left[: len(first)]] == first else [
            (token, False) for token in first
        ]  # fmt: skip
        while left and len(window) < length:
            window.append(left.pop(0))
        wanted += window
    wanted = wanted[:most] if first else left
    assert list(zip(tokens.tolist(), marks.tolist(), strict=True)) == wanted


@pytest.mark.parametrize("length", [1, 2])
def test_a_window_needs_room_behind_the_first_tokens(length):
    with pytest.raises(InputError, match=rf"window={length} has no room .* the 2 tokens"):
        with_first(np.arange(5), np.ones(5, bool), [1, 2], length, 9)
    assert with_first(np.arange(5), np.ones(5, bool), [1, 2], 3, 9)[0].tolist()[:3] == [1, 2, 0]


def test_a_text_has_first_tokens_that_do_not_count_and_a_conversation_has_its_own():
    found = encoded("abc", encode, 2, [7, 8], None)
    assert found == ([7, 8, 97, 98], [False, False, True, True], "ab")
    own = encoded("\x07\x08c", encode, 9, [7, 8], None)
    assert own == ([7, 8, 99], [False, False, True], "\x07\x08c")
    assert encoded("abc", encode, 9, [], None).counted == [True] * 3
    talk = Conversation([{"role": "user", "content": "abc"}])
    for answers, counted in ((None, [True] * 4), (lambda _: [False, True] * 2, [False, True] * 2)):
        tokens, marks, text = encoded(talk, encode, 2, [7], answers)
        assert tokens == [9, 97, 98, 99] and marks == counted
        assert text == '{"messages": [{"role": "user", "content": "abc"}], "tools": null}'


def test_a_stream_is_the_documents_in_their_order_up_to_the_limit(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [letter * 40 for letter in "abcd"]
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    order = [texts[i] for i in np.random.default_rng(0).permutation(4)]
    for limit, read in ((39, 1), (41, 1), (42, 2), (83, 2), (84, 3), (1000, 4)):
        found = token_stream(TextSource(path), encode, limit, 5, first=[7])
        every = [token for text in order[:read] for token in [5, 7, *map(ord, text)]][1:]
        counts = [mark for text in order[:read] for mark in [True, False, *[True] * len(text)]][1:]
        assert found.tokens.tolist() == every[:limit] and found.counted.tolist() == counts[:limit]
        digest = hashlib.sha256("".join(f"{text}\n" for text in order[:read]).encode())
        assert (found.documents, found.part) == (read, "all")
        assert found.sha256 == digest.hexdigest()
        assert found.about == {"format": "JSON lines", "field": "text", "begins": order[0]}


def test_of_a_long_text_sixteen_characters_a_token_are_read_and_eighty_say_which_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) for i in range(5000)))
    asked = []

    def sparse(text: str) -> list[int]:
        asked.append(len(text))
        return [ord(c) for c in text[::100]]

    found = token_stream(TextSource(tmp_path / "a.txt"), sparse, 100, None)
    assert asked == [1600] and len(found.tokens) == 16
    assert found.about["begins"] == (tmp_path / "a.txt").read_text()[:80]
    with pytest.raises(InputError, match="only 63 tokens, at least 64"):
        calibration_batch([TextSource(tmp_path / "a.txt")], encode, length=9, max_tokens=63)
    batch = calibration_batch([TextSource(tmp_path / "a.txt")], encode, length=2, max_tokens=64)
    assert batch.tokens.shape == (32, 2) and batch.counted is None
    for length, most in ((1, 100), (2, 0)):
        with pytest.raises(InputError, match=rf"length={length} must be at least 2 and max_tokens"):
            calibration_batch([TextSource(tmp_path / "a.txt")], encode, length=length,
                              max_tokens=most)  # fmt: skip


@pytest.mark.parametrize("size", [5, 8, 9, 13, 21])
def test_full_windows_reach_back_and_score_no_token_twice(size):
    text = np.arange(100, 100 + size)
    counted = np.arange(size) % 3 > 0
    found = make_windows(text, window=8, stride=7, counted=counted, full=True)
    assert (found.window, found.stride) == (8, 7)
    starts = [row[0] - 100 for row in found.tokens]
    ends = [min(start + 8, size) for start in starts]
    assert starts == [0] if size <= 8 else starts[-1] == size - 8
    assert ends[-1] == size and all(start == 7 * i for i, start in enumerate(starts[:-1]))
    scored = []
    for row, mask, marks in zip(found.tokens, found.valid, found.scored, strict=True):
        assert mask.sum() == min(8, size) and not row[~mask].any()
        scored += row[1:][marks].tolist()
    assert scored == (100 + np.flatnonzero(counted)[np.flatnonzero(counted) > 0]).tolist()


def test_what_cannot_be_cut_into_windows_is_refused():
    assert make_windows([1, 2], window=2).stride == 1 == make_windows([1, 2], window=3).stride
    for stride in (0, 8):
        with pytest.raises(InputError, match=rf"stride={stride} must lie in \[1, window=8\)"):
            make_windows([1, 2, 3], window=8, stride=stride)
    with pytest.raises(InputError, match="the text has 1 tokens; at least 2"):
        make_windows([1], window=8)
    with pytest.raises(InputError, match="no token to score"):
        make_windows([1, 2, 3], window=8, counted=np.array([True, False, False]))


def test_hashes_tell_texts_cuts_and_what_is_scored_apart():
    text = list(range(20))
    windows = {
        "one": make_windows(text, window=8), "again": make_windows(text, window=8),
        "other": make_windows([*text[:-1], 5], window=8), "cut": make_windows(text, window=9),
        "stride": make_windows(text, window=8, stride=3),
        "scored": make_windows(text, window=8, counted=np.arange(20) != 4),
    }  # fmt: skip
    found = text_hashes(windows)
    assert found["one"] == found["again"] and len(set(found.values())) == 5
    shape = np.array(windows["one"].tokens.shape).tobytes()
    whole = shape + windows["one"].tokens.tobytes() + windows["one"].scored.tobytes()
    assert found["one"] == hashlib.sha256(whole).hexdigest()
