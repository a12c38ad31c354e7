"""JSON as files from elsewhere hold it, refused in one sentence where it is unsound."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_jax.errors import InputError

# Published files are not six deep. What is nested without bound ends readers and writers alike in
# their recursion limit, here or later.
MOST_NESTED = 64


def parse_json(
    text: str | bytes, unique: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """A JSON value.

    Args:
      text: UTF-8 if bytes.
      unique: what makes an object of its pairs, see `json.loads`.

    Raises:
      InputError: it is no JSON, or nested more than 64 deep; the message is a clause that follows
        the name of the file.
    """
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except InputError:
        raise
    except ValueError as error:  # of Unicode and of too many digits, too
        raise InputError(f"is not valid JSON: {error}") from None
    except RecursionError:
        raise InputError(_DEEP) from None
    level, depth = [value], 0
    while level := [
        child
        for one in level
        if isinstance(one, dict | list)
        for child in (one.values() if isinstance(one, dict) else one)
        if isinstance(child, dict | list)
    ]:
        depth += 1
        if depth > MOST_NESTED:
            raise InputError(_DEEP)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      InputError: the file holds none; naming it.
      OSError: the file cannot be read.
    """
    try:
        value = parse_json(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path} {error}; get it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


_DEEP = f"is nested more than {MOST_NESTED} deep"
