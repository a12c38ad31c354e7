"""argparse as people need it: a command's own usage, near names, and lists that say their end."""

import argparse
import difflib
import itertools
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

WIDEST = 110  # columns of help: longer lines are hard to read
LIST_ENDS = "a list takes every word up to the next flag, so let what stands alone come first"


class Help(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal, but not wider than one reads."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size().columns
        super().__init__(prog, max_help_position=26, width=min(columns, WIDEST) - 2)

    def add_argument(self, action: argparse.Action) -> None:
        """As argparse, which forgets that commands are indented by two."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += 2

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # names of formats stay whole

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":
            return f"{action.metavar} ..."
        return super()._format_args(action, default_metavar)


class OpenNames(tuple):
    """Names that are known; any other may have been registered from outside."""

    def __contains__(self, name: object) -> bool:
        return True


def near(word: str, words: Iterable[str]) -> str:
    """ "did you mean ...? ", or nothing where no word is alike."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"did you mean {found[0]}? " if found else ""


class Parser(argparse.ArgumentParser):
    """A command.

    Attributes:
      commands: of the program, by name, which say whose a flag is.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=Help, **options)
        self._positionals.title = "Arguments"
        self.commands: dict[str, Parser] = {}

    def flags(self) -> dict[str, argparse.Action]:
        """Flags and what they do."""
        return self._option_string_actions

    def shown_flags(self) -> list[str]:
        """Flags that stand in the help."""
        return [flag for flag, act in self.flags().items() if act.help != argparse.SUPPRESS]

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse, refusing what is unknown here; argparse would leave that to the program."""
        given = list(sys.argv[1:] if args is None else args)
        self.check(given)
        found, extra = super().parse_known_args(given, namespace)
        if extra:
            self.error(self._about_extra(given, extra))
        return found, extra

    def check(self, given: Sequence[str]) -> None:
        """Refuse flags that are not known, naming the nearest or the commands that know them."""
        for word in itertools.takewhile(lambda word: word != "--", given):
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in self.flags():
                owners = [name for name, one in self.commands.items() if flag in one.shown_flags()]
                hint = near(flag, self.shown_flags())
                if owners:
                    hint = f"{', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it"
                self.error(f"there is no option {flag} here; {hint}".rstrip("; "))

    def _about_extra(self, given: list[str], extra: list[str]) -> str:
        text = f"{' '.join(extra)} is too much"
        place = given.index(extra[0]) if extra[0] in given else 0
        before = next((word for word in reversed(given[:place]) if word.startswith("--")), "")
        if before in self.flags() and self.flags()[before].nargs is None:
            text += f": {before} takes one value here"
            lists = [n for n, one in self.commands.items() if takes_list(one.flags().get(before))]
            text += f", several in {', '.join(lists)}" if lists else ""
        return text

    def error(self, message: str) -> NoReturn:
        """Usage, the fault, and where to read more, on stderr; exit 2."""
        if "arguments are required" in message and any(map(takes_list, self.flags().values())):
            message += f"; {LIST_ENDS}"
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}\nRead: {self.prog} --help\n")


class Program(Parser):
    """The program: what stands before a command, and the commands.

    Attributes:
      hidden: further names of commands.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.hidden: set[str] = set()

    def check(self, given: Sequence[str]) -> None:
        """Refuse an unknown option or command by name."""
        for word in given:
            if not word.startswith("-"):
                if word not in {*self.commands, *self.hidden}:
                    known = ", ".join(self.commands)
                    hint = near(word, self.commands)
                    self.error(f"there is no command {word}; {hint}choose {known}")
                return
            if word not in self.flags():
                flag = word.partition("=")[0]
                later = any(flag in one.shown_flags() for one in self.commands.values())
                hint = "options stand after the command" if later else near(word, self.flags())
                self.error(f"there is no option {flag} before the command; {hint}".rstrip("; "))


def takes_list(action: argparse.Action | None) -> bool:
    """Whether an option takes every word up to the next flag."""
    return action is not None and action.nargs == "+"
