"""The arguments of every command; its help shows what it reads.

A function here takes the parser of the command of its name.
"""

import argparse
from pathlib import Path

from pruning.cli.control_flags import add_controls
from pruning.cli.flags import add_group, value_of
from pruning.cli.parser import Parser
from pruning.recipe.health_options import HealthOptions
from pruning.recipe.options import (
    BUDGETS,
    TEXT_FILES,
    WHOLE_TEXT,
    ExportOptions,
    PlanOptions,
    RunOptions,
    ScoreOptions,
    TextOptions,
    fields_of,
)
from pruning.recipe.paper_options import PaperOptions
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.recover_options import DEFAULT_TOKENS, RecoverOptions
from pruning.recipe.task_options import TaskOptions

MODEL = (
    "checkpoint folder (config.json, safetensors, tokenizer.json), OWNER/NAME[@REVISION] in the "
    "local Hugging Face cache, or demo"
)
SHELLS = ("bash", "zsh", "fish")
# Of the planning options those that people give when they score: the others keep their defaults
# until `plan`, which decides all of them anew.
DECIDING = (*BUDGETS, "criterion", "attribution", "planner", "seed")
CUT = ("cut_router", "top_k")  # of a plan that is there
NOT_ESTIMATED = ("calibration", "calibration_field", "evaluation", "evaluation_tokens",
                 "first_tokens", "loss_on")  # fmt: skip


def _model(command: Parser, *, required: bool = True, more: str = "") -> None:
    command.add_argument(
        "model", nargs=None if required else "?", help=MODEL + more, metavar="MODEL"
    )
    _download(command)


def _download(command: Parser) -> None:
    command.add_argument(
        "--download",
        action="store_true",
        help="fetch a model OWNER/NAME from the Hugging Face hub into the local cache first",
    )


def _folder(command: Parser, words: str) -> None:
    command.add_argument("folder", type=Path, help=words, metavar="FOLDER")


def _recipe(command: Parser) -> None:
    place = command.add_argument_group("Recipe")
    place.add_argument(
        "--recipe", type=Path, metavar="FILE", help="YAML file of options; flags win"
    )


def _rates(place: argparse._ActionsContainer, words: str) -> None:
    place.add_argument(
        "--prune-rate", dest="rates", type=value_of(float, is_list=True), nargs="+",
        action="extend", metavar="RATE", help=words,
    )  # fmt: skip


def _memory(command: Parser) -> None:
    add_group(command, RunOptions, "memory_limit", title="Memory")


def _others(group: type, *names: str) -> tuple[str, ...]:
    return tuple(name for name in fields_of(group) if name not in names)


def compress(command: Parser) -> None:
    """Arguments of `compress`."""
    _model(command, required=False)
    _recipe(command)
    for group in (RunOptions, TextOptions, ScoreOptions, PlanOptions, ExportOptions):
        add_group(command, group)


def score(command: Parser) -> None:
    """Arguments of `score`."""
    _model(command, required=False)
    _recipe(command)
    for group in (RunOptions, TextOptions, ScoreOptions):
        add_group(command, group)
    title = "Plan: whose kept set tells when the text is enough; where `plan` begins"
    add_group(command, PlanOptions, *DECIDING, title=title)
    add_group(command, PlanOptions, *_others(PlanOptions, *DECIDING), hidden=True)
    add_group(command, ExportOptions, hidden=True)
    add_group(command, PlaceOptions)


def estimate(command: Parser) -> None:
    """Arguments of `estimate`."""
    _model(command, required=False, more="; config.json alone suffices")
    _recipe(command)
    place = command.add_argument_group("Estimate")
    _rates(place, "one or several fractions of the expert channels to remove, in [0, 1)")
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
    add_group(command, PlanOptions, *_others(PlanOptions, "prune_rate"))
    add_group(command, ExportOptions)


def plan(command: Parser) -> None:
    """Arguments of `plan`."""
    _folder(command, "output folder of score or compress")
    place = command.add_argument_group("Prune rates")
    _rates(place, "one or several fractions of the expert channels to remove, in [0, 1)")
    add_group(command, PlanOptions, *_others(PlanOptions, "prune_rate"))
    _memory(command)


def export(command: Parser) -> None:
    """Arguments of `export`."""
    _folder(command, "folder with plan.json")
    add_group(command, ExportOptions, "export", "mtp", "repair")
    add_group(command, PlanOptions, *CUT, title="Router")
    add_group(command, RunOptions, "overwrite", title="Output")
    _memory(command)


def apply(command: Parser) -> None:
    """Arguments of `apply`."""
    command.add_argument(
        "plan", type=Path, metavar="PLAN", help="folder with plan.json, or plan.json itself"
    )
    _model(command)
    command.add_argument(
        "--allow-other-model", action="store_true",
        help="apply the plan to another model of the same shape; the cards say so",
    )  # fmt: skip
    add_group(command, RunOptions, "output", "overwrite", title="Output")
    _memory(command)
    names = ("export", "bits", "group_size", "requantize", "mtp", "repair")
    add_group(command, ExportOptions, *names)
    add_group(command, PlanOptions, *CUT, title="Router")
    add_group(command, TextOptions, "calibration", title="Text: what the plan was repaired on")


