"""Models around a text model of a known family that are not known themselves."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.families import FAMILIES, find_family
from convert.reader import SafetensorsFolder
from convert.rules import EMBEDDING, FINAL_NORM, LM_HEAD, TEXT, Family, Wrapper
from moe_jax.errors import InputError

logger = logging.getLogger(__name__)


def wrapped_family(folder: Path, hf: Mapping[str, Any]) -> Family:
    """The family of the text model inside a model of an unknown type.

    Args:
      folder: the checkpoint; its tensors say what stands before the names of the text model.
      hf: its config.json.

    Returns:
      That of `text_config`, as a wrapper's, exported as padded-bf16 alone.

    Raises:
      InputError: the type is unknown, and no known text model is inside of it.
    """
    try:
        return find_family(hf.get("model_type"))
    except InputError:
        tower, names = _tower(hf), _names(folder)
        if tower is None or not names:
            raise
    outer, kind = str(hf.get("model_type"))[:80], tower.model_type
    prefixes = _prefixes(names)
    if prefixes is None:
        raise InputError(
            f"model_type={outer!r} is unknown; its {TEXT} is a {kind}, but there is no one tensor "
            f"that ends with {_ending(EMBEDDING)} beside one that ends with {_ending(FINAL_NORM)}"
        )
    words = "%s: %s is not known itself: its text model, a %s under %s, is read, all else is copied"
    logger.warning(words, folder, outer, kind, next(iter(prefixes)) or "no prefix")
    tied = hf[TEXT].get("tie_word_embeddings") is True
    wrapper = Wrapper(prefixes, default_tied=tied)
    return dataclasses.replace(tower, wrapper=wrapper, formats=("padded-bf16",))


def _tower(hf: Mapping[str, Any]) -> Family | None:
    """The family of a config's text model, if it is a known one that stands alone elsewhere."""
    text = hf.get(TEXT)
    found = FAMILIES.get(str(text.get("model_type"))) if isinstance(text, Mapping) else None
    if found is not None and found.twin is not None:
        twin = find_family(found.twin.model_type)
        found = twin if twin.rules == found.rules else None
    return None if found is None or found.ragged or found.wrapper else found


def _names(folder: Path) -> tuple[str, ...]:
    try:
        return SafetensorsFolder(folder).names
    except InputError:  # said where they are read
        return ()


def _prefixes(names: tuple[str, ...]) -> dict[str, str] | None:
    """What stands before the text model's names -> what its rules have there."""
    stems = [_before(name, EMBEDDING) for name in names if name.endswith(_ending(EMBEDDING))]
    whole = [stem for stem in stems if stem + _ending(FINAL_NORM) in names]
    if len(whole) != 1:
        return None
    heads = [name for name in names if name.split(".")[-2:] == LM_HEAD.split(".")]
    found = {whole[0]: "model."}
    return found | ({heads[0].removesuffix("weight"): "lm_head."} if len(heads) == 1 else {})


def _ending(name: str) -> str:
    return name.removeprefix("model.")


def _before(name: str, known: str) -> str:
    return name.removesuffix(_ending(known))
