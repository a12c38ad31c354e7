"""The checkpoint's own tokenizer: what it puts first, and the files of older kinds."""

import base64
import itertools
import json
from collections import Counter

import pytest
import sentencepiece
import tiktoken
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from pruning.demo import model_folder
from pruning.text.conversion import MOONSHOT
from pruning.text.tokenizer import open_codec

SCRIPTS = [
    "Hello wOrld's I'LL it's  3.14159 x=1;\n\n\tdef f(): pass\r\n",
    "Ünïcödé straße Привет, мир! Γειά σου Κόσμε",  # noqa: RUF001
    "中文字符English混合 日本語カタカナ 한국어 12345678",
    "مرحبا بالعالم שלום ﷽ हिन्दी ไทย",
    "👩‍👩‍👧‍👦 ☃ \u2028 \ufeff é e\u0301  aaaaaaaaaaaa ",
    "",
]

ADDED = {"__type": "AddedToken", "content": "<sop>", "lstrip": False, "rstrip": False,
         "single_word": False, "normalized": False, "special": True}  # fmt: skip


def byte_tokenizer(folder, post=None, **settings):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "[gMASK]", "<sop>"])
    if post:
        known = [(token, tokenizer.token_to_id(token)) for token in post.split() if token != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=post, pair=f"{post} $B", special_tokens=known
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    given = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))


@pytest.mark.parametrize(
    ("post", "settings", "first"),
    [
        (None, {}, []),
        ("<s> $A", {}, ["<s>"]),
        ("[gMASK] <sop> $A", {}, ["[gMASK]", "<sop>"]),
        ("$A </s>", {}, []),
        ("<s> $A </s>", {}, ["<s>"]),
        (None, {"bos_token": "<s>", "add_bos_token": True}, []),
        ("<s> $A", {"bos_token": "<s>", "add_bos_token": True}, ["<s>"]),
        ("<s> $A", {"bos_token": "<s>", "add_bos_token": False}, ["<s>"]),
    ],
)
def test_a_text_begins_with_what_transformers_puts_first(tmp_path, post, settings, first):
    byte_tokenizer(tmp_path, post, **settings)
    codec = open_codec(tmp_path, 300)
    assert [codec.tokenizer.id_to_token(one) for one in codec.first] == first
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in SCRIPTS[:-1]:
        found, wanted = [*codec.first, *codec.encode(text)], tokenizer(text)["input_ids"]
        assert wanted in (found, [*found, codec.tokenizer.token_to_id("</s>")])
    assert open_codec(tmp_path, 300, first_tokens=False).first == ()


@pytest.mark.parametrize("token", [None, "<s>", ADDED])
def test_the_token_that_is_named_as_the_beginning_is_that_of_transformers(tmp_path, token):
    byte_tokenizer(tmp_path, "[gMASK] $A", bos_token=token)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert open_codec(tmp_path, 300).begin == theirs.bos_token_id
    assert (theirs.bos_token_id is None) == (token is None)


def test_generated_text_ends_where_tokenizer_and_generation_config_say(tmp_path):
    byte_tokenizer(tmp_path, eos_token="</s>")
    end = 257
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert open_codec(tmp_path, 300).stops == {end, 5}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7, "x"]}))
    assert open_codec(tmp_path, 300).stops == {end, 6, 7}


def test_the_demo_puts_nothing_first():
    assert open_codec(model_folder("demo"), 4096).first == ()


# --- tiktoken.model ---


