"""Stored tensors matched with those that a model has: other names, leftovers, what does not fit."""

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.export_format import Widths
from convert.families import FAMILIES
from convert.mtp import mtp_prefixes
from convert.quantized.config import Quantization, read_quantization
from convert.reader import SafetensorsFolder
from convert.rules import EMBEDDING, LM_HEAD, Family, expected_tensors
from convert.view import FLOATS, View
from convert.views import open_views
from moe_jax.config import ModelConfig
from moe_jax.errors import InputError

logger = logging.getLogger(__name__)

_CHUNK = 64 << 20  # bytes of two tensors that are compared at once

# What every program computes anew, whatever a file holds: tables of rotary angles.
_LEFT_OUT = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")


@dataclass(frozen=True)
class Matched:
    """The tensors of a folder, sorted.

    Attributes:
      folder: the checkpoint with its tensors under the names of the family's rules.
      tied: whether the embedding is the head, too.
      model: those of the model by the names of the family's rules.
      mtp: those of layers that predict further tokens.
      beside: names on disk of those of other parts, such as a vision tower.
      problems: what is wrong, causes before what follows from them.
    """

    folder: SafetensorsFolder
    tied: bool
    model: dict[str, View]
    mtp: dict[str, View]
    beside: tuple[str, ...]
    problems: list[str]


def match_tensors(
    folder: SafetensorsFolder,
    hf: dict[str, Any],
    family: Family,
    config: ModelConfig,
    widths: Widths,
    quantization: Quantization | None,
) -> Matched:
    """Sort the tensors of a folder and compare them with those that the model must have.

    Args:
      folder: the checkpoint.
      hf: config.json of the text model.
      family, config, widths, quantization: what it says.

    Returns:
      The tensors and what is wrong with them.
    """
    inner, beside = _inner(folder, family)
    left_out = [name for name in inner.names if _LEFT_OUT.fullmatch(name)]
    if left_out:
        words = "%s: left out %d tensor(s) such as %s, which programs compute themselves"
        logger.warning(words, folder.folder, len(left_out), left_out[0])
    views, problems = _named_views(inner, quantization, family)
    problems += [
        f"{name} is {folder.spec(name)[0]}: only the text model is read in few bits, other parts "
        "are copied as floats; give the 16-bit model"
        for name in beside
        if quantization is not None and folder.spec(name)[0].name not in (*FLOATS, "int64")
    ]
    prefixes = mtp_prefixes(family, hf)
    mtp = {name: views.pop(name) for name in list(views) if name.startswith(prefixes)}
    tied = config.tie_embeddings
    if tied and LM_HEAD in views:
        tied = _same_tensors(inner, EMBEDDING, LM_HEAD)
        if tied:
            del views[LM_HEAD]
        else:
            words = "%s: %s is not the embedding, so it is the head, though config.json ties them"
            logger.warning(words, folder.folder, LM_HEAD)
            config = config.replace(tie_embeddings=False)
    problems += [f"shard {file} is missing; download it again" for file in folder.missing_shards]
    expected = expected_tensors(family, config, widths)
    wrong = _mismatches(family, expected, views)
    if wrong:
        problems += hints(folder.folder, hf, family.model_type)
    return Matched(inner, tied, views, mtp, beside, problems + wrong)


def fitting_families(folder: SafetensorsFolder, hf: dict[str, Any]) -> list[str]:
    """Model types whose models have the very tensors of a folder, all names and shapes.

    Args:
      folder: the checkpoint.
      hf: its config.json, whatever model type it says.
    """
    found = []
    for name, family in FAMILIES.items():
        if family.ragged:
            continue
        said = {**hf, "model_type": name}
        try:
            config = family.config_from_hf(said)
            quantization = read_quantization(family.text_config(said), family)
            views, problems = _named_views(_inner(folder, family)[0], quantization, family)
        except InputError:
            continue
        expected, prefixes = expected_tensors(family, config), mtp_prefixes(family, said)
        own = {n: view.shape for n, view in views.items() if not n.startswith(prefixes)}
        if config.tie_embeddings:
            own.pop(LM_HEAD, None)
        if not problems and own == expected:
            found.append(name)
    return found


def hints(folder: Path, hf: dict[str, Any], said: str | None = None) -> list[str]:
    """A sentence that names the families whose tensors a folder has, if they are others.

    Args:
      folder: the checkpoint; one without sound tensors gives no hint.
      hf: its config.json.
      said: the model type that does not fit, if it is known.
    """
    try:
        fitting = fitting_families(SafetensorsFolder(folder), hf)
    except InputError:
        return []
    if not fitting or said in fitting:
        return []
    names = " or ".join(map(repr, fitting))
    return [
        f"its tensors and sizes are those of a {names}: if it computes the same, set model_type to "
        "that in config.json"
    ]


def _inner(folder: SafetensorsFolder, family: Family) -> tuple[SafetensorsFolder, tuple[str, ...]]:
    """(the tensors of the text model by the names of the rules, names on disk of all others)."""
    if family.wrapper is None:
        return folder, ()
    beside = (name for name in folder.names if family.wrapper.inner(name) is None)
    return folder.renamed(family.wrapper.inner), tuple(beside)


def _named_views(
    folder: SafetensorsFolder, quantization: Quantization | None, family: Family
) -> tuple[dict[str, View], list[str]]:
    """(views by the names of the rules, problems)."""
    folder = folder.renamed(lambda name: None if _LEFT_OUT.fullmatch(name) else name)
    stored, problems = open_views(folder, quantization, together=family.together)
    views: dict[str, View] = {}
    for name, view in stored.items():
        public = family.canonical(name)
        if public in views:
            problems.append(f"{public} is stored twice, under two names")
        views[public] = view
    return views, problems


def _mismatches(
    family: Family, expected: dict[str, tuple[int, ...]], views: dict[str, View]
) -> list[str]:
    """Misshaped, foreign and missing tensors, in this order: the last often follow from others."""
    problems = [
        f"{name} has shape {list(views[name].shape)}; config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if name in views and views[name].shape != shape
    ]
    problems += [
        f"{name} is not part of a {family.public_type}" for name in _sorted(views.keys() - expected)
    ]
    return problems + [f"{name} is missing" + _cure(name) for name in expected if name not in views]


def _cure(name: str) -> str:
    if name != LM_HEAD:
        return ""
    return (
        "; if the model shares it with the embedding, set tie_word_embeddings to true in "
        "config.json, else download it again"
    )


def _sorted(names: Iterable[str]) -> list[str]:
    """By name, numbers by value."""
    return sorted(names, key=lambda name: [
        (part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")
    ])  # fmt: skip


def _same_tensors(folder: SafetensorsFolder, one: str, other: str) -> bool:
    """Whether two tensors are stored and equal byte for byte; some rows in memory at once."""
    if one not in folder or other not in folder or folder.spec(one) != folder.spec(other):
        return False
    dtype, (rows, *columns) = folder.spec(one)
    row = math.prod(columns)
    step = max(1, _CHUNK // (row * dtype.itemsize))
    for first in range(0, rows, step):
        shape = (min(step, rows - first), *columns)
        parts = (folder.read_part(name, first * row, shape) for name in (one, other))
        if len({part.tobytes() for part in parts}) > 1:
            return False
    return True
