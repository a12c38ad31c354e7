"""Which files of a checkpoint go into the folders made of it, by what its own code needs."""

import json
import os

import pytest

from convert import portable_config
from convert.side_files import left_out, side_files

BINARY = b"\0not text\xff"


def write(folder, files: dict) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict | list):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def auto_map(*tokenizer) -> dict:
    return {"auto_map": {"AutoTokenizer": list(tokenizer)}}


KIMI = {
    "config.json": {"auto_map": {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }},
    "configuration_own.py": "", "modeling_own.py": "from .configuration_own import OwnConfig",
    "tokenizer_config.json": auto_map("tokenization_own.Own", None),
    "tokenization_own.py": (
        "from .encoding_own import join\n"
        "def later():\n    from .deeper.rules import rule\n"
        "try:\n    import sibling\nexcept ImportError:\n    from . import spare\n"
        "FILES = {'vocab_file': 'ranks.bpe', 'words': 'data/words'}\n"
    ),
    "encoding_own.py": "from .tables import TABLE\nimport os, json\n",
    "tables.py": "TABLE = ['\\\\d']\n# \\d in a text: '\\d'\nX = '\\d'\n",
    "sibling.py": "", "spare.py": "from .tokenization_own import Own\n",
    "deeper/__init__.py": "", "deeper/rules.py": "from ..upper import up\n", "upper.py": "",
    "ranks.bpe": BINARY, "data/words/a.txt": "a", "data/words/b.txt": "b", "data/other.txt": "",
    "tiktoken.model": BINARY, "encoding/render.py": "from helper import x", "helper.py": "",
    "chat_template.jinja": "{{ x }}", "generation_config.json": {}, "special_tokens_map.json": {},
    "THIRD_PARTY_NOTICES.md": "", "LICENSE": "", "tool_parser.py": "import encoding_own",
    "model.safetensors": BINARY, "original/consolidated.pth": BINARY, "README.md": "",
    ".gitattributes": "", "figures/one.png": BINARY,
}  # fmt: skip
LEFT = ["configuration_own.py", "data/other.txt", "figures/one.png", "modeling_own.py",
        "tool_parser.py"]  # fmt: skip
APART = {"config.json", "README.md", ".gitattributes", "model.safetensors",
         "original/consolidated.pth"}  # fmt: skip


def test_code_and_data_that_the_tokenizer_needs_are_found_and_the_rest_is_named(tmp_path):
    write(tmp_path, KIMI)
    found = side_files(tmp_path)
    assert set(found) == KIMI.keys() - APART - set(LEFT)
    assert left_out(tmp_path) == LEFT
    for name, path in found.items():
        assert path == tmp_path / name


@pytest.mark.parametrize("place", ["config.json", "processor_config.json"])
def test_code_is_found_wherever_a_json_file_names_it(tmp_path, place):
    write(tmp_path, {place: auto_map(None, "words.fast.Fast"), "words/fast.py": ""})
    assert "words/fast.py" in side_files(tmp_path)


def test_a_pair_of_old_and_the_code_of_another_repository(tmp_path):
    pair = {"auto_map": ["own.Own", None]}
    write(tmp_path, {"tokenizer_config.json": pair, "own.py": "", "a": "", "b--own.py": ""})
    assert "own.py" in side_files(tmp_path)
    write(tmp_path, {"tokenizer_config.json": auto_map("a/b--own.Own", None)})
    assert set(side_files(tmp_path)) == {"tokenizer_config.json"}


@pytest.mark.parametrize(
    "code",
    [
        "from ..secret import x", "from ...secret import x", "from ....... import secret",
        "N = '../secret.py'", "N = 'deep/../../secret.py'", "N = '.'", "N = ''", "N = '/'",
        "N = 'no\\0name'", "N = 'model.bin'", "N = 'original'", "def (", "\0", "N = " + "(" * 300,
        "N = 'config.json'", "N = '" + "x" * 5000 + "'",
        "N = '" + "字" * 200 + "'", "N = '\\ud800'", "import " + "x" * 5000,
        "from " + "." * 99 + " import secret", "from . import *",
    ],
)  # fmt: skip
def test_nothing_outside_the_checkpoint_and_no_weight_is_taken(tmp_path, code):
    base = tmp_path / "base"
    write(tmp_path, {"secret.py": "", "base/deep/a.txt": "", "base/model.bin": BINARY,
                     "base/original/x.pth": BINARY, "base/config.json": {},
                     "base/tokenization_own.py": code})  # fmt: skip
    assert set(side_files(base)) == {"tokenization_own.py"}


def test_a_folder_that_links_to_itself_and_a_map_of_nonsense(tmp_path, monkeypatch):
    code = ["Own", "", 3, None, "/etc/passwd.x", "../secret.X", "x" * 5000 + ".Y"]
    write(tmp_path, {"tokenizer_config.json": auto_map(*code), "encoding/a.txt": ""})
    (tmp_path / "encoding" / "round").symlink_to("..")
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path, "."):
        assert set(side_files(source)) == {"tokenizer_config.json", "encoding/a.txt"}


def test_links_into_a_store_of_blobs_are_files_and_dangling_ones_are_not(tmp_path):
    write(tmp_path, {"blobs/0a": "from .encoding_own import x", "blobs/0b": "code"})
    snapshot = tmp_path / "snapshots" / "f00"
    snapshot.mkdir(parents=True)
    links = {"tokenization_own.py": "0a", "encoding_own.py": "0b", "vocab.json": "gone"}
    for name, blob in links.items():
        os.symlink(f"../../blobs/{blob}", snapshot / name)
    found = side_files(snapshot)
    assert set(found) == {"tokenization_own.py", "encoding_own.py"}
    assert found["encoding_own.py"].read_bytes() == b"code"


def test_a_config_keeps_the_code_of_its_tokenizer_and_not_that_of_its_model():
    code = {"AutoTokenizer": ["own.Own", None], "AutoProcessor": "own.Processor"}
    old = {"model_type": "qwen3_moe", "num_experts": 8,
           "auto_map": {"AutoConfig": "c.C", "AutoModel": "m.M", **code}}  # fmt: skip
    assert portable_config(old)["auto_map"] == code
