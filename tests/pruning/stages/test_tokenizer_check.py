"""The tokenizer of every export is loaded and gives the ids of its base's."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from pruning import VerificationError, apply, verify
from tests.convert.test_side_files import write
from tests.support import tiny
from tests.support.command import run

REMOTE = """
from pathlib import Path
from transformers import PreTrainedTokenizer
from .pieces import piece

class Own(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "own.model"}

    def __init__(self, vocab_file, **options):
        self.pieces = Path(vocab_file).read_text().split()
        super().__init__(**options)

    vocab_size = property(lambda self: len(self.pieces))

    def get_vocab(self):
        return {piece: index for index, piece in enumerate(self.pieces)}

    def _tokenize(self, text):
        return [piece(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token):
        return self.pieces.index(token)

    def _convert_id_to_token(self, index):
        return self.pieces[index]
"""
SLOW = {
    "own.model": " ".join(f"<{byte}>" for byte in range(256)),
    "tokenization_own.py": REMOTE,
    "pieces.py": "def piece(byte):\n    return f'<{byte}>'\n",
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}},
    "tool_parser.py": "# of a server\n",
}  # fmt: skip


def applied(scored, models, root: Path, *, form: str, fast: bool, files: dict) -> Path:
    """An export of a copy of the single model with these files; the folder of its plan."""
    base = root / "base"
    shutil.copytree(models / "single", base)
    write(base, files)
    if not fast:
        (base / "tokenizer.json").unlink()
    apply(scored, str(base), root / "out", export=(form,), bits=16)
    return root / "out"


def tokenizer_check(out: Path):
    (found,) = (check for check in verify(out) if check.check == "tokenizer")
    return found


@pytest.mark.parametrize("form", ["ragged-bf16", "padded-bf16"])
def test_a_tokenizer_of_remote_code_loads_from_every_export(scored, models, tmp_path, form, capsys):
    out = applied(scored, models, tmp_path, form=form, fast=False, files=SLOW)
    assert "left in" in (said := capsys.readouterr().err) and "tool_parser.py" in said
    check = tokenizer_check(out)
    assert not check.done and "not run: tokenization_own.py, pieces.py" in check.detail
    (files,) = (check for check in verify(out) if check.check == "files")
    assert files.detail.endswith("only the base has tool_parser.py")
    # It is this test's own code.
    loaded = transformers.AutoTokenizer.from_pretrained(
        out / "exports" / form, trust_remote_code=True
    )
    assert loaded("ü\t")["input_ids"] == [0xC3, 0xBC, 9]
    (out / "exports" / form / "pieces.py").unlink()
    with pytest.raises(VerificationError, match=r"files: pieces\.py is missing"):
        verify(out)


@pytest.mark.parametrize("form", ["ragged-bf16", "padded-bf16"])
def test_ids_are_compared_in_both_programs(scored, models, tmp_path, form):
    settings = {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    out = applied(scored, models, tmp_path, form=form, fast=True, files=settings)
    check = tokenizer_check(out)
    assert check.done and "in 12 scripts, by tokenizers and transformers" in check.detail
    other = Tokenizer(models_of_bytes())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    path = out / "exports" / form / "tokenizer.json"
    other.save(str(path))
    with pytest.raises(VerificationError, match=r"tokenizer: tokenizers gives other ids.*Thai"):
        verify(out)
    path.write_text("{")
    with pytest.raises(VerificationError, match=r"tokenizers reads the base's but not this one"):
        verify(out)


def models_of_bytes() -> models.BPE:
    """The tokens of `tests.support.tiny.add_tokenizer` in the reverse order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    return models.BPE({one: index for index, one in enumerate(alphabet)}, [])


def test_fast_and_remote_code_together(scored, models, tmp_path, capsys):
    out = applied(scored, models, tmp_path, form="padded-bf16", fast=True, files=SLOW)
    check = tokenizer_check(out)
    assert check.done and "by tokenizers; its own code is compared but not run" in check.detail
    capsys.readouterr()
    assert run("verify", out, "--json", "-") == 0
    assert "pieces.py" in json.loads(capsys.readouterr().out)[1]["detail"]


def test_a_stretched_rope_does_not_keep_the_tokenizer_from_loading(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    tiny.add_tokenizer(tiny.save(tiny.tiny_model("deepseek_v3", vocab_size=320), base))
    settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    (base / "tokenizer_config.json").write_text(settings)
    config = json.loads((base / "config.json").read_text())
    for name in ("max_position_embeddings", "rope_parameters"):
        config.pop(name, None)
    rope = {"type": "yarn", "factor": 4.0}
    (base / "config.json").write_text(json.dumps({**config, "rope_scaling": rope}))
    how = ("--weights-only", "--prune-rate", 0.5, "--export", "ragged-bf16", "--bits", 16)
    assert run("--quiet", "compress", base, "--output", out, *how) == 0
    check = tokenizer_check(out)
    assert check.done and check.detail.endswith("by tokenizers and transformers")
