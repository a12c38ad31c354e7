"""Corpus of the demo model: split, tokenizer, token streams and training windows."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pruning.demo.corpus import (
    DOMAINS,
    END_OF_TEXT,
    encode_documents,
    prepare_corpus,
    read_documents,
    save_tokenizer,
    split_documents,
    take_excerpts,
    train_tokenizer,
    training_windows,
)

WORDS = "whale ship captain select index module import return senate people the of and".split()


def make_documents(domain: str, count: int, words: int = 60) -> list[str]:
    rng = np.random.default_rng(list(domain.encode()))
    return [
        f"{domain} {number}\n" + " ".join(rng.choice(WORDS, size=words)) for number in range(count)
    ]


@pytest.fixture(scope="module")
def documents() -> dict[str, list[str]]:
    return {domain: make_documents(domain, 40) for domain in DOMAINS}


@pytest.fixture(scope="module")
def tokenizer(documents) -> Tokenizer:
    return train_tokenizer([text for texts in documents.values() for text in texts], 300)


def test_every_document_is_on_exactly_one_side_of_the_split(documents):
    training, heldout = split_documents(documents, held_out=0.1, seed=3)
    for domain, texts in documents.items():
        assert sorted(training[domain] + heldout[domain]) == sorted(texts)
        assert not set(training[domain]) & set(heldout[domain])
        share = sum(map(len, heldout[domain])) / sum(map(len, texts))
        assert 0.1 <= share < 0.1 + 1.5 / len(texts)


def test_the_split_depends_on_the_seed_and_not_on_the_file_order(documents):
    shuffled = {domain: texts[::-1] for domain, texts in documents.items()}
    first = split_documents(documents, held_out=0.1, seed=3)
    assert split_documents(shuffled, held_out=0.1, seed=3) == first
    assert split_documents(documents, held_out=0.1, seed=4) != first


def test_every_domain_holds_out_and_keeps_at_least_one_document():
    training, heldout = split_documents({"two": ["a b", "c d"]}, held_out=0.001)
    assert len(training["two"]) == len(heldout["two"]) == 1
    training, heldout = split_documents({"two": ["a b", "c d"]}, minimum_bytes=10_000)
    assert len(training["two"]) == len(heldout["two"]) == 1


def test_minimum_bytes_enlarges_the_held_out_part_of_a_small_domain(documents):
    _, heldout = split_documents(documents, held_out=0.01, minimum_bytes=2_000)
    assert all(2_000 <= sum(map(len, texts)) < 3_000 for texts in heldout.values())


@pytest.mark.parametrize("seed", range(10))
def test_no_copy_of_a_document_straddles_the_split(documents, seed):
    copied = {
        domain: texts + [f"{text.replace(' ', '  ')}\n" for text in texts]
        for domain, texts in documents.items()
    }
    copied["pgdocs"] = copied["pgdocs"] + documents["pydocs"]
    training, heldout = split_documents(copied, held_out=0.3, seed=seed)
    words = [
        {tuple(text.split()) for texts in part.values() for text in texts}
        for part in (training, heldout)
    ]
    assert not words[0] & words[1]
    assert sum(len(texts) for part in (training, heldout) for texts in part.values()) == 200


def test_impossible_splits_are_refused_with_a_cure(documents):
    with pytest.raises(ValueError, match=r"held_out=1\.5 must lie in \(0, 1\); choose"):
        split_documents(documents, held_out=1.5)
    with pytest.raises(ValueError, match="'novel' has 1 distinct documents, needs at least 2"):
        split_documents({"novel": ["call me", "call  me"]})


def test_excerpts_are_parts_of_the_documents_within_the_budget(documents):
    texts = documents["code"]
    excerpts = take_excerpts(texts, 3_000, piece=100, seed=5)
    sources = [[text for text in texts if excerpt in text] for excerpt in excerpts]
    assert all(sources)
    assert 2_500 < sum(len(excerpt.encode()) for excerpt in excerpts) <= 3_000
    assert excerpts == take_excerpts(texts, 3_000, piece=100, seed=5)
    assert take_excerpts([], 3_000) == []


def test_excerpts_grow_until_few_documents_fill_the_budget():
    texts = ["ж" * 5_000, "ш" * 5_000]  # two bytes a letter and no boundary to cut at
    sizes = [len(excerpt.encode()) for excerpt in take_excerpts(texts, 15_000, piece=10)]
    assert 14_998 <= sum(sizes) <= 15_000


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_tokenizer_round_trips_any_unicode_text(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_tokenizer_learns_merges_and_has_one_special_token(tokenizer):
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert list(tokenizer.get_added_tokens_decoder()) == [0]
    text = " ".join(WORDS)
    assert len(tokenizer.encode(text).ids) < len(text.encode()) / 2
    with pytest.raises(ValueError, match=r"vocab_size=100 must lie in \[257, 65536\]"):
        train_tokenizer(["text"], 100)


def test_the_saved_tokenizer_gives_equal_ids_in_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the whale", " the  whale ,\n\tdon't", f"ship{END_OF_TEXT}sea", "naïve 鯨 🐋", ""):
        ids = tokenizer.encode(text).ids
        assert plain.encode(text).ids == ids
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == text
    assert (loaded.eos_token_id, loaded.bos_token, loaded.model_max_length) == (0, None, 1024)


def test_encoded_documents_end_with_the_end_of_text_token(tokenizer):
    texts = ["the whale", "", f"a literal {END_OF_TEXT} inside"]
    tokens = encode_documents(tokenizer, texts)
    assert tokens.dtype == np.uint16
    (ends,) = np.nonzero(tokens == 0)
    assert len(ends) == len(texts)
    pieces = [tokenizer.decode(piece[:-1].tolist()) for piece in np.split(tokens, ends + 1)[:-1]]
    assert pieces == texts
    assert tokenizer.encode(END_OF_TEXT).ids == [0]  # the switch for literal text is put back
    assert encode_documents(tokenizer, []).shape == (0,)


def make_streams() -> dict[str, np.ndarray]:
    """Streams whose ids name their domain (high digits) and position (low digits)."""
    sizes = {"code": 4_000, "sotu": 2_000, "mobydick": 500}
    return {
        domain: (10_000 * (number + 1) + np.arange(size)).astype(np.uint16)
        for number, (domain, size) in enumerate(sizes.items())
    }


def test_a_batch_depends_on_its_step_and_not_on_history():
    windows = training_windows(make_streams(), length=16, batch_size=8, seed=1)
    batches = [windows.batch(step) for step in range(80)]
    for step in (79, 3, 41, 3, 0):
        fresh = training_windows(make_streams(), length=16, batch_size=8, seed=1)
        np.testing.assert_array_equal(fresh.batch(step), batches[step])
    assert batches[0].shape == (8, 16) and batches[0].dtype == np.int32
    assert not np.array_equal(batches[0], batches[1])
    other = training_windows(make_streams(), length=16, batch_size=8, seed=2)
    assert not np.array_equal(other.batch(0), batches[0])


def test_the_batch_size_only_cuts_the_same_sequence_of_rows_differently():
    threes = training_windows(make_streams(), length=16, batch_size=3)
    eights = training_windows(make_streams(), length=16, batch_size=8)
    np.testing.assert_array_equal(
        np.concatenate([threes.batch(step) for step in range(8)]),
        np.concatenate([eights.batch(step) for step in range(3)]),
    )


def test_rows_are_contiguous_windows_and_domains_mix_by_tokens_to_the_power_0_7():
    windows = training_windows(make_streams(), length=16, batch_size=64)
    rows = np.concatenate([windows.batch(step) for step in range(16)])  # four blocks of 256 rows
    assert (np.diff(rows, axis=1) == 1).all()
    shares = np.bincount(rows[:, 0] // 10_000, minlength=4)[1:] / len(rows)
    expected = np.array([4_000**0.7, 2_000**0.7, 1.5 * 500**0.7])
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.01)


def test_a_pass_over_a_domain_repeats_no_token_and_covers_nearly_all():
    windows = training_windows({"sotu": make_streams()["sotu"]}, length=16, batch_size=1)
    in_pass = 2_000 // 16 - 1
    for first in (0, in_pass):
        rows = np.concatenate([windows.batch(first + step) for step in range(in_pass)])
        assert len(np.unique(rows)) == rows.size >= 0.98 * 2_000


def test_windows_refuse_short_domains_and_bad_sizes():
    exact = training_windows({"code": np.arange(16, dtype=np.uint16)}, length=16, batch_size=2)
    np.testing.assert_array_equal(exact.batch(7), [np.arange(16)] * 2)
    with pytest.raises(ValueError, match="'code' has 4 tokens, needs at least length=16; add"):
        training_windows({"code": np.zeros(4, np.uint16)}, length=16, batch_size=2)
    with pytest.raises(ValueError, match="batch_size=0 must be >= 1"):
        training_windows(make_streams(), length=16, batch_size=0)
    with pytest.raises(ValueError, match="must hold a domain"):
        training_windows({}, length=16, batch_size=2)
    with pytest.raises(ValueError, match="step=-1 must be >= 0"):
        exact.batch(-1)


def write_corpus(folder, documents) -> None:
    for domain, texts in documents.items():
        with gzip.open(folder / f"{domain}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(text) + "\n" for text in texts)


def test_reading_names_the_missing_file_and_the_bad_line(documents, tmp_path):
    write_corpus(tmp_path, documents)
    assert read_documents(tmp_path) == documents
    write_corpus(tmp_path, {"sotu": ["fine", {"text": "not a string"}]})
    with pytest.raises(ValueError, match=r"sotu\.jsonl\.gz line 2 must be a JSON string, got dict"):
        read_documents(tmp_path)
    (tmp_path / "code.jsonl.gz").unlink()
    with pytest.raises(ValueError, match=r"must hold code\.jsonl\.gz; point --corpus"):
        read_documents(tmp_path)


def test_prepared_texts_come_from_their_side_of_the_split(documents, tmp_path):
    write_corpus(tmp_path, documents)
    out = tmp_path / "out"
    counts = prepare_corpus(tmp_path, out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    records = [json.loads(line) for line in (out / "heldout.jsonl").read_text().splitlines()]
    for domain in DOMAINS:
        tokens = np.load(out / f"train_{domain}.npy")
        assert len(tokens) == counts[domain]
        training = tokenizer.decode(tokens.tolist(), skip_special_tokens=False).split(END_OF_TEXT)
        heldout = [record["text"] for record in records if record["domain"] == domain]
        assert sorted(training[:-1] + heldout) == sorted(documents[domain])
        excerpts = [
            json.loads(line) for line in (out / "calibration.jsonl").read_text().splitlines()
        ]
        texts = [record["text"] for record in excerpts if record["domain"] == domain]
        assert texts and all(any(text in source for source in training) for text in texts)
    for name, domain in (("code", "code"), ("speech", "sotu"), ("novel", "mobydick")):
        parts = (out / "evaluation" / f"{name}.txt").read_text().strip().split("\n\n")
        heldout = [record["text"] for record in records if record["domain"] == domain]
        assert parts and all(any(part in source for source in heldout) for part in parts)
