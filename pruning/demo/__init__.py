"""The embedded demo: a small model, its texts, and how corpus, tokenizer and weights are made."""

import os
from pathlib import Path
from typing import Literal

DEMO = Path(__file__).parent


def model_folder(model: str | os.PathLike) -> Path:
    """The checkpoint folder a recipe names; the text "demo" is the embedded model, a path or
    "./demo" a folder of that name."""
    return DEMO / "model" if model == "demo" else Path(model)


def demo_texts(kind: Literal["calibration", "evaluation"]) -> tuple[str, ...]:
    """Paths of the embedded texts of a kind."""
    return tuple(str(name) for name in sorted((DEMO / "text").glob(f"{kind}*")))
