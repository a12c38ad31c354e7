"""Bad input, and looking names up; imports nothing, so that a command line can start with it."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


class InputError(ValueError):
    """Something that the user gave is wrong; the message names it, what is expected, and the cure.

    Any other exception is a fault of the program and deserves its traceback.
    """


class LostProcess(RuntimeError):
    """Another process of those that share the work has ended; the same command goes on later."""


def choose(registry: Mapping[str, Entry], name: str, what: str) -> Entry:
    """Look a name up in a registry.

    Args:
      registry: names to entries.
      name: what the user asked for.
      what: the parameter's name, for the message.

    Returns:
      The entry.

    Raises:
      InputError: the name is unknown; the message has the nearest match and all names.
    """
    if name in registry:
        return registry[name]
    near = difflib.get_close_matches(str(name), registry, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"{what}={name!r} is unknown; {hint}choose one of: {', '.join(registry)}")
