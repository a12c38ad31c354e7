"""Shell completion: a script that knows commands, flags and values, made from the parser.

By shtab, since three shells quote, list and complete files in three ways; the script is static, so
that a tab press starts no Python.
"""

import argparse

import shtab

from pruning.cli.grammar import build_parser

FOLDERS, FILES = {"FOLDER", "MODEL", "MODEL_OR_FOLDER", "PLAN"}, {"FILE"}


def script(shell: str) -> str:
    """The script of bash, zsh or fish."""
    program = build_parser()
    for command in program.commands.values():
        for action in command._actions:
            _complete_paths(action)
    return shtab.complete(program, shell=shell)


def _complete_paths(action: argparse.Action) -> None:
    if action.metavar in FOLDERS:
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    elif action.metavar in FILES:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