def pair_merges(corpus: list[bytes], count: int) -> dict[bytes, int]:
    """Ranks of bytes and of the pairs that are most frequent in turn, as tiktoken files hold."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in word] for word in corpus]
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        (one, two), _ = pairs.most_common(1)[0]
        ranks[one + two] = len(ranks)
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [one, two]:
                    word[i : i + 2] = [one + two]
    return ranks


CORPUS = [part.encode() for text in SCRIPTS for part in text.split(" ")] * 2
NAMES = {0: "[BOS]", 1: "[EOS]", 5: "<|im_end|>"}
CODE = "import os\nos.abort()  # nobody may run this\npat_str = [\n    r'''"


def kimi_folder(folder, pattern=MOONSHOT, *, code="tokenization_kimi"):
    """A folder in the manner of Kimi; returns what the original tokenizer makes of a text."""
    ranks = pair_merges(CORPUS, 120)
    ranks[b"qxj"] = len(ranks)  # whole in the file, but no two pieces of it are
    lines = [base64.b64encode(piece) + b" %d" % rank for piece, rank in ranks.items()]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    (folder / f"{code}.py").write_text(CODE + "''',\n    r'''".join(pattern) + "''',\n]\n")
    (folder / "config.json").write_text("{}")
    special = {len(ranks) + i: {"content": name, "special": True} for i, name in NAMES.items()}
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
                "eos_token": "[EOS]", "added_tokens_decoder": special}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return ranks


def test_ranks_of_tiktoken_give_the_ids_of_the_original(tmp_path):
    ranks = kimi_folder(tmp_path)
    special = {name: len(ranks) + i for i, name in NAMES.items()}
    original = tiktoken.Encoding(
        "kimi", pat_str="|".join(MOONSHOT), mergeable_ranks=ranks, special_tokens=special
    )
    codec = open_codec(tmp_path, len(ranks) + 6)
    assert codec.end == special["[EOS]"] and codec.first == ()

    @given(st.text() | st.text(alphabet="aeé中文 1\n'sS👩"))
    def same(text):
        wanted = original.encode(text, allowed_special="all")
        assert codec.encode(text) == wanted
        assert codec.tokenizer.decode(wanted, skip_special_tokens=False) == text

    assert codec.encode("qxj") == [ranks[b"qxj"]]
    for text in [*SCRIPTS, "end[EOS]<|im_end|> [BOS]next", "qxj aqxj qxjs"]:
        assert codec.encode(text) == original.encode(text, allowed_special="all")
    assert max(map(len, map(original.decode_single_token_bytes, codec.encode(SCRIPTS[0])))) > 2
    same()


@pytest.mark.parametrize(
    ("pattern", "code"),
    [(MOONSHOT[1:], "tokenization_kimi"), (MOONSHOT, "other"), (("x",), "tokenization_kimi")],
)
def test_ranks_without_a_known_way_to_cut_text_are_refused_with_a_cure(tmp_path, pattern, code):
    ranks = kimi_folder(tmp_path, pattern, code=code)
    with pytest.raises(ValueError, match=r"tokenization_kimi\.py, .*known here; ") as caught:
        open_codec(tmp_path, 1000)
    # What it advises is done, with another way to cut text.
    _, _, code = str(caught.value).partition("python -c '")
    names = [NAMES.get(i, f"<{i}>") for i in range(6)]
    code = code.removesuffix("'").replace('["NAMES"]', str(names)).replace("PATTERN", r"\S+|\s+")
    exec(code, {})
    codec = open_codec(tmp_path, 1000)
    original = tiktoken.Encoding(
        "x", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"[EOS]": len(ranks) + 1}
    )
    for text in SCRIPTS:
        assert codec.encode(text) == original.encode(text)
    assert codec.end == len(ranks) + 1


@pytest.mark.parametrize("content", [b"?? 0\n", b"YQ== x\n", b"YQ==\n", b"\xff\n"])
def test_damaged_ranks_are_refused(tmp_path, content):
    kimi_folder(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"tiktoken\.model holds no ranks .* download it again"):
        open_codec(tmp_path, 1000)


# --- tokenizer.model ---


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_gives_the_ids_of_the_original(tmp_path, kind):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(line for text in SCRIPTS for line in text.splitlines()) * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), model_type=kind,
        vocab_size=420, byte_fallback=True, character_coverage=0.98, minloglevel=2,
        split_digits=True, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                "add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    original = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    codec = open_codec(tmp_path, 1000)
    assert codec.first == (original.bos_id(),) and codec.end == original.eos_id()
    for text in SCRIPTS:
        assert codec.encode(text) == original.encode(text)


def test_a_folder_without_any_tokenizer_says_what_to_copy(tmp_path):
    with pytest.raises(ValueError, match=r"not exist; copy .*, or its tiktoken\.model"):
        open_codec(tmp_path, 100)


@pytest.mark.parametrize(
    ("said", "settings", "end"),
    [
        (None, {}, None), (0, {}, 0), (259, {}, 259), ([7, 3], {}, 7), ([], {}, None),
        (7, {"eos_token": "</s>"}, 257), ([7], {"eos_token": {"content": "<sop>"}}, 259),
        (7, {"eos_token": "no such"}, None), (-1, {}, ...), (260, {}, ...), ([0, 260], {}, ...),
        (True, {}, ...), (1.0, {}, ...), ("1", {}, ...), ([list(range(100))], {}, ...),
    ],
)  # fmt: skip
def test_a_text_ends_with_a_token_that_the_model_has(tmp_path, said, settings, end):
    byte_tokenizer(tmp_path, **settings)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": said}))
    if end is not ...:
        assert open_codec(tmp_path, 260).end == end
        return
    with pytest.raises(ValueError, match="must be ids below the vocab_size 260; get it again") as e:
        open_codec(tmp_path, 260)
    assert f"config.json: eos_token_id={str(said)[:80]} must be" in str(e.value)


@pytest.mark.parametrize("lacking", ["sentencepiece", "google.protobuf"])
def test_without_the_packages_for_it_a_sentencepiece_model_is_refused_with_the_cure(
    tmp_path, monkeypatch, lacking
):
    def import_module(name):
        if name == lacking:
            raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr("pruning.text.conversion.importlib.import_module", import_module)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"more packages .*{lacking}.*: pip install 'moe-jax\["):
        open_codec(tmp_path, 100)


def test_a_token_beyond_the_embedding_is_shown_in_its_place(tmp_path):
    byte_tokenizer(tmp_path)
    codec = open_codec(tmp_path, 257)
    before, behind = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert codec.encode(f"{before}<s>")[-1] == 256 and codec.encode("") == []
    with pytest.raises(ValueError, match="take '</s>' out of the text") as error:
        codec.encode(f"{before}</s>{behind}<sop>")
    assert str(error.value).startswith(
        f"'{before[-20:]}</s>{behind[:20]}' in the text has the token '</s>' with id 257, but the "
        "model's embedding has 257 rows; "
    )
    with pytest.raises(ValueError, match=r"^'a</s>b' in the text"):
        codec.encode("a</s>b")
