"""Hundreds of damaged folders: each opens or is refused in one message; ten thousand by
`tests/bench/mutate_folders.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny

ROOT = Path(__file__).parents[2]
CASES = 150


def folders(place: Path) -> dict[str, Path]:
    """A folder with a tokenizer of each of four families, one of them in shards."""
    found = {}
    for family, shard in (("qwen2_moe", "40KB"), ("deepseek_v3", "1GB"), ("gpt_oss", "1GB"),
                          ("mixtral", "1GB")):  # fmt: skip
        model = tiny.tiny_model(family, vocab_size=300)
        found[family] = tiny.add_tokenizer(tiny.save(model, place / family, max_shard_size=shard))
        (place / family / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    return found


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("pristine"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "mixtral"])
def test_a_damaged_folder_opens_or_is_refused_in_one_message(pristine, family):
    command = [sys.executable, "-m", "tests.support.mutations", pristine[family], "0", str(CASES)]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines and lines[-1] == {"done": CASES}, done.stderr[-2000:]
    assert lines[:-1] == []
