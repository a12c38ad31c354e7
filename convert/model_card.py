"""What the README.md of a downloaded folder says in its front matter."""

from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
# Strings only: YAML takes the language "no" for a truth value. libyaml's, where it is there: of a
# few thousand brackets the loader in Python makes minutes.
_Loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def front_matter(folder: Path) -> dict[str, Any]:
    """Names and values between the fences of a model card, as text; {} without a readable one.

    People write cards: one that cannot be read says nothing.
    """
    try:
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
        before, *parts = text.split("---\n", 2)
        found = yaml.load(parts[0], _Loader) if not before and len(parts) == 2 else None
    except (OSError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def original_model(folder: Path) -> str | None:
    """The model that a folder was made from, by its card's `base_model`; None if it names none."""
    named = front_matter(folder).get("base_model")
    first = named[0] if isinstance(named, list) and named else named
    return first[:200] if isinstance(first, str) and first else None
