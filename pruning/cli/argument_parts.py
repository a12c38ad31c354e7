"""What the arguments of several commands have in common."""

import argparse
from pathlib import Path

from pruning.cli.flags import add_group, value_of
from pruning.cli.parser import Parser
from pruning.recipe.options import RunOptions, fields_of
from pruning.recipe.place_options import PlaceOptions

MODEL = (
    "checkpoint folder (config.json, safetensors, tokenizer.json), OWNER/NAME[@REVISION] in the "
    "local Hugging Face cache, or demo"
)


def model_argument(command: Parser, *, required: bool = True, more: str = "") -> None:
    """The model that a command reads."""
    command.add_argument(
        "model", nargs=None if required else "?", help=MODEL + more, metavar="MODEL"
    )
    download_flag(command)


def download_flag(command: Parser) -> None:
    """--download."""
    command.add_argument(
        "--download",
        action="store_true",
        help="fetch a model OWNER/NAME from the Hugging Face hub into the local cache first",
    )


def folder_argument(command: Parser, words: str) -> None:
    """The folder that a command reads."""
    command.add_argument("folder", type=Path, help=words, metavar="FOLDER")


def recipe_argument(command: Parser) -> None:
    """--recipe."""
    place = command.add_argument_group("Recipe")
    place.add_argument(
        "--recipe", type=Path, metavar="FILE", help="YAML file of options; flags win"
    )


def rates_flag(place: argparse._ActionsContainer, words: str) -> None:
    """--prune-rate."""
    place.add_argument(
        "--prune-rate", dest="rates", type=value_of(float, is_list=True), nargs="+",
        action="extend", metavar="RATE", help=words,
    )  # fmt: skip


def memory_flag(command: Parser) -> None:
    """--memory-limit."""
    add_group(command, RunOptions, "memory_limit", title="Memory")


def processes_flags(command: Parser) -> None:
    """Those that name the processes of a command that works on one device of each."""
    add_group(command, PlaceOptions, *other_fields(PlaceOptions, "mesh"), title="Hosts")


def other_fields(group: type, *names: str) -> tuple[str, ...]:
    """Fields of a group of options but for some."""
    return tuple(name for name in fields_of(group) if name not in names)
