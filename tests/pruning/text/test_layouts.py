"""A text file is what its content says: every layout of the same rows gives the same documents."""

import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from moe_jax.errors import InputError
from pruning.text import documents
from pruning.text.calibration import calibration_batch
from pruning.text.documents import open_documents
from pruning.text.rows import Rows
from pruning.text.source import TextSource
from pruning.text.tables import parquet_documents

TEXTS = [
    f'Page {n}.\nThe river "Elbe" rises, {{high}}, and\tflows é {n} km.\n' * 3 for n in range(40)
]
ROWS = [
    {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://www.example.org/{n}.html"}
    for n, text in enumerate(TEXTS)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def table(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def parquet(rows: list[dict], **how) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, **how)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


CONTENTS = {
    "JSON lines": LINES,
    "JSON lines in gzip": gzip.compress(LINES),
    "JSON lines in zstd": zstd(LINES),
    "JSON": json.dumps(ROWS, indent=2).encode(),
    "JSON in gzip": gzip.compress(json.dumps(ROWS).encode()),
    "CSV": table(","),
    "TSV": table("\t"),
    "parquet": parquet(ROWS, row_group_size=7),
}
NAMES = {
    "JSON lines": ["c4.jsonl", "c4.ndjson", "c4.JSONL", "c4.json", "c4.txt", "c4"],
    "JSON lines in gzip": ["c4-train.00000-of-01024.json.gz", "c4.jsonl.gz", "c4"],
    "JSON lines in zstd": ["00.jsonl.zst", "00"],
    "JSON": ["c4_demo.json", "c4.JSON", "c4"],
    "JSON in gzip": ["c4.json.gz"],
    "CSV": ["c4.csv", "c4.CSV", "c4.txt", "c4"],
    "TSV": ["c4.tsv", "c4"],
    "parquet": ["train-00000-of-00001.parquet", "0000"],
}


def write(path: Path, content: bytes | str) -> TextSource:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return TextSource(path)


def texts_of(source: TextSource) -> list[str]:
    return list(open_documents(source, 10**6).texts)


@pytest.mark.parametrize(("form", "name"), [(f, name) for f in NAMES for name in NAMES[f]])
def test_every_layout_under_every_name_is_the_same_documents(tmp_path, form, name):
    source = write(tmp_path / name, CONTENTS[form])
    found = open_documents(source, 10**6)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert list(found.texts) == [TEXTS[i] for i in order]
    assert (str(found.layout), found.rows.field, found.part) == (form, "text", "all")
    batch = calibration_batch([source], lambda t: [*map(ord, t)], length=64, max_tokens=10**5)
    (note,) = batch.sources
    assert note["format"] == form and note["field"] == "text" and note["documents"] == len(TEXTS)
    assert note["begins"] == TEXTS[order[0]][:80] and "lacking" not in note


PROSE = [
    "{Braces} begin a LaTeX group, and {more} follow.\nHe said, then, no.\n",
    '{"a": 1} is a JSON object, says the manual.\nIt goes on.\n',
    "{\n  this: is, no: json\n}\n",
    "[1] A reference, with commas.\n[2] Another, with more.\n",
    "[{see} below], he wrote.\n",
    '"Hello," he said, "text, is, this."\n',
    '"A line in quotes"\n"Another"\n',
    "One, two\nThree, four\nFive, six\n",
    "title,author\nMoby-Dick,Melville\nWalden,Thoreau\n",
    "text, and prose\nwith one comma, each\nand, so on\n",
    "text\nis a word on its own\n",
    "text,author\nOne line without commas.\nAnother, with more, of them.\n",
    "a\tb\nc\td\n",
    "PAR 1 of the text",
]


def test_archives_that_were_joined_are_read_to_their_end(tmp_path):
    for name, pack in (("a.zst", zstd), ("a.gz", gzip.compress)):
        halves = b"".join(map(pack, (LINES[:5000], LINES[5000:])))
        assert sorted(texts_of(write(tmp_path / name, halves))) == sorted(TEXTS)


@pytest.mark.parametrize("text", PROSE)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.txt.gz"])
def test_prose_with_braces_and_commas_stays_prose(tmp_path, text, name):
    content = gzip.compress(text.encode()) if name.endswith("gz") else text
    found = open_documents(write(tmp_path / name, content), 10**6)
    assert list(found.texts) == [text]
    assert found.layout.format == "prose" and found.rows.field is None


def test_what_is_asked_for_as_prose_is_prose(tmp_path):
    write(tmp_path / "a.json", '{"any": "thing"}\n{"more": 1}\n')
    source = TextSource.parse(f"{tmp_path}/a.json:format=prose")
    assert texts_of(source) == ['{"any": "thing"}\n{"more": 1}\n']


def test_objects_over_several_lines_are_documents(tmp_path):
    text = "\n".join(json.dumps(row, indent=1) for row in ROWS)
    found = open_documents(write(tmp_path / "a.json", text), 10**6)
    assert sorted(found.texts) == sorted(TEXTS) and str(found.layout) == "JSON"


def test_long_rows_are_whole(tmp_path):
    rows = [{"text": letter * 300_000} for letter in "abc"]
    long = [row["text"] for row in rows]
    contents = {
        "a.json": json.dumps(rows),
        "b": "".join(json.dumps(row) + "\n" for row in rows),
        "a.csv": "id,text\n" + "".join(f'1,"{text}"\n' for text in long),
    }
    for name, content in contents.items():
        assert sorted(texts_of(write(tmp_path / name, content))) == long
    assert csv.field_size_limit() == 131072  # the process's own is as it was


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "no json", r"a\.json:1 is not valid JSON.*a\.json:format=prose"),
        ("a.json", '[{"text": "a"}, {"text": "b"', r"a\.json, row 2: is not valid JSON: Expecting"),
        ("a.json", '[{"text": "a"}', r"a\.json, row 2: is not followed by ',' or '\]'"),
        ("a.json", '[{"text": "a"}] x', r"row 2: is followed by more than the end"),
        ("a.json", '[{"text": "a"}, 5]', r"row 2: has no text in field 'text' \(found: int\)"),
        ("a.json", "[]", "holds no text"),
        ("a", '[{"text": "a"}, {"n": ' + "9" * 5000 + "}]", "row 2: is not valid JSON"),
        ("a", '{"a":' * 5000 + "1" + "}" * 5000, "is nested"),
        ("a.json", '{"data": [{"text": "a"}]}', r"found: data\); name the right field"),
        ("a.csv", 'text,b\n"x,1\n', r"a\.csv:2 is no row of a table"),
        ("a.csv", "text,b\nx,1,2\n", r"a\.csv:2 has 3 cells, the header 2"),
        ("a.csv", "body,b\nx,1\n", r"no text in field 'text' \(found: body, b\)"),
        ("a.parquet", "no parquet", r"a\.parquet is no parquet file; download it again"),
        ("a.parquet", CONTENTS["parquet"][:-9], "is not whole parquet"),
        ("a.parquet.gz", gzip.compress(CONTENTS["parquet"]), "is packed parquet; unpack it"),
        ("a.zst", CONTENTS["JSON lines in zstd"][:-20], "a.zst is not whole zstd"),
        ("a.gz", CONTENTS["JSON lines in gzip"][:-20], "a.gz is not whole gzip"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    ],
)  # fmt: skip
def test_what_a_file_is_not_is_refused_with_a_cure(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        texts_of(write(tmp_path / name, content))


def test_what_needs_pyarrow_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    for name, form in (("a.parquet", "parquet"), ("a.zst", "JSON lines in zstd")):
        with pytest.raises(InputError, match=r"needs pyarrow; pip install 'moe-jax\[text\]'"):
            texts_of(write(tmp_path / name, CONTENTS[form]))


def test_null_rows_and_marks_are_counted_and_not_fatal(tmp_path):
    lines = ['{"text": null}', '{"text": "one"}', '{"text": " "}', "", '\ufeff{"text": "two"}']
    found = open_documents(write(tmp_path / "a", "\ufeff" + "\n".join(lines)), 100)
    assert sorted(found.texts) == ["one", "two"]
    assert found.rows.lacking() == "2 of 4 rows hold no text, 2 byte-order marks left out"
    for name, content in {
        "a.json": '\ufeff[{"text": "one"}, {"text": null}]',
        "a.csv": "\ufefftext,b\none,1\n,2\n",
    }.items():
        found = open_documents(write(tmp_path / name, content), 100)
        assert list(found.texts) == ["one"]
        assert found.rows.lacking() == "1 of 2 rows hold no text, 1 byte-order mark left out"
    found = open_documents(write(tmp_path / "a.txt", "\ufeffprose"), 100)
    assert list(found.texts) == ["prose"]
    assert found.rows.lacking() == "1 byte-order mark left out"
    rows = open_documents(write(tmp_path / "p", parquet([{"text": "one"}, {"text": None}])), 100)
    assert list(rows.texts) == ["one"] and rows.rows.lacking() == "1 of 2 rows hold no text"
    with pytest.raises(InputError, match=r"holds no text \(2 of 2 rows hold no text\)"):
        open_documents(write(tmp_path / "n", '{"text": null}\n' * 2), 100)


@pytest.mark.parametrize("form", ["JSON", "JSON in gzip", "CSV", "JSON lines in zstd"])
def test_of_large_files_without_offsets_the_first_rows_are_read(tmp_path, monkeypatch, form):
    monkeypatch.setattr(documents, "WHOLE", 2000)
    found = open_documents(write(tmp_path / "a", CONTENTS[form]), 100)
    texts = list(found.texts)
    assert found.part == "beginning" and 3 <= len(texts) <= 12
    assert sorted(texts) == sorted(TEXTS[: len(texts)])


@pytest.mark.parametrize("form", ["JSON", "CSV"])
def test_a_row_longer_than_what_may_be_read_is_refused(tmp_path, monkeypatch, form):
    monkeypatch.setattr(documents, "WHOLE", 200)
    with pytest.raises(InputError, match=r"has a line of more than 0\.2 kB"):
        open_documents(write(tmp_path / "a", CONTENTS[form]), 100)


def test_of_large_parquet_all_row_groups_give_some(tmp_path, monkeypatch):
    rows = [{"text": f"{n:05d}" + "x" * 95, "other": "y" * 1000} for n in range(30_000)]
    source = write(tmp_path / "a", parquet(rows, row_group_size=3000, use_dictionary=False))
    monkeypatch.setattr(documents, "WHOLE", 300_000)
    found = open_documents(source, 100)
    numbers = [int(text[:5]) for text in found.texts]
    assert found.part == "spread" and len(numbers) == len(set(numbers))
    groups = np.bincount(np.array(numbers) // 3000, minlength=10)
    assert (groups > 200).all() and (groups < 300).all()  # of 100 bytes and their lengths each
    monkeypatch.setattr(documents, "WHOLE", 10**9)
    assert len(texts_of(source)) == 30_000


def test_of_large_parquet_no_row_is_read_beyond_what_may_be(tmp_path):
    texts = [f"{number:04d}" for number in range(600)]
    table = pyarrow.Table.from_pylist([{"text": text} for text in texts])
    pyarrow.parquet.write_table(table, tmp_path / "a", use_dictionary=False)
    with pyarrow.parquet.ParquetFile(tmp_path / "a") as file:
        first = next(file.iter_batches(batch_size=256)).nbytes
    for most, count in ((first, 256), (first // 2, 128), (first + 1, 257), (10**6, 600)):
        found, is_all = parquet_documents(Rows(TextSource(tmp_path / "a")), most)
        assert found == texts[:count] and is_all == (count == 600)


def test_of_a_long_table_the_row_that_the_look_cuts_does_not_count_and_of_a_short_text_all_do(
    tmp_path,
):
    (tmp_path / "long").write_text("text,n\n" + "word,1\n" * 20_000)
    found = open_documents(TextSource(tmp_path / "long"), 10**6)
    assert str(found.layout) == "CSV" and list(found.texts) == ["word"] * 20_000
    prose = "text,n\na,1\nand no more of it"
    (tmp_path / "short").write_text(prose)
    found = open_documents(TextSource(tmp_path / "short"), 10**6)
    assert str(found.layout) == "prose" and list(found.texts) == [prose]
