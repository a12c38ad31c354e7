"""The embedded demo: a small model, its texts, and how corpus, tokenizer and weights are made."""

import os
from pathlib import Path
from typing import Literal

from pruning.kit.hub import find_folder

DEMO = Path(__file__).parent


def model_folder(model: str | os.PathLike, *, weights: bool = True) -> Path:
    """The checkpoint folder a recipe names: the text "demo" is the embedded model, "./demo" a
    folder of that name, and OWNER/NAME a model of the local Hugging Face cache.

    Args:
      model: as `pruning.kit.hub.find_folder` knows it, or "demo".
      weights: whether config.json alone does not suffice.

    Raises:
      InputError: the cache has no such model, or not all of it.
    """
    return DEMO / "model" if model == "demo" else find_folder(model, weights=weights)


def demo_texts(kind: Literal["calibration", "evaluation"]) -> tuple[str, ...]:
    """Paths of the embedded texts of a kind."""
    return tuple(str(name) for name in sorted((DEMO / "text").glob(f"{kind}*")))
