"""Which text: a file, what of its rows is meant, and its weight in a mixture."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_jax.errors import InputError

LIGHTEST, HEAVIEST = 1e-9, 1e9  # beyond, sums and quotients of weights lose the others
PROSE = "prose"
USUAL = "text"  # the field that is read unless another is named
_FORM = "FILE:field=NAME, FILE:template='{NAME}\\n{NAME}' or FILE:format=prose"
_NAME = r":(?:field|template|format)="
_OPTION = re.compile(rf':(\w+)=("(?:[^"\\]|\\.)*"(?={_NAME}|$)|.*?)(?={_NAME}|$)', re.DOTALL)
# {name} stands for a field; {{ and }} are braces. Nothing else of `str.format` has a meaning.
_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


@dataclass(frozen=True)
class TextSource:
    """One text file, and how it is read.

    Attributes:
      path: the file.
      field: the field of a row that holds the text; without such a field a row may be a chat.
      weight: of its tokens in a mixture.
      template: joins several fields, as in "{question}\\n{answer}"; replaces `field` unless "".
      format: "prose" reads any file as one document; "" looks at the content.

    Raises:
      InputError: the weight does not lie in [1e-9, 1e9], the template names no field, or the
        format is unknown.
    """

    path: Path
    field: str = USUAL
    weight: float = 1.0
    template: str = ""
    format: str = ""

    def __post_init__(self) -> None:
        if not LIGHTEST <= self.weight <= HEAVIEST:
            raise InputError(
                f"text {f'{self.path}={self.weight}'!r}: the weight after '=' must be a "
                f"positive number; write FILE or FILE=2.5, in [{LIGHTEST:g}, {HEAVIEST:g}]"
            )
        if self.template and not self.template_fields:
            raise InputError(
                f"text {str(self.path)!r}: template={self.template!r} names no field; write "
                "{NAME} where the text of field NAME belongs"
            )
        if self.format not in ("", PROSE):
            raise InputError(
                f"text {str(self.path)!r}: format={self.format!r} is unknown; only "
                f"format={PROSE} can be asked for, everything else is seen in the file"
            )

    @property
    def template_fields(self) -> tuple[str, ...]:
        """Fields that the template joins, each once."""
        return tuple(
            dict.fromkeys(found[1] for found in _PLACE.finditer(self.template) if found[1])
        )

    def joined(self, value_of: Callable[[str], str]) -> str:
        """The template with every field's value in its place."""
        return _PLACE.sub(
            lambda found: value_of(found[1]) if found[1] else found[0][0], self.template
        )

    @property
    def options(self) -> str:
        """What `parse` reads behind the file and its weight to the same effect, "" if nothing."""
        field = f":field={json.dumps(self.field)}" if self.field != USUAL else ""
        template = json.dumps(self.template.replace("\\", "\\\\"))
        chosen = f":template={template}" if self.template else field
        return chosen + (f":format={self.format}" if self.format else "")

    @classmethod
    def parse(cls, text: str, field: str = USUAL) -> "TextSource":
        """Read `FILE[=WEIGHT][:field=NAME | :template=TEXT][:format=prose]`.

        A file that exists is meant whatever its name has in it. A name or template in double
        quotes is a JSON string; in a template `\\n`, `\\t` and `\\\\` are a line end, a tab and a
        backslash.

        Args:
          text: the words.
          field: holds the text where the words name neither field nor template.

        Raises:
          InputError: if the weight is not a positive number, or an option is not understood.
        """
        starts = [found.start() for found in re.finditer(_NAME, text)] + [len(text)]
        if Path(text).exists():
            starts = starts[-1:]
        files = [_file_and_weight(text[:start], text) for start in starts]
        # The longest that exists: options begin behind it.
        found = [i for i, (path, _) in enumerate(files) if Path(path).exists()]
        index = found[-1] if found else 0
        path, weight = files[index]
        values = {key: _value(key, value, text) for key, value in
                  _OPTION.findall(text[starts[index] :])}  # fmt: skip
        if "field" in values and "template" in values:
            raise InputError(f"text {text!r} names a field and a template; write one of them")
        return cls(Path(path), **{"field": field, **values, "weight": _number(weight, text)})


def without_folders(words: str) -> str:
    """Words as `TextSource.parse` reads them, the file by its name alone."""
    found = re.search(_NAME, words)
    start = found.start() if found else len(words)
    return Path(words[:start]).name + words[start:]


def _file_and_weight(head: str, text: str) -> tuple[str, str]:
    path, separator, weight = head.rpartition("=")
    return (path, weight) if separator and not Path(head).exists() else (head, "1")


def _number(weight: str, text: str) -> float:
    try:
        return float(weight)
    except ValueError:
        raise InputError(
            f"text {text!r}: the weight after '=' must be a positive number; write FILE or "
            f"FILE=2.5, or {_FORM}"
        ) from None


def _value(key: str, value: str, text: str) -> str:
    """An option's value as it is meant."""
    if value[:1] == value[-1:] == '"' and len(value) > 1:
        try:
            value = json.loads(value, strict=False)
        except ValueError as error:
            raise InputError(f"text {text!r}: {key}={value} is no JSON string: {error}") from None
    if key == "template":
        value = re.sub(r"\\[nt\\]", lambda found: _ESCAPES[found[0]], value)
    if not value:
        raise InputError(f"text {text!r}: {key} is empty; write {_FORM}")
    return value
