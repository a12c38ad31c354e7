"""Command-line flags made from the recipe, so that an option is declared once."""

import argparse
import dataclasses
import typing

from moe_jax.errors import InputError
from pruning.recipe.options import about
from pruning.recipe.recipe import CompressionRecipe, load_recipe
from pruning.recipe.values import AMOUNTS


def add_recipe_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the flags of these recipe fields; all but model and output when none are named."""
    hints = typing.get_type_hints(CompressionRecipe)
    for field in dataclasses.fields(CompressionRecipe):
        if field.name == "model" or (names and field.name not in names):
            continue
        flag = "--" + field.name.replace("_", "-")
        kind = hints[field.name]
        words = about(CompressionRecipe, field.name).help.replace("%", "%%")
        options: dict = {"help": words, "default": argparse.SUPPRESS}
        if kind is bool:
            parser.add_argument(flag, action="store_true", **options)
            continue
        if typing.get_origin(kind) is tuple:
            options |= {"nargs": "+", "action": "extend", "metavar": "VALUE"}
            kind = typing.get_args(kind)[0]
        choices, convert = _choices(str if field.name in AMOUNTS else kind)
        if choices:
            options["choices"] = choices
        elif field.default not in (None, (), dataclasses.MISSING):
            options["help"] += f" (default {field.default})"
        parser.add_argument(flag, type=convert, **options)


def _choices(kind) -> tuple[tuple, type]:
    """Allowed values and the type of one value."""
    arguments = [a for a in typing.get_args(kind) if a is not type(None)]
    if typing.get_origin(kind) is typing.Literal:
        return tuple(arguments), type(arguments[0])
    if arguments:
        return _choices(arguments[0])
    return (), kind


def recipe_from(options: argparse.Namespace) -> CompressionRecipe:
    """The recipe of a parsed command line; flags win over --recipe.

    Raises:
      InputError: an option is out of range, or model or output are missing.
    """
    fields = {field.name for field in dataclasses.fields(CompressionRecipe)}
    given: dict[str, typing.Any] = {
        key: value for key, value in vars(options).items() if key in fields and value is not None
    }
    if getattr(options, "recipe", None):
        return load_recipe(options.recipe, **given)
    for name in ("model", "output"):
        if name not in given:
            raise InputError(f"{name} is missing; give it on the command line or with --recipe")
    return CompressionRecipe(**given)
