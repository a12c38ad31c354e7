"""Calibration text to packed windows."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from moe_jax.errors import InputError
from pruning.demo import model_folder
from pruning.stages.measure import read_tokens
from pruning.text.calibration import TokenBatch, _shares, calibration_batch, hold_out
from pruning.text.documents import open_documents
from pruning.text.source import TextSource
from pruning.text.tokenizer import open_codec
from tests.support.tiny import add_tokenizer


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def texts_of(path) -> list[str]:
    return list(open_documents(TextSource(path), 1000).texts)


def test_windows_hold_the_text_in_order_and_padding_is_marked(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 70 + "y" * 30)
    batch = calibration_batch([TextSource(path)], encode, length=64, max_tokens=1000)
    assert batch.tokens.shape == (2, 64)
    assert batch.total == 100
    assert "".join(map(chr, batch.tokens[batch.valid])) == "x" * 70 + "y" * 30
    assert not batch.tokens[~batch.valid].any()


@pytest.mark.parametrize("counts", [False, True])
def test_a_prediction_counts_between_two_tokens_that_are_there(counts):
    rng = np.random.default_rng(0)
    valid = rng.random((20, 7)) < 0.6
    counted = rng.random((20, 7)) < 0.6 if counts else None
    batch = TokenBatch(np.zeros((20, 7), np.int32), valid, counted=counted)
    for row, t in np.ndindex(20, 6):
        wanted = valid[row, t] and valid[row, t + 1] and (not counts or counted[row, t + 1])
        assert batch.scored[row, t] == wanted
    some = batch.of(np.array([3, 1]))
    np.testing.assert_array_equal(some.scored, batch.scored[[3, 1]])
    assert some.files is None and batch.total == valid.sum()
    np.testing.assert_array_equal(batch.windows().scored, batch.scored)


def test_json_lines_are_documents_joined_by_the_separator(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = [json.dumps({"body": "ab" * 20}), json.dumps({"body": "cd" * 20})]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    source = TextSource(path, field="body")
    batch = calibration_batch([source], encode, length=41, max_tokens=1000, separator=0)
    assert batch.sources[0]["documents"] == 2
    assert batch.tokens[0, 40] == batch.tokens[1, 40] == 0
    assert sorted(map(chr, batch.tokens[:, 0])) == ["a", "c"]


def test_a_mixture_shares_the_budget_by_weight(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name * 1000)
    sources = [TextSource(tmp_path / "a", weight=3), TextSource(tmp_path / "b")]
    batch = calibration_batch(sources, encode, length=10, max_tokens=400)
    counts = np.bincount(batch.tokens[batch.valid])
    assert counts[ord("a")] == 300 and counts[ord("b")] == 100


@given(
    st.lists(st.tuples(st.integers(0, 50), st.floats(0.1, 9)), min_size=1, max_size=5),
    st.integers(1, 120),
)
def test_shares_never_exceed_what_there_is_and_use_the_whole_budget(files, total):
    available, weights = [a for a, _ in files], [w for _, w in files]
    shares = _shares(available, weights, total)
    assert all(0 <= s <= a for s, a in zip(shares, available, strict=True))
    assert sum(shares) == min(total, sum(available))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"  \n", "holds no text"),
        ("short.txt", b"too short", "only 9 tokens"),
        ("latin.txt", b"\xe9\xe8" * 100, "not UTF-8"),
        ("bad.jsonl", b"{oops\n", "bad.jsonl:1 is not valid JSON"),
        ("deep.jsonl", b"[" * 10**5, "deep.jsonl:1 is nested"),
        ("digits.jsonl", b"\n" + b"9" * 10**4, "digits.jsonl:2 is not valid JSON"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', "half.jsonl:1 holds half of a character"),
        (
            "cut.txt.gz",
            gzip.compress(b"a text\n" * 99, mtime=0)[:-12],
            "cut.txt.gz is not whole gzip",
        ),
        ("field.jsonl", b'{"body": "x"}\n', "no text in field 'text' .found: body"),
    ],
)
def test_unusable_text_is_refused_with_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        calibration_batch([TextSource(tmp_path / name)], encode, length=8, max_tokens=1000)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.txt does not exist"):
        open_documents(TextSource(tmp_path / "nowhere.txt"), 16)


@pytest.mark.parametrize(
    "text",
    ["f.txt=0", "f.txt=-1", "f.txt=two", "f.txt=nan", "f.txt=inf", "f.txt=1e999", "f.txt=1e-99"],
)
def test_a_weight_must_be_a_positive_number(text):
    with pytest.raises(ValueError, match="positive number"):
        TextSource.parse(text)


def test_a_bounded_sample_of_a_sorted_file_sees_every_subject(tmp_path):
    path = tmp_path / "sorted.jsonl"
    path.write_text("\n".join(json.dumps({"text": c * 20}) for c in "abcd" for _ in range(50)))
    batch = calibration_batch([TextSource(path)], encode, length=20, max_tokens=1000)
    shares = np.bincount(batch.tokens[batch.valid])[ord("a") : ord("e")] / 1000
    assert (shares > 0.1).all()


@pytest.mark.parametrize(("windows", "expected"), [(3, 0), (4, 1), (16, 1), (160, 10)])
def test_held_out_windows_are_not_calibrated_on_and_none_is_lost(windows, expected):
    tokens = np.arange(windows * 8, dtype=np.int32).reshape(windows, 8)
    left, held = hold_out(TokenBatch(tokens, np.ones((windows, 8), bool)))
    assert len(held.tokens) == expected
    together = np.concatenate([left.tokens, held.tokens])
    np.testing.assert_array_equal(np.sort(together.reshape(-1)), np.arange(windows * 8))


def test_evaluation_reads_json_lines_like_calibration_and_plain_text_whole(tmp_path):
    demo = model_folder("demo")
    codec = open_codec(demo, 4096)
    (tmp_path / "a.jsonl").write_text('{"answer": "one two"}\n"three"\n')
    (tmp_path / "a.txt").write_text("one two")
    lines = read_tokens(TextSource(tmp_path / "a.jsonl", field="answer"), codec, 64)
    lines = lines.tokens.tolist()
    assert read_tokens(TextSource(tmp_path / "a.txt"), codec, 64).tokens.tolist() == codec.encode(
        "one two"
    )
    assert codec.end is not None
    joined = [[*codec.encode(a), codec.end, *codec.encode(b)]
              for a, b in (("one two", "three"), ("three", "one two"))]  # fmt: skip
    assert lines in joined


def test_lines_end_at_newlines_alone_and_windows_files_read_like_others(tmp_path):
    odd = "one\u2028two\x0bthree\x85four"
    (tmp_path / "a.jsonl").write_bytes(
        b"\r\n".join(json.dumps(text, ensure_ascii=False).encode() for text in (odd, "last"))
    )
    assert texts_of(tmp_path / "a.jsonl") == [odd, "last"]
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert texts_of(tmp_path / "a.txt") == ["one\ntwo\nthree\n"]


def test_a_token_without_an_embedding_is_refused_only_where_a_text_has_it(tmp_path):
    """Fine-tunes often got a [PAD] token and no row for it."""
    add_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    codec = open_codec(tmp_path, 256)
    assert codec.tokenizer.token_to_id("[PAD]") == 256
    plain = "plain text"
    assert codec.encode(plain) == codec.tokenizer.encode(plain).ids
    with pytest.raises(InputError) as caught:
        codec.encode("text, then [PAD] and more")
    assert str(caught.value) == (
        "'text, then [PAD] and more' in the text has the token '[PAD]' with id 256, but the "
        "model's embedding has 256 rows; take '[PAD]' out of the text"
    )
    assert codec.encode("text, then  and more")  # as advised
    with pytest.raises(InputError, match="it is another model's tokenizer"):
        open_codec(tmp_path, 255)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[PAD]"}))
    with pytest.raises(InputError, match="eos_token has id 256 but the model knows 256; name the"):
        open_codec(tmp_path, 256)


def test_windows_are_held_out_of_every_file():
    tokens = np.repeat(np.arange(3), 16).astype(np.int32)[:, None] * np.ones(8, np.int32)
    left, held = hold_out(TokenBatch(tokens, np.ones(tokens.shape, bool)))
    assert held.tokens[:, 0].tolist() == [0, 1, 2] and len(left.tokens) == 45
