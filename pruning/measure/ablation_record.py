"""The record of ablations that were measured, which an interrupted audit goes on from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.errors import InputError
from moe_jax.files import replace_text
from moe_jax.json_files import parse_json
from pruning.kit.fitting import misfits
from pruning.scores.ablation import Ablation

RECORD = "ablations.jsonl"
Losses = dict[Ablation, tuple[float, float]]  # dense loss and loss, nats summed over the text


@dataclass(frozen=True)
class _Line:
    """A line of `RECORD`: an `Ablation`, and losses in nats, summed over the text."""

    layer: int
    expert: int
    channel: int | None
    reroute: bool
    dense: float
    loss: float


def begin_section(record: Path, key: dict) -> None:
    """Let what is appended to a record be of this model, text and dtype, after what others left."""
    sections = [line for line in _lines(record) if "model_hash" in line]
    if not sections or sections[-1] != key:
        with open(record, "a", encoding="utf-8") as file:
            file.write(json.dumps(key) + "\n")


def append(record: Path, found: Losses) -> None:
    """Write losses behind the others of the section that was begun last."""
    lines = [
        {"layer": one.layer, "expert": one.expert, "channel": one.channel,
         "reroute": one.reroute, "dense": dense, "loss": loss}
        for one, (dense, loss) in found.items()
    ]  # fmt: skip
    with open(record, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def read_record(record: Path, key: dict) -> Losses:
    """What earlier audits of the same model, text and dtype measured; others lie beside it.

    Raises:
      InputError: a line is damaged.
    """
    known: Losses = {}
    section = None
    for line in _lines(record):
        if "model_hash" in line:
            section = line
        elif section == key:
            dense, loss = line.pop("dense"), line.pop("loss")
            known[Ablation(**line)] = dense, loss
    return known


def _lines(record: Path) -> list[dict[str, Any]]:
    """Lines of a record: the key of a section, then its losses; a torn last one is removed."""
    if not record.is_file():
        return []
    lines = record.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        replace_text(record, "".join(lines[:-1]))
        lines.pop()
    found = []
    for number, text in enumerate(lines, 1):
        try:
            line = parse_json(text)
        except InputError:
            line = None
        if not isinstance(line, dict) or not ("model_hash" in line or not misfits(_Line, line)):
            raise InputError(f"{record}:{number} is damaged; remove the file, and measure again")
        found.append(line)
    return found
