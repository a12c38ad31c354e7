"""The command line that repeats a run."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from pruning.recipe.group import about
from pruning.recipe.recipe import CompressionRecipe


def command_line(recipe: Mapping[str, Any]) -> str:
    """`moe-compress compress` with the options that differ from their defaults, for a shell.

    Args:
      recipe: fields of a `CompressionRecipe` by name; lists may stand for tuples.
    """
    words = ["moe-compress", "compress", recipe["model"]]
    for field in dataclasses.fields(CompressionRecipe):
        value, default = recipe.get(field.name, field.default), field.default
        value = tuple(value) if isinstance(value, list) else value
        if field.name == "model" or value == default:
            continue
        name = about(CompressionRecipe, field.name).flag or field.name
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag)
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)
