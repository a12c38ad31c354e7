"""Running the command line in tests, on tiny models that can be damaged."""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from pruning.cli import main

UP = "model.layers.1.mlp.experts.3.up_proj.weight"
NORM = "model.norm.weight"
SIZES = {"vocab_size": 300, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 32}


def run(*arguments) -> int:
    """Run a command; `compress` repairs only if asked: most tests are about other things."""
    words = [str(argument) for argument in arguments]
    if "compress" in words and "--repair" not in words:
        words += ["--repair", "none"]
    return main(words)


def read(texts: Path, out: Path, text: str = "good.txt") -> tuple:
    """Output folder and text, which every command that scores takes."""
    return ("--output", out, "--calibration", texts / text, "--batch", 4)


def given(texts: Path, out: Path, text: str = "good.txt") -> tuple:
    """The same for `compress` and `score` with one rule: measuring rules is a test of its own."""
    return (*read(texts, out, text), "--planner", "fair")


def snapshot(folder: Path) -> dict:
    """Every path below a folder with its size and time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.stat()
        found[path] = None if path.is_dir() else (about.st_size, about.st_mtime_ns)
    return found


def refused(capsys, watched: Path, *arguments) -> str:
    """Run a command that must fail and change nothing; its message, on one line."""
    before = snapshot(watched)
    capsys.readouterr()
    assert run(*arguments) == 2
    assert snapshot(watched) == before
    shown = capsys.readouterr().err
    assert "Traceback" not in shown and f"{'score':28s}" not in shown
    return re.sub(r"\s+", " ", shown[shown.index("moe-compress: ") :])


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensor(folder: Path, name: str, change) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file(tensors, path, metadata={"format": "pt"})


def poison(folder: Path) -> None:
    def spoil(value):
        def change(tensor):
            tensor = tensor.copy()
            tensor.flat[7] = value
            return tensor

        return change

    change_tensor(folder, UP, spoil(np.nan))
    change_tensor(folder, NORM, spoil(np.inf))
