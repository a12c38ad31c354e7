"""Looking names up in plain dicts."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def choose(registry: Mapping[str, Entry], name: str, what: str) -> Entry:
    """Look a name up in a registry.

    Args:
      registry: names to entries.
      name: what the user asked for.
      what: the parameter's name, for the message.

    Returns:
      The entry.

    Raises:
      ValueError: the name is unknown; the message has the nearest match and all names.
    """
    if name in registry:
        return registry[name]
    near = difflib.get_close_matches(str(name), registry, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{what}={name!r} is unknown; {hint}choose one of: {', '.join(registry)}")
