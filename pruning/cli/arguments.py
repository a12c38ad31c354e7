"""The arguments of every command; its help shows what it reads.

A function here takes the parser of the command of its name.
"""

import argparse
from pathlib import Path

from pruning.cli.argument_parts import (
    folder_argument,
    memory_flag,
    model_argument,
    other_fields,
    processes_flags,
    rates_flag,
    recipe_argument,
)
from pruning.cli.flags import add_group, value_of
from pruning.cli.parser import Parser
from pruning.recipe.options import (
    BUDGETS,
    ExportOptions,
    PlanOptions,
    RunOptions,
    ScoreOptions,
    TextOptions,
)
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.recover_options import DEFAULT_TOKENS, RecoverOptions

SHELLS = ("bash", "zsh", "fish")
# Of the planning options those that people give when they score: the others keep their defaults
# until `plan`, which decides all of them anew.
DECIDING = (*BUDGETS, "criterion", "attribution", "planner", "seed")
CUT = ("cut_router", "top_k")  # of a plan that is there
NOT_ESTIMATED = ("calibration", "calibration_field", "evaluation", "evaluation_tokens",
                 "first_tokens", "loss_on")  # fmt: skip


def compress(command: Parser) -> None:
    """Arguments of `compress`."""
    model_argument(command, required=False)
    recipe_argument(command)
    for group in (
        RunOptions, TextOptions, ScoreOptions, PlanOptions, ExportOptions, PlaceOptions,
    ):  # fmt: skip
        add_group(command, group)


def score(command: Parser) -> None:
    """Arguments of `score`."""
    model_argument(command, required=False)
    recipe_argument(command)
    for group in (RunOptions, TextOptions, ScoreOptions):
        add_group(command, group)
    title = "Plan: whose kept set tells when the text is enough; where `plan` begins"
    add_group(command, PlanOptions, *DECIDING, title=title)
    add_group(command, PlanOptions, *other_fields(PlanOptions, *DECIDING), hidden=True)
    add_group(command, ExportOptions, hidden=True)
    add_group(command, PlaceOptions)


def estimate(command: Parser) -> None:
    """Arguments of `estimate`."""
    model_argument(command, required=False, more="; config.json alone suffices")
    recipe_argument(command)
    place = command.add_argument_group("Estimate")
    rates_flag(place, "one or several fractions of the expert channels to remove, in [0, 1)")
    place.add_argument(
        "--tensor-parallel", type=value_of(int), default=1, metavar="N",
        help="GPUs that will share each layer in a server (default 1)",
    )  # fmt: skip
    place.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        help="time one layer to foretell times (default: if weights are there)",
    )
    place.add_argument(
        "--recovery-tokens", default=DEFAULT_TOKENS, metavar="N",
        help="text that recover would train on, such as 300K or 10M (default 1M)",
    )  # fmt: skip
    add_group(command, RunOptions, "output", "scratch", "memory_limit")
    add_group(command, RunOptions, "overwrite", hidden=True)
    add_group(command, TextOptions, "max_tokens", "window")
    add_group(command, TextOptions, *NOT_ESTIMATED, hidden=True)
    add_group(command, ScoreOptions)
    add_group(command, PlanOptions, *other_fields(PlanOptions, "prune_rate"))
    add_group(command, ExportOptions)


def plan(command: Parser) -> None:
    """Arguments of `plan`."""
    folder_argument(command, "output folder of score or compress")
    place = command.add_argument_group("Prune rates")
    rates_flag(place, "one or several fractions of the expert channels to remove, in [0, 1)")
    add_group(command, PlanOptions, *other_fields(PlanOptions, "prune_rate"))
    memory_flag(command)


def export(command: Parser) -> None:
    """Arguments of `export`."""
    folder_argument(command, "folder with plan.json")
    add_group(command, ExportOptions, "export", "mtp", "repair")
    add_group(command, PlanOptions, *CUT, title="Router")
    add_group(command, RunOptions, "overwrite", title="Output")
    memory_flag(command)
    processes_flags(command)


def apply(command: Parser) -> None:
    """Arguments of `apply`."""
    command.add_argument(
        "plan", type=Path, metavar="PLAN", help="folder with plan.json, or plan.json itself"
    )
    model_argument(command)
    command.add_argument(
        "--allow-other-model", action="store_true",
        help="apply the plan to another model of the same shape; the cards say so",
    )  # fmt: skip
    add_group(command, RunOptions, "output", "overwrite", title="Output")
    memory_flag(command)
    names = ("export", "bits", "group_size", "requantize", "mtp", "repair")
    add_group(command, ExportOptions, *names)
    add_group(command, PlanOptions, *CUT, title="Router")
    add_group(command, TextOptions, "calibration", title="Text: what the plan was repaired on")
    processes_flags(command)


def recover(command: Parser) -> None:
    """Arguments of `recover`."""
    command.add_argument(
        "folder", type=Path, metavar="OUT_OR_FOLDER",
        help="output folder of compress or apply, or one of its exports",
    )  # fmt: skip
    add_group(command, RecoverOptions)
    add_group(command, PlaceOptions)


def report(command: Parser) -> None:
    """Arguments of `report`."""
    folder_argument(command, "output folder of compress")


def verify(command: Parser) -> None:
    """Arguments of `verify`."""
    folder_argument(command, "folder with plan.json and exports/")
    memory_flag(command)
    processes_flags(command)


def completion(command: Parser) -> None:
    """Arguments of `completion`."""
    command.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    command.add_argument("-h", "--help", action="help", help="show this help and exit")


def inspect(command: Parser) -> None:
    """Arguments of `inspect`."""
    model_argument(command)
    command.add_argument(
        "--fingerprint", action="store_true",
        help="also say what identifies the model, a hash for which all weights are read",
    )  # fmt: skip
