"""What identifies the model of an output folder, remembered so that its weights are read once."""

import json
import os
import re
from pathlib import Path

from convert.checkpoint import Checkpoint
from moe_jax.errors import InputError
from moe_jax.files import replace_text
from moe_jax.json_files import read_json
from moe_jax.spread import Spread
from pruning.kit.progress import Steps

MODEL = "model.json"
MEASURED = ("statistics.json", "compare.json", "plan.json")  # what names the model it is of


def identify(base: Checkpoint, output: Path, steps: Steps) -> None:
    """Learn the hash of a model's weights if an output folder holds something to compare with.

    It is taken from model.json if all weight files are as they were then; else they are read,
    under a bar. Without anything to compare with, scoring finds it in its first reading.

    Args:
      base: gets `weights_hash`.
      output: the folder; gets model.json if what it holds is of this model.
      steps: where progress goes.
    """
    base.weights_hash = base.weights_hash or _remembered(base, output)
    measured = [output / name for name in MEASURED if (output / name).is_file()]
    if base.weights_hash is not None or not measured:
        return
    with steps.bar("identify the model") as on_step:
        base.hash_weights(on_step)
    # Of another model the folder is no record; nothing in it is touched then.
    own = any(base.fingerprint.encode() in file.read_bytes() for file in measured)
    if own and os.access(output, os.W_OK):
        remember(base, output)


def identify_in_all(base: Checkpoint, output: Path, steps: Steps, spread: Spread) -> None:
    """The same in every process: process 0 learns it, reading the weights if it has to."""
    if spread.leads:
        identify(base, output, steps)
    if spread.processes > 1:
        base.weights_hash = spread.led(base.hash_weights)


def remember(base: Checkpoint, output: Path) -> None:
    """Write model.json: the hash of the weights, and how the files looked when it was taken."""
    told = {"weights": base.hash_weights(), "files": base.tensors.stamps}
    replace_text(output / MODEL, json.dumps(told, indent=1) + "\n")


def _remembered(base: Checkpoint, output: Path) -> str | None:
    try:
        told = read_json(output / MODEL)
    except (InputError, OSError):
        return None
    found = told.get("weights")
    known = isinstance(found, str) and re.fullmatch("[0-9a-f]{64}", found)
    return found if known and told.get("files") == base.tensors.stamps else None
