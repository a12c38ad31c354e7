"""Text files of any size: as much is read as the tokens need."""

import gzip
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moe_jax.errors import InputError
from pruning.text import documents
from pruning.text.calibration import calibration_batch
from pruning.text.documents import open_documents
from pruning.text.source import TextSource

LINE = 1000  # bytes
TEXT = LINE - len('{"text": ""}\n')


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def line_of(number: int) -> bytes:
    start = b'{"text": "%012d ' % number
    return start + b"x" * (LINE - len(start) - 3) + b'"}\n'


class HugeFile(io.RawIOBase):
    """Numbered JSON lines of `size` bytes in all, made where they are read."""

    def __init__(self, size: int):
        self.size, self.place, self.count = size, 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def readinto(self, buffer) -> int:
        wanted = min(len(buffer), self.size - self.place)
        first, skipped = divmod(self.place, LINE)
        lines = b"".join(map(line_of, range(first, first + wanted // LINE + 2)))
        buffer[:wanted] = lines[skipped : skipped + wanted]
        self.place += wanted
        self.count += wanted
        return wanted


class HugePath(type(Path())):
    size = 100 * 10**9

    def is_file(self) -> bool:
        return True

    def stat(self, **_):
        return SimpleNamespace(st_size=self.size)

    def open(self, *_, **__):
        self.file = HugeFile(self.size)
        return io.BufferedReader(self.file)


def test_a_hundred_gigabytes_of_lines_are_sampled_evenly_and_hardly_read():
    def read():
        path = HugePath("huge.jsonl")
        sizes = {"length": 100, "max_tokens": 1000 * LINE}
        return path, calibration_batch([TextSource(path)], encode, **sizes)

    path, batch = read()
    (note,) = batch.sources
    assert note["part"] == "spread" and note["tokens"] == batch.total == 1000 * LINE
    assert path.file.count < 50 * batch.total  # a token of this encoding is a byte
    text = "".join(map(chr, batch.tokens[batch.valid]))
    numbers = [int(text[at : at + 12]) for at in range(0, len(text), TEXT)]
    assert len(set(numbers)) == len(numbers) == note["documents"]
    tenths = Counter(number * LINE * 10 // HugePath.size for number in numbers)
    assert len(tenths) == 10 and max(tenths.values()) < 1.1 * min(tenths.values())
    again = read()[1]
    np.testing.assert_array_equal(again.tokens, batch.tokens)
    assert again.sources == batch.sources


BOMBED = """
import resource, sys
from pathlib import Path
from pruning.text.calibration import calibration_batch
from pruning.text.source import TextSource

pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name in sys.argv[1:]:
    try:
        given = [TextSource(Path(name))]
        batch = calibration_batch(given, lambda text: [*map(ord, text)], length=64, max_tokens=9999)
        print(batch.total, batch.sources[0].get("part"))
    except ValueError as error:
        print(error)
"""


def test_a_bomb_of_gzip_costs_no_memory(tmp_path):
    def bomb(name: str, block: bytes, start: bytes = b"") -> Path:  # 4 GiB
        path = tmp_path / name
        whole = gzip.compress(block * (2**25 // len(block))) * 128
        path.write_bytes(gzip.compress(start) + whole)
        return path

    rows = [json.dumps({"text": str(number) * 2**14}).encode() for number in range(9)]
    files = [
        bomb("lines.jsonl.gz", b"".join(row + b"\n" for row in rows)),
        bomb("array.json.gz", b"".join(row + b"," for row in rows), b"["),
        bomb("table.csv.gz", (b'"' + b"x" * 2**14 + b'",1\n') * 9, b"text,n\n"),
        bomb("zeros.jsonl.gz", b"\0"),
        bomb("zeros.txt.gz", b"\0"),
    ]
    child = [sys.executable, "-c", BOMBED, *map(str, files)]
    done = subprocess.run(child, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    *rows, zeros, text = done.stdout.splitlines() or [done.stderr] * 5
    assert rows == ["9999 beginning"] * 3 and text == "9999 None"
    assert "zeros.jsonl.gz has a line of more than 268.4 MB" in zeros


def test_a_sparse_file_of_many_gigabytes_is_read_where_it_begins(tmp_path):
    path = tmp_path / "sparse.txt"
    path.write_text("words " * 100)
    with path.open("r+b") as file:
        file.truncate(2**43)
    batch = calibration_batch([TextSource(path)], encode, length=100, max_tokens=500)
    assert "".join(map(chr, batch.tokens[batch.valid])) == ("words " * 100)[:500]


@pytest.fixture
def small(monkeypatch) -> int:
    """How large a file is read whole here."""
    for module in (documents, sys.modules["pruning.text.calibration"]):
        monkeypatch.setattr(module, "WHOLE", 5000)
    return 5000


def source(folder: Path, name: str, content: bytes) -> TextSource:
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return TextSource(folder / name)


@pytest.mark.parametrize(("lines", "part"), [(5, "all"), (6, "spread"), (400, "spread")])
def test_the_size_decides_how_lines_are_read(small, tmp_path, lines, part):
    found = open_documents(source(tmp_path, "a.jsonl", b"".join(map(line_of, range(lines)))), 100)
    assert found.part == part
    numbers = [int(text[:12]) for text in found.texts]
    assert len(set(numbers)) == len(numbers) and set(numbers) <= set(range(lines))
    if part == "all":
        assert numbers == np.random.default_rng(0).permutation(lines).tolist()
    elif lines > 10:
        assert 3 <= len(numbers) <= 10  # each takes a line and a part of the one before


def test_blank_lines_and_texts_are_no_documents(tmp_path):
    lines = ['{"text": "a"}', "", '{"text": " \\n"}', " \t", '"b"', '{"text": "c"}']
    found = open_documents(source(tmp_path, "a.jsonl", "\r\n".join(lines).encode()), 100)
    assert list(found.texts) == ["abc"[i] for i in np.random.default_rng(0).permutation(3)]


def test_of_packed_lines_the_first_are_read(small, tmp_path):
    found = open_documents(source(tmp_path, "a.jsonl.gz", b"".join(map(line_of, range(99)))), 100)
    assert found.part == "beginning"
    assert sorted(int(text[:12]) for text in found.texts) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n" * 9000, "holds no text"),
        (line_of(0) + b"x" * 9000, "has a line of more than 5.0 kB"),
        (line_of(0) * 5 + b"oops\n" * 1000, r"a.jsonl, byte \d+: is not valid JSON"),
        (line_of(0) * 5 + b"\xff\n" * 2000, "is not UTF-8"),
        (b'{"more": 1}\n' + line_of(0) * 9, r"a.jsonl, byte 0: has no text in field 'text'"),
    ],
)
def test_a_large_file_is_refused_where_it_is_bad(small, tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        list(open_documents(source(tmp_path, "a.jsonl", content), 100).texts)


def test_few_lines_are_each_read_once_and_the_search_ends(small, tmp_path):
    content = b"".join(b'{"more": "%s", "text": "%d"}\n' % (b"x" * 1970, n) for n in range(3))
    texts = list(open_documents(source(tmp_path, "a.jsonl", content), 100).texts)
    assert sorted(texts) == ["0", "1", "2"]


def test_the_hash_of_a_large_file_is_that_of_what_was_read(small, tmp_path):
    def digest(content: bytes, max_tokens: int = 100) -> str:
        given = [source(tmp_path, "a.jsonl", content)]
        batch = calibration_batch(given, encode, length=10, max_tokens=max_tokens)
        return batch.sources[0]["sha256"]

    content = b"".join(map(line_of, range(100)))
    first, last = content.replace(b"00 x", b"00 y", 1), content.replace(b"0099 x", b"0099 y", 1)
    assert first != content != last
    assert digest(content) == digest(last) != digest(first)
    assert digest(content[:4000]) != digest(content[:3000] + last[3000:3999] + b" ")


@pytest.mark.parametrize(("most", "looks"), [(512 * 5 - 1, 5), (512 * 5, 6), (512 * 6 - 1, 6)])
def test_a_look_into_a_large_file_counts_as_512_bytes_at_least(tmp_path, monkeypatch, most, looks):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n:04}"}) + "\n" for n in range(2000)))
    monkeypatch.setattr("pruning.text.documents.WHOLE", most)
    found = open_documents(TextSource(path), 10)
    assert found.part == "spread"
    texts = list(found.texts)
    assert len(texts) == len(set(texts)) == looks and texts[0] == "0000"
