"""What a group of options is: a frozen dataclass whose fields say what they mean."""

import dataclasses
import functools
import typing
from dataclasses import dataclass

from pruning.recipe.values import MOST, check_whole, typed


@dataclass(frozen=True)
class About:
    """What an option means to a user.

    Attributes:
      help: one phrase.
      least: its least value.
      most: the largest value of a whole number.
      names: values that help lists; others, registered from outside, are known when a run starts.
      shown: what stands for a value in help, such as FILE.
      flag: its flag without dashes, where that has another name than the field.
    """

    help: str
    least: int | None = None
    most: int = MOST
    names: tuple[str, ...] = ()
    shown: str | None = None
    flag: str | None = None


@functools.cache
def kinds(group: type) -> dict[str, typing.Any]:
    """Type of every field of an option group, by name."""
    return typing.get_type_hints(group)


@functools.cache
def _descriptions(group: type) -> dict[str, About]:
    hints = typing.get_type_hints(group, include_extras=True)
    return {
        name: extra
        for name, hint in hints.items()
        for extra in typing.get_args(hint)[1:]
        if isinstance(extra, About)
    }


def about(group: type, name: str) -> About:
    """The description of a field of an option group."""
    return _descriptions(group)[name]


@dataclass(frozen=True, kw_only=True)
class Options:
    """A group of options: values are brought to their field's type, and checked, when made.

    Raises:
      InputError: a value of another type or out of range; it names the option.
    """

    def __post_init__(self) -> None:
        for name, kind in kinds(type(self)).items():
            object.__setattr__(self, name, typed(name, getattr(self, name), kind))
        for field in dataclasses.fields(self):
            value, words = getattr(self, field.name), about(type(self), field.name)
            if type(value) is int:
                least = value if words.least is None else words.least
                check_whole(field.name, value, least, words.most)
        for group in reversed(type(self).__mro__):
            if "check" in vars(group):
                group.check(self)  # type: ignore[attr-defined]
