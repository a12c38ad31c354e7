"""The arguments of the commands that measure models and rules; as `arguments`."""

import argparse

from pruning.cli.argument_parts import (
    MODEL,
    download_flag,
    memory_flag,
    model_argument,
    other_fields,
    rates_flag,
)
from pruning.cli.control_flags import add_controls
from pruning.cli.flags import add_group, value_of
from pruning.cli.parser import Parser
from pruning.recipe.health_options import HealthOptions
from pruning.recipe.options import (
    TEXT_FILES,
    WHOLE_TEXT,
    ExportOptions,
    PlanOptions,
    RunOptions,
    ScoreOptions,
    TextOptions,
)
from pruning.recipe.paper_options import PaperOptions
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.task_options import TaskOptions


def evaluate(command: Parser) -> None:
    """Arguments of `eval`."""
    command.add_argument(  # text, because ./demo is not demo
        "folder", help=f"{MODEL}; or output folder of score", metavar="FOLDER"
    )
    download_flag(command)
    place = command.add_argument_group("Text")
    texts: dict = {"dest": "text", "nargs": "+", "action": "extend"}
    place.add_argument(
        "--text", **texts, metavar="FILE",
        help="text files: " + TEXT_FILES,
    )  # fmt: skip
    place.add_argument("--evaluation", **texts, help=argparse.SUPPRESS)
    place.add_argument(
        "--text-field", default="text", metavar="FIELD",
        help="field of rows that holds the text (default text)",
    )  # fmt: skip
    tokens: dict = {"dest": "evaluation_tokens", "type": value_of(int), "metavar": "N"}
    place.add_argument(
        "--evaluation-tokens", **tokens, default=WHOLE_TEXT,
        help=f"most tokens measured of each text (default {WHOLE_TEXT})",
    )  # fmt: skip
    place.add_argument("--max-tokens", **tokens, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    numbers = (
        ("window", None, "tokens per window (default: the context, at most 2048)"),
        ("stride", None, "tokens between windows (default: half a window)"),
        ("batch", 8, "windows per step (default 8)"),
    )
    for name, default, words in numbers:
        place.add_argument(
            f"--{name}", type=value_of(int), default=default, metavar="N", help=words
        )
    place.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="type of the activations; bfloat16 rounds them, and is several times faster on "
        "accelerators and on processors with AMX (default float32)",
    )  # fmt: skip
    add_group(command, TextOptions, "first_tokens", "loss_on", title="Tokens")
    memory_flag(command)
    sweep = command.add_argument_group("Plans of an output folder")
    rates_flag(sweep, "measure plans of the stored statistics instead, at these rates in [0, 1)")
    add_group(command, TaskOptions)
    add_group(command, HealthOptions)


def audit(command: Parser) -> None:
    """Arguments of `audit`."""
    command.add_argument("model", metavar="MODEL_OR_FOLDER", help=f"{MODEL}; or output of score")
    download_flag(command)
    place = command.add_argument_group("Sample")
    for name, default, words in (
        ("experts", 32, "experts to take out, spread over the layers"),
        ("channels", 64, "channels to take out, spread over the layers"),
        ("sample-tokens", 8192, "calibration tokens the loss is measured on"),
    ):
        place.add_argument(
            f"--{name}", type=value_of(int), default=default, metavar="N",
            help=f"{words} (default {default})",
        )  # fmt: skip
    place.add_argument(
        "--tokens", dest="sample_tokens", type=value_of(int), default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )  # fmt: skip
    place.add_argument(
        "--layers-alone", type=value_of(float), nargs="?", const=0.5, metavar="RATE",
        help="also take this fraction (0.5 if none is said) of each layer's channels, those of "
        "least score, from that layer alone, and say how far the concentration of a layer's score "
        "foretells the loss; costs a pass through the model for each layer",
    )  # fmt: skip
    add_group(command, RunOptions, *other_fields(RunOptions, "memory_limit"))
    texts = other_fields(TextOptions, "evaluation", "evaluation_tokens")
    add_group(command, TextOptions, *texts, title="Text")
    add_group(command, ScoreOptions, *other_fields(ScoreOptions, "weights_only", "until_stable"))
    add_group(command, PlanOptions, "seed", title="Chance")
    add_group(command, PlaceOptions)


def compare(command: Parser) -> None:
    """Arguments of `compare`."""
    model_argument(command)
    place = command.add_argument_group("Comparison")
    place.add_argument(
        "--rules", nargs="+", action="extend", metavar="RULE",
        help="standard (default; some 20 rules, forward statistics only), all, or names and "
        "patterns such as 'fair*'; all also collects gradients, which takes several times as long; "
        "auto beside them is what planner auto takes at each rate",
    )  # fmt: skip
    rates_flag(place, "fractions of the expert channels to remove, in (0, 1) (default 0.25 0.5)")
    add_controls(place)
    title = "Tasks of lm-evaluation-harness, beside the texts"
    add_group(command, TaskOptions, *other_fields(TaskOptions, "output"), title=title)
    _compared_options(command)
    add_group(command, PlaceOptions)


def paper(command: Parser) -> None:
    """Arguments of `paper`."""
    model_argument(command)
    place = command.add_argument_group("Protocol")
    place.add_argument(
        "--rules", nargs="+", action="extend", metavar="RULE",
        help="names and patterns of rules of compare, and auto for what planner auto takes "
        "(default paper-act, auto, those that drop whole experts, uniform-act); of those that drop "
        "whole experts the one that loses least has rows",
    )  # fmt: skip
    rates_flag(place, "fractions of the expert channels to remove, in (0, 1) (default 0.25 0.5)")
    place.add_argument(
        "--bits", dest="compared_bits", nargs="+", action="extend", metavar="N",
        type=value_of(int, (4, 8, 16), is_list=True),
        help="bits of the weights (default 16 4); one of 4, 8, 16",
    )  # fmt: skip
    title = "Tasks of lm-evaluation-harness; without them the tables have losses alone"
    add_group(command, TaskOptions, *other_fields(TaskOptions, "output"), title=title)
    add_group(command, PaperOptions)
    _compared_options(command)


def _compared_options(command: Parser) -> None:
    """Options of the recipe that rules are compared under."""
    add_group(command, RunOptions, *other_fields(RunOptions, "memory_limit"))
    add_group(command, TextOptions)
    add_group(
        command, ScoreOptions, "gradients", "expert_details", "weight_gradients", "obs", "batch",
        "dtype",
    )  # fmt: skip
    add_group(command, PlanOptions, "block", "seed", title="Plans")
    add_group(command, ExportOptions, "group_size", title="Fewer bits")
