"""Every bad input through the command line: refused by name before any work, nothing written."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support import tiny
from tests.support.command import (
    NORM,
    SIZES,
    UP,
    change_config,
    change_tensor,
    given,
    poison,
    read,
    refused,
)

SHARD = "model-00002-of"


def truncate(folder: Path) -> None:
    (path,) = folder.glob(f"{SHARD}*")
    path.write_bytes(path.read_bytes()[:-5])


DAMAGES = {
    "missing shard": (
        lambda folder: next(folder.glob(f"{SHARD}*")).unlink(),
        rf"shard {SHARD}-\d+\.safetensors is missing; download it again",
    ),
    "truncated shard": (truncate, r"of a file of \d+ bytes; it is truncated, download it again"),
    "wrong shape": (
        lambda folder: change_tensor(folder, UP, lambda t: np.ascontiguousarray(t[:-1])),
        rf"{UP} has shape \[63, 32\]; config.json asks for \[64, 32\]",
    ),
    "unknown family": (
        lambda folder: change_config(folder, model_type="qwen2_mo"),
        r"model_type='qwen2_mo' is unknown; known are: qwen2_moe,.* those of a 'qwen2_moe': if it",
    ),
    "NaN and infinity": (
        poison,
        rf"2 problem\(s\).*{UP} holds NaN or infinity; download.*{NORM} holds NaN or infinity|"
        rf"2 problem\(s\).*{NORM} holds NaN or infinity; download.*{UP} holds NaN or infinity",
    ),
    "end of text beyond the embedding": (
        lambda folder: change_config(folder, eos_token_id=[0, 300]),
        r"config\.json: eos_token_id=\[0, 300\] must be ids below the vocab_size 300; get it",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        r"tokenizer\.json does not exist; copy the model's tokenizer\.json there",
    ),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        r"tokenizer\.json is not a tokenizer: .*; download it again",
    ),
    "broken tokenizer settings": (
        lambda folder: (folder / "tokenizer_config.json").write_text("["),
        r"tokenizer_config\.json is not valid JSON: .*; get it again",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    "no model": (shutil.rmtree, r"is not a folder; pass a downloaded checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["compress", "score"])
def test_a_damaged_model_is_refused(models, texts, tmp_path, capsys, command, damage):
    folder = shutil.copytree(models / "sharded", tmp_path / "model")
    spoil, message = DAMAGES[damage]
    spoil(folder)
    shown = refused(capsys, tmp_path, command, folder, *given(texts, tmp_path / "out"))
    assert re.search(message, shown), shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("absent.txt", r"absent\.txt does not exist; check the path"),
        ("empty.txt", r"empty\.txt holds no text; give a file with at least a few pages"),
        ("short.txt", r"gives only 63 tokens, at least 64 are needed .*; give more text"),
        ("latin.txt", r"latin\.txt is not UTF-8 text .*; convert it first"),
        ("broken.jsonl.gz", r"broken\.jsonl\.gz is not whole gzip .*; download it again"),
        ("lines.jsonl", r"lines\.jsonl:1 has no text in field 'text' \(found: body\); name the"),
        ("good.txt=-1", r"the weight after '=' must be a positive number; write FILE or FILE=2.5"),
    ],
)
@pytest.mark.parametrize("command", ["compress", "score"])
def test_bad_calibration_text_is_refused(models, texts, tmp_path, capsys, command, text, message):
    out = tmp_path / "out"
    shown = refused(capsys, tmp_path, command, models / "single", *given(texts, out, text))
    assert re.search(message, shown), shown


def test_no_calibration_text_is_refused(models, tmp_path, capsys):
    out = tmp_path / "out"
    shown = refused(capsys, tmp_path, "compress", models / "single", "--output", out)
    assert "no calibration text given; name at least one file with --calibration" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prune-rate", "1.0"], r"prune_rate=1\.0 must lie in \[0, 1\); choose e\.g\. 0\.25"),
        (["--prune-rate", "-0.1"], r"prune_rate=-0\.1 must lie in \[0, 1\)"),
        (["--prune-rate", "nan"], r"prune_rate=nan must lie in \[0, 1\)"),
        (["--prune-rate", "0.99"], r"the budget of \d+ channels is below .*lower the prune rate"),
        (
            ["--group-size", "128"],
            r"group_size=128 does not divide the expert width 64; choose",
        ),
        (["--group-size", "64"], r"group_size=64 does not divide the model width 32; choose --gro"),
        (["--block", "16"], r"block=16 must be a multiple of group_size=32.*choose --block 32"),
        (["--block", "48", "--bits", "16"], r"block=48 does not divide the expert width 64; choo"),
        (["--minimum", "65"], r"minimum=65 must lie in \[1, 64\], the expert width; choose"),
        (["--bits", "16", "--export", "ragged-int4"], r"bits=16 contradicts export=\['ragged-int4"),
        (["--criterion", "acts"], r"criterion='acts' is unknown; did you mean 'act'"),
        (["--attribution", "al"], r"attribution='al' is unknown; did you mean 'ala'"),
        (["--planner", "papers"], r"planner='papers' is unknown; did you mean 'paper'"),
        (["--criterion", "taylor"], r"'taylor' was not collected.*--gradients"),
        (["--attribution", "fisher"], r"'fisher' was not collected.*--gradients"),
        (["--evaluation", "absent.txt"], r"text file absent\.txt does not exist; check the"),
        (["--batch", "0"], r"batch=0 must be at least 1"),
        (["--recipe", "absent.yaml"], r"recipe absent\.yaml cannot be read"),
    ],
)
def test_options_that_cannot_work_are_refused(models, texts, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    shown = refused(capsys, tmp_path, "compress", models / "single", *given(texts, out), *arguments)
    assert re.search(message, shown), shown


def test_evaluation_text_of_one_token_is_refused(models, texts, tmp_path, capsys):
    arguments = (*given(texts, tmp_path / "out"), "--evaluation", texts / "one.txt")
    shown = refused(capsys, tmp_path, "compress", models / "single", *arguments)
    assert re.search(r"one\.txt has 1 tokens, at least 2 are needed .*; give more text", shown)


def test_another_models_tokenizer_is_refused(texts, tmp_path, capsys):
    folder = tiny.add_tokenizer(tiny.tiny_qwen2_moe(tmp_path / "model"))
    arguments = (*given(texts, tmp_path / "out"), "--bits", 16)
    shown = refused(capsys, tmp_path, "compress", folder, *arguments)
    assert "has token id 255 but the model knows 96; it is another model's tokenizer" in shown


def test_a_group_size_that_does_not_divide_the_shared_expert_is_refused(texts, tmp_path, capsys):
    sizes = SIZES | {"shared_expert_intermediate_size": 24}
    folder = tiny.add_tokenizer(tiny.tiny_qwen2_moe(tmp_path / "model", **sizes))
    shown = refused(capsys, tmp_path, "compress", folder, *given(texts, tmp_path / "out"))
    words = "group_size=32 does not divide the input width of a linear layer 24; export with"
    assert words in shown


def test_an_already_pruned_model_is_refused(scored, texts, tmp_path, capsys):
    folder = scored / "exports" / "ragged-bf16"
    shown = refused(capsys, tmp_path, "compress", folder, *given(texts, tmp_path / "out"))
    assert "is already pruned; give the dense model that it came from" in shown


def test_bits_of_layers_are_chosen_by_compare_within_a_size(models, texts, tmp_path, capsys):
    out = read(texts, tmp_path / "out")
    shown = refused(capsys, tmp_path, "compare", models / "single", *out, "--bits", 4, "auto")
    assert "'auto' are those of the least loss within a size; give one with --target-byt" in shown
    few = (*out, "--bits", "auto", "--target-bytes", "1MB", "--max-tokens", 150)
    shown = refused(capsys, tmp_path, "compare", models / "single", *few)
    assert "out of the calibration text, which has 3, fewer than 4; give more text" in shown
    mixed = ("--export", "ragged-mixed", "--target-bytes", "1MB")
    shown = refused(capsys, tmp_path, "compress", models / "single", *out, *mixed)
    assert "in the bits that a plan says, and this one says those of 0 layers of 2" in shown
