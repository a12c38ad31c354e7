"""The paper's tables by one command: rows are those of `compare` and of `recover`'s exports."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint import load_model
from pruning.report.comparison import Comparison
from tests.support.command import read, refused, run, snapshot

MORE = ("--prune-rate", 0.5, "--rules", "paper-act", "auto", "experts-reap", "experts-usage",
        "--window", 32, "--recover", "router", "--recover-tokens", 128,
        "--figure-blocks", 32)  # fmt: skip


def words(models: Path, texts: Path, out: Path, *more) -> tuple:
    text = texts / "good.txt"
    return ("paper", models / "single", *read(texts, out), "--evaluation", text,
            "--evaluation-tokens", 64, *MORE, *more)  # fmt: skip


@pytest.fixture(scope="module")
def made(models, texts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("paper") / "out"
    assert run(*words(models, texts, out)) == 0
    return out


def test_rows(made):
    print((made / "paper.md").read_text())
