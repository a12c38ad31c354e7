"""What is made of the ids that programs give for a tokenizer: the programs are made up."""

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from pruning.stages import tokenizer_check
from pruning.stages.tokenizer_check import TEXTS, tokenizer_result

IDS = [[number, number + 1] for number in range(len(TEXTS))]
OTHER = [[7], *IDS[1:3], [8, 9], *IDS[4:]]


@pytest.fixture
def result(tmp_path, monkeypatch):
    """The result where each program gives something for the base's folder and for the export's."""
    base, folder = tmp_path / "base", tmp_path / "export"
    base.mkdir()
    folder.mkdir()
    export: Any = SimpleNamespace(base=SimpleNamespace(folder=base))
    trusting = []

    def of(fast, slow, *files: str, trusted: bool = True):
        for name in files or ("tokenizer.json",):
            (base / name).write_text("x")

        def client_ids(folders, texts, trusted=()):
            assert folders == (base, folder) and texts == tuple(TEXTS.values())
            trusting.append(trusted)
            return slow

        def fast_ids(folders, texts):
            assert folders == (base, folder) and texts == tuple(TEXTS.values())
            return fast

        monkeypatch.setattr(tokenizer_check, "client_ids", client_ids)
        monkeypatch.setattr(tokenizer_check, "_fast_ids", fast_ids)
        return tokenizer_result(folder, export, trusted=trusted)

    of.trusting, of.folder = trusting, folder
    return of


SAME = "the base's 24 ids on text in 12 scripts, by "


@pytest.mark.parametrize(
    ("fast", "slow", "expected"),
    [
        ((IDS, IDS), (IDS, IDS), (True, SAME + "tokenizers and transformers", True)),
        ((IDS, IDS), ("no torch", "no torch"), (True, SAME + "tokenizers", True)),
        (("none", "none"), (IDS, IDS), (True, SAME + "transformers", True)),
        (("none", IDS), ("lost", IDS), (True, "not done: tokenizers: none; transformers: lost",
                                        False)),
        ((IDS, OTHER), (IDS, IDS),
         (False, "tokenizers gives other ids than with the base's: Latin, Hebrew", True)),
        ((IDS, IDS), (IDS, "broken"),
         (False, "transformers reads the base's but not this one: broken", True)),
        ((IDS, "a"), (IDS, OTHER),
         (False, "tokenizers reads the base's but not this one: a; transformers gives other ids "
                 "than with the base's: Latin, Hebrew", True)),
    ],
)  # fmt: skip
def test_ids_are_compared_where_the_base_gives_some(result, fast, slow, expected):
    assert result(fast, slow) == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "spiece.model",
                                  "a.tiktoken", "vocab.txt"])  # fmt: skip
def test_a_base_has_a_tokenizer_by_any_of_its_files(result, name):
    assert result((IDS, IDS), (IDS, IDS), name) == (True, SAME + "tokenizers and transformers",
                                                    True)  # fmt: skip


def test_a_base_without_a_tokenizer_has_nothing_to_compare(result):
    assert result((IDS, IDS), (IDS, IDS), "config.json", "words.txt") is None


def test_our_own_code_alone_is_trusted(result):
    result((IDS, IDS), (IDS, IDS))
    result((IDS, IDS), (IDS, IDS), trusted=False)
    assert result.trusting == [(result.folder,), ()]


def test_code_that_a_tokenizer_brings_is_not_run(result):
    files = ("tokenizer.json", "tokenization_mine.py")
    apart = "; its own code is compared but not run: tokenization_mine.py"
    assert result((IDS, IDS), (IDS, OTHER), *files) == (True, SAME + "tokenizers" + apart, True)
    assert not result.trusting
    wrong = "tokenizers gives other ids than with the base's: Latin, Hebrew"
    assert result((IDS, OTHER), (IDS, IDS), *files) == (False, wrong + apart, True)
    assert result(("none", IDS), (IDS, IDS), *files) == (
        True, f"not done: tokenizers: none{apart}", False
    )  # fmt: skip


def test_the_tokenizers_package_reads_its_own_file_or_says_why_not(tmp_path):
    folders = [tmp_path / name for name in ("good", "none", "broken")]
    for folder in folders:
        folder.mkdir()
    words = models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
    Tokenizer(words).save(str(folders[0] / "tokenizer.json"))
    (folders[2] / "tokenizer.json").write_text("{}")
    good, none, broken = tokenizer_check._fast_ids(folders, ["a", "b", "a"])
    assert (good, none) == ([[1], [0], [1]], "there is no tokenizer.json")
    assert isinstance(broken, str) and broken