def recover(command: Parser) -> None:
    """Arguments of `recover`."""
    command.add_argument(
        "folder", type=Path, metavar="OUT_OR_FOLDER",
        help="output folder of compress or apply, or one of its exports",
    )  # fmt: skip
    add_group(command, RecoverOptions)


def evaluate(command: Parser) -> None:
    """Arguments of `eval`."""
    command.add_argument(  # text, because ./demo is not demo
        "folder", help=f"{MODEL}; or output folder of score", metavar="FOLDER"
    )
    _download(command)
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
        help="type of the activations (default float32)",
    )  # fmt: skip
    add_group(command, TextOptions, "first_tokens", "loss_on", title="Tokens")
    _memory(command)
    sweep = command.add_argument_group("Plans of an output folder")
    _rates(sweep, "measure plans of the stored statistics instead, at these rates in [0, 1)")
    add_group(command, TaskOptions)
    add_group(command, HealthOptions)


def audit(command: Parser) -> None:
    """Arguments of `audit`."""
    command.add_argument("model", metavar="MODEL_OR_FOLDER", help=f"{MODEL}; or output of score")
    _download(command)
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
    add_group(command, RunOptions, *_others(RunOptions, "memory_limit"))
    texts = _others(TextOptions, "evaluation", "evaluation_tokens")
    add_group(command, TextOptions, *texts, title="Text")
    add_group(command, ScoreOptions, *_others(ScoreOptions, "weights_only", "until_stable"))
    add_group(command, PlanOptions, "seed", title="Chance")
    add_group(command, PlaceOptions)


def report(command: Parser) -> None:
    """Arguments of `report`."""
    _folder(command, "output folder of compress")


def verify(command: Parser) -> None:
    """Arguments of `verify`."""
    _folder(command, "folder with plan.json and exports/")
    _memory(command)


def compare(command: Parser) -> None:
    """Arguments of `compare`."""
    _model(command)
    place = command.add_argument_group("Comparison")
    place.add_argument(
        "--rules", nargs="+", action="extend", metavar="RULE",
        help="standard (default; some 20 rules, forward statistics only), all, or names and "
        "patterns such as 'fair*'; all also collects gradients, which takes several times as long; "
        "auto beside them is what planner auto takes at each rate",
    )  # fmt: skip
    _rates(place, "fractions of the expert channels to remove, in (0, 1) (default 0.25 0.5)")
    add_controls(place)
    title = "Tasks of lm-evaluation-harness, beside the texts"
    add_group(command, TaskOptions, *_others(TaskOptions, "output"), title=title)
    add_group(command, RunOptions, *_others(RunOptions, "memory_limit"))
    add_group(command, TextOptions)
    add_group(
        command,
        ScoreOptions,
        "gradients",
        "expert_details",
        "weight_gradients",
        "obs",
        "batch",
        "dtype",
    )
    add_group(command, PlanOptions, "block", "seed", title="Plans")
    add_group(command, ExportOptions, "group_size", title="Fewer bits")
    add_group(command, PlaceOptions)


def paper(command: Parser) -> None:
    """Arguments of `paper`."""
    _model(command)
    place = command.add_argument_group("Protocol")
    place.add_argument(
        "--rules", nargs="+", action="extend", metavar="RULE",
        help="names and patterns of rules of compare, and auto for what planner auto takes "
        "(default paper-act, auto, those that drop whole experts, uniform-act); of those that drop "
        "whole experts the one that loses least has rows",
    )  # fmt: skip
    _rates(place, "fractions of the expert channels to remove, in (0, 1) (default 0.25 0.5)")
    place.add_argument(
        "--bits", dest="compared_bits", nargs="+", action="extend", metavar="N",
        type=value_of(int, (4, 8, 16), is_list=True),
        help="bits of the weights (default 16 4); one of 4, 8, 16",
    )  # fmt: skip
    title = "Tasks of lm-evaluation-harness; without them the tables have losses alone"
    add_group(command, TaskOptions, *_others(TaskOptions, "output"), title=title)
    add_group(command, PaperOptions)
    add_group(command, RunOptions, *_others(RunOptions, "memory_limit"))
    add_group(command, TextOptions)
    add_group(
        command, ScoreOptions, "gradients", "expert_details", "weight_gradients", "obs", "batch",
        "dtype",
    )  # fmt: skip
    add_group(command, PlanOptions, "block", "seed", title="Plans")
    add_group(command, ExportOptions, "group_size", title="Fewer bits")


def completion(command: Parser) -> None:
    """Arguments of `completion`."""
    command.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    command.add_argument("-h", "--help", action="help", help="show this help and exit")


def inspect(command: Parser) -> None:
    """Arguments of `inspect`."""
    _model(command)
    command.add_argument(
        "--fingerprint", action="store_true",
        help="also say what identifies the model, a hash for which all weights are read",
    )  # fmt: skip
