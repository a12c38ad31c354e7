"""The command line: its commands, and what all of them take."""

import argparse
from collections.abc import Callable

from pruning.cli import arguments, measuring_arguments
from pruning.cli.examples import EXAMPLES, OUTCOMES
from pruning.cli.parser import Parser, Program

DESCRIPTION = "Make Mixture-of-Experts language models several times smaller."

Command = tuple[str, str, Callable[[Parser], None]]
COMMANDS: dict[str, Command] = {  # usage, summary, arguments
    "compress": (
        "MODEL --output FOLDER [--calibration FILE ...] [options]",
        "Score, plan, export, verify, evaluate and report.",
        arguments.compress,
    ),
    "score": (
        "MODEL --output FOLDER [--calibration FILE ...] [options]",
        "Measure every expert channel on calibration text; writes statistics.",
        arguments.score,
    ),
    "inspect": ("MODEL", "Say what a checkpoint is, from its headers.", arguments.inspect),
    "estimate": (
        "MODEL [--prune-rate RATE ...] [options]",
        "Say what a compression gives and costs, before any work.",
        arguments.estimate,
    ),
    "plan": (
        "FOLDER [--prune-rate RATE ...] [options]",
        "Choose the channels to keep from the statistics in a folder.",
        arguments.plan,
    ),
    "export": (
        "FOLDER [--export FORMAT ...] [options]",
        "Write checkpoints from the plan in a folder.",
        arguments.export,
    ),
    "apply": (
        "PLAN MODEL --output FOLDER [options]",
        "Export base weights under a plan made before or elsewhere.",
        arguments.apply,
    ),
    "verify": ("FOLDER", "Check every export in a folder against the plan.", arguments.verify),
    "recover": (
        "OUT_OR_FOLDER --text FILE ... --output FOLDER [options]",
        "Train a pruned model to win back what it lost, and export it.",
        arguments.recover,
    ),
    "eval": (
        "FOLDER --text FILE ... | --tasks TASK ... [options]",
        "Measure likelihood on text, or tasks; with --prune-rate, over plans.",
        measuring_arguments.evaluate,
    ),
    "audit": (
        "MODEL_OR_FOLDER [options]",
        "Measure how well each score ranks the true worth of experts.",
        measuring_arguments.audit,
    ),
    "report": (
        "FOLDER",
        "Print the table of a finished run and write its page again.",
        arguments.report,
    ),
    "compare": (
        "MODEL --output FOLDER [--rules RULE ...] [options]",
        "Rank pruning rules at equal size on held-out text.",
        measuring_arguments.compare,
    ),
    "paper": (
        "MODEL --output FOLDER [--calibration FILE ...] [--tasks TASK ...] [options]",
        "Run the paper's protocol: its tables with and without recovery, its figures.",
        measuring_arguments.paper,
    ),
    "completion": (
        "SHELL",
        "Print a script that completes commands and flags.",
        arguments.completion,
    ),
}


def build_parser() -> Program:
    """The command line."""
    program = Program(
        prog="moe-compress",
        description=DESCRIPTION,
        usage="moe-compress COMMAND ...",
        epilog=OUTCOMES,
    )
    places = program.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="Commands", parser_class=Parser
    )
    for name, (usage, summary, fill) in COMMANDS.items():
        command = places.add_parser(
            name,
            prog=f"moe-compress {name}",
            help=summary,
            description=summary,
            usage=f"moe-compress {name} {usage}",
            epilog=f"example:\n  {EXAMPLES[name]}",
        )
        fill(command)
        if name != "completion":
            _common(command, name)
        program.commands[name] = command
    _common(program, None)
    for command in program.commands.values():
        command.commands = program.commands
    # The name it once had: scripts may call it, help does not show it.
    places.choices["prune"] = program.commands["export"]
    program.hidden.add("prune")
    return program


def _common(parser: Parser, command: str | None) -> None:
    """What every command takes; in front of a command, too."""
    place = parser.add_argument_group("What is shown")
    if command is not None:
        place.add_argument(
            "--json", metavar="FILE",
            help="write the numbers there as JSON; - prints them, and nothing else, on stdout",
        )  # fmt: skip
    # In front and behind: the one behind must not undo the one in front.
    default = False if command is None else argparse.SUPPRESS
    flags = (
        ("--quiet", "no progress on stderr"),
        ("--verbose", "more on stderr: what was read, what every stage took"),
        ("--debug", "a traceback for every error"),
    )
    for flag, words in flags:
        place.add_argument(flag, action="store_true", default=default, help=words)
    place.add_argument("-h", "--help", action="help", help="show this help and exit")
