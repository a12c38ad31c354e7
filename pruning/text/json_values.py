"""JSON values one after another in a text of any size, whatever the line ends between them."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from moe_jax.errors import InputError

CHUNK = 1 << 16  # characters
BLANK = re.compile(r"[ \t\r\n\ufeff]*")
BLANK_IN_LINE = re.compile(r"[ \t\r]*")
_DECODER = json.JSONDecoder()
# A value may be cut inside an escape or a word: so far before the end its error is none of it.
_CUT = 12


class JsonText:
    """A text that is read as far as its values need.

    Attributes:
      is_full: `most` characters were read and there are more.
    """

    def __init__(self, file: TextIO, most: int):
        self.file, self.left, self.is_full = file, most, False
        self.buffer, self.at = "", 0

    def peek(self, blank: re.Pattern = BLANK) -> str:
        """Go to the next character that is not blank and look at it; "" at the end."""
        while True:
            self.at = blank.match(self.buffer, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._fill():
                return ""

    def value(self) -> tuple[Any, bool]:
        """Take the value that begins here.

        Returns:
          The value, and whether it has a line end in it.

        Raises:
          json.JSONDecodeError: there is none, or it does not end in the text or the limit.
          InputError: it is nested too deep, or no number of Python's.
        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                may_go_on = error.pos >= len(self.buffer) - _CUT or "Unterminated" in error.msg
                if not may_go_on or not self._fill():
                    raise
            except RecursionError:
                raise InputError("is nested too deep") from None
            except ValueError as error:  # a number of too many digits
                raise InputError(f"is not valid JSON: {error}") from None
            else:
                start, self.at = self.at, end
                return value, "\n" in self.buffer[start:end]

    def values(self) -> Iterator[Any]:
        """An array's elements, or values one after another, that end within the limit.

        Raises:
          InputError: something else is between them; a clause that follows a place.
        """
        is_array = self.peek() == "["
        self.at += is_array
        while self.peek() != ("]" if is_array else ""):
            try:
                value, _ = self.value()
            except json.JSONDecodeError as error:
                if self.is_full:
                    return
                raise InputError(f"is not valid JSON: {error.msg}") from None
            yield value
            if is_array and self.peek() == ",":
                self.at += 1
            elif is_array and self.peek() != "]" and not self.is_full:
                raise InputError("is not followed by ',' or ']', so the array is not whole")
        self.at += is_array
        if self.peek():
            raise InputError("is followed by more than the end of its array")

    def _fill(self) -> bool:
        """Read about as much again as is left to look at; whether there was more."""
        wanted = max(CHUNK, len(self.buffer) - self.at)
        more = self.file.read(min(wanted, self.left))
        self.left -= len(more)
        if not self.left and not more:
            self.is_full = self.is_full or bool(self.file.read(1))
        self.buffer, self.at = self.buffer[self.at :] + more, 0
        return bool(more)


def json_layout(file: TextIO, most: int, *, is_named: bool) -> str:
    """How JSON objects lie in a text: "JSON lines", "JSON", or "" if it begins with none.

    Args:
      file: the text from its beginning.
      most: characters that a value may have.
      is_named: whether the file's name says that it is JSON; then strings in an array count, too.
    """
    text = JsonText(file, most)
    is_array = text.peek() == "["
    text.at += is_array
    if text.peek() != "{" and not (is_array and is_named and text.peek() in ('"', "]")):
        return ""
    if text.peek() == "]":
        return "JSON"
    try:
        _, has_lines = text.value()
    except json.JSONDecodeError:
        return ("JSON" if is_array else "JSON lines") if text.is_full else ""
    except InputError:
        return "JSON"
    if is_array:
        return "JSON" if text.peek() in (",", "]", "") else ""
    if text.peek(BLANK_IN_LINE) not in ("\n", ""):
        return ""
    return "JSON" if has_lines else "JSON lines"
