"""Command-line flags made from the option groups, so that an option is declared once."""

import argparse
import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.export_format import why_not_written
from moe_jax.errors import InputError
from pruning.cli.parser import LIST_ENDS, OpenNames, near
from pruning.recipe.group import About, Options, about, kinds
from pruning.recipe.options import fields_of
from pruning.recipe.recipe import CompressionRecipe, load_recipe
from pruning.recipe.values import AMOUNTS

KINDS = {int: ("a whole number", "N"), float: ("a number", "X"), str: ("text", "NAME")}


def add_group(
    parser: argparse.ArgumentParser,
    group: type[Options],
    *names: str,
    title: str | None = None,
    hidden: bool = False,
) -> None:
    """Add the flags of a group under its title.

    Args:
      parser: a command.
      group: whose fields become flags; its docstring is the title.
      names: fields; default all but the model, which has no flag.
      title: another title.
      hidden: accept the flags without showing them.
    """
    shown = title or (group.__doc__ or "").partition("\n")[0].rstrip(".")
    place = parser if hidden else parser.add_argument_group(shown)
    for field in dataclasses.fields(group):
        if field.name != "model" and field.name in (names or fields_of(group)):
            _add_flag(
                place,
                field,
                kinds(group)[field.name],
                about(group, field.name),
                hidden,
            )


def _add_flag(place: Any, field: dataclasses.Field, kind: Any, words: About, hidden: bool) -> None:
    spelled = "--" + (words.flag or field.name.replace("_", "-"))
    options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
        place.add_argument(spelled, help=_help(words, None, (), hidden), **options)
        return
    is_list = typing.get_origin(kind) is tuple
    if is_list:
        options |= {"nargs": "+", "action": "extend"}
        kind = typing.get_args(kind)[0]
    choices, inner = _choices(str if field.name in AMOUNTS else kind)
    if names := choices or OpenNames(words.names):
        options["choices"] = names
    closed = "{" + ",".join(map(str, choices)) + "}" if choices and not is_list else None
    options["metavar"] = words.shown or closed or KINDS[inner][1]
    options["type"] = value_of(inner, choices, is_list=is_list)
    text = _help(words, field.default, choices if is_list else words.names, hidden)
    place.add_argument(spelled, help=text, **options)
    if words.flag:  # recipes call it by its field's name, and scripts may still
        old = "--" + field.name.replace("_", "-")
        place.add_argument(old, help=argparse.SUPPRESS, **options)


def _help(words: About, default: Any, names: tuple[str, ...], hidden: bool) -> str:
    if hidden:
        return argparse.SUPPRESS
    text = words.help
    if default not in (None, (), dataclasses.MISSING):
        text += f" (default {default})"
    if names:
        text += f"; one of {', '.join(names)}"
    return text.replace("%", "%%")


def value_of(kind: type, choices: tuple = (), *, is_list: bool = False) -> Callable[[str], Any]:
    """A converter of one word of the command line, whose errors say what would be right."""
    cure = f"; {LIST_ENDS}" if is_list else ""

    def convert(word: str) -> Any:
        try:
            value = kind(word)
        except ValueError:
            if word in choices:  # a name among numbers
                return word
            raise argparse.ArgumentTypeError(f"{word!r} is not {KINDS[kind][0]}{cure}") from None
        if choices and value not in choices:
            listed = ", ".join(map(str, choices))
            hint = why_not_written(word) or near(word, map(str, choices))
            raise argparse.ArgumentTypeError(
                f"{word!r} is unknown; {hint}choose among {listed}{cure}"
            )
        return value

    return convert


def _choices(kind: Any) -> tuple[tuple, type]:
    """Allowed values and the type of one value."""
    arguments = [a for a in typing.get_args(kind) if a is not type(None)]
    if typing.get_origin(kind) is typing.Literal:
        return tuple(arguments), type(arguments[0])
    if arguments:
        return _choices(arguments[0])
    return (), kind


def given_options(options: argparse.Namespace, *groups: type[Options]) -> dict[str, Any]:
    """What a command line gives of these groups."""
    names = [name for group in groups for name in fields_of(group)]
    values = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def recipe_from(options: argparse.Namespace) -> CompressionRecipe:
    """The recipe of a parsed command line; flags win over --recipe.

    Raises:
      InputError: an option is out of range, or model or output are missing.
    """
    given = given_options(options, CompressionRecipe)
    if getattr(options, "recipe", None):
        return load_recipe(options.recipe, **given)
    for name in ("model", "output"):
        if name not in given:
            cure = _swallowed(given, options.command) if name == "model" else ""
            flag = " with --output" if name == "output" else ""
            raise InputError(
                f"{name} is missing; give it on the command line{flag} or with --recipe{cure}"
            )
    return CompressionRecipe(**given)


def _swallowed(given: dict[str, Any], command: str) -> str:
    """What to do if a list of values took the model for its own."""
    for name, values in given.items():
        last = values[-1] if isinstance(values, list) else None
        if isinstance(last, str) and (last == "demo" or Path(last, "config.json").is_file()):
            flag = about(CompressionRecipe, name).flag or name.replace("_", "-")
            return (
                f"; --{flag} took {last} as one of its values, because {LIST_ENDS}: "
                f"moe-compress {command} {last} --{flag} ..."
            )
    return ""
