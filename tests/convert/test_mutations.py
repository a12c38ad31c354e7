"""Hundreds of damaged checkpoints and output folders: each opens or is refused in one message; ten
thousand by `tests/bench/mutate_folders.py`."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from pruning.stages import client
from tests.support import command, tiny

ROOT = Path(__file__).parents[2]
CASES = 150
OUTPUT = "output"


def output_folder(place: Path) -> Path:
    """What `compress`, `audit` and `compare` write, in one folder."""
    place.mkdir()
    model, text, out = place / "model", place / "text.txt", place / "out"
    tiny.add_tokenizer(tiny.save(tiny.tiny_model("qwen2_moe", **command.SIZES), model))
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    read = (model, *command.read(place, out, text.name), "--window", 64)
    rules = ("--rules", "random", "--prune-rate", 0.5, "--block", 8, "--evaluation", text)
    assert command.run("compare", *read, *rules) == 0
    compared = (out / "compare.json").read_bytes()
    coded = ("--quantizer", "gptq", "--export", "ragged-int4", "--prune-rate", 0.5, "--overwrite")
    with patch.object(client, "free_memory", lambda: 0):  # transformers is not asked
        assert command.run("compress", *read, *coded, "--repair", "layer") == 0
    assert command.run("audit", out, "--experts", 2, "--channels", 2) == 0
    (out / "compare.json").write_bytes(compared)
    return out


def folders(place: Path) -> dict[str, Path]:
    """A folder with a tokenizer of each of four families, one of them in shards, and an output."""
    found = {}
    for family, shard in (("qwen2_moe", "40KB"), ("deepseek_v3", "1GB"), ("gpt_oss", "1GB"),
                          ("mixtral", "1GB")):  # fmt: skip
        model = tiny.tiny_model(family, vocab_size=300)
        found[family] = tiny.add_tokenizer(tiny.save(model, place / family, max_shard_size=shard))
        (place / family / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    return found | {OUTPUT: output_folder(place / OUTPUT)}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("pristine"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "mixtral", OUTPUT])
def test_a_damaged_folder_opens_or_is_refused_in_one_message(pristine, family):
    child = [sys.executable, "-m", "tests.support.mutations", pristine[family], "0", str(CASES)]
    done = subprocess.run(list(map(str, child)), cwd=ROOT, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines and lines[-1] == {"done": CASES}, done.stderr[-2000:]
    assert lines[:-1] == []
