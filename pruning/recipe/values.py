"""Values of recipe fields as YAML, flags and Python give them, brought to the field's type."""

import difflib
import json
import numbers
import os
import re
import typing
from collections.abc import Sequence
from typing import Any, Literal

from convert.export_format import why_not_written
from moe_jax.errors import InputError, choose

NUMBERS = {int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number")}
TEXTS = ("calibration", "evaluation", "text", "recover_text")
LONGEST = 500  # characters of a value that an error shows
SIZES = ("target_bytes", "memory_limit")  # in bytes
AMOUNTS = (*SIZES, "target_parameters", "tokens", "recover_tokens")
# What asks for calibration text, with the value that asks for none.
NEEDS_TEXT: dict[str, Any] = {
    "calibration": (), "gradients": False, "expert_details": False, "weight_gradients": False,
    "obs": False, "nll_ig": None, "nll_ablate": False, "nll_grad2": False, "until_stable": None,
    "quantizer": "rtn",
}  # fmt: skip
# Beyond every size there is, and small enough that products of two of them are exact.
MOST = 1 << 40
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def check_whole(name: str, value: int, least: int, most: int = MOST, cure: str = "") -> None:
    """Raise InputError unless a whole number lies in a range."""
    if value < least:
        raise InputError(f"{name}={value} must be at least {least}{cure}")
    if value > most:
        raise InputError(f"{name}={value} must be at most {most}{cure}")


def check_rate(name: str, rate: float) -> None:
    """Raise InputError unless a rate at which something is removed leaves some of it."""
    if not 0 <= rate < 1:
        raise InputError(f"{name}={rate} must lie in [0, 1); choose e.g. 0.25")


def check_share(name: str, share: float, hint: str) -> None:
    """Raise InputError unless a share is some or all."""
    if not 0 < share <= 1:
        raise InputError(f"{name}={share} must lie in (0, 1]; {hint}")


def window_within(window: int | None, context: int) -> int:
    """The window asked for, or the usual one, in tokens.

    Raises:
      InputError: it is longer than the model's context.
    """
    if window is not None and window > context:
        raise InputError(
            f"window={window} is longer than the model's context of {context} tokens; choose "
            f"--window {context} or less"
        )
    return window or min(2048, context)


def parse_amount(name: str, text: str) -> int:
    """A whole number with an optional decimal suffix: 6GB, 500MB, 1.5G, 3B (parameters).

    Raises:
      InputError: it is none.
    """
    unit = name in SIZES
    pattern = r"([\d_.]+)\s*([KMGT]?)B?" if unit else r"([\d_.]+)\s*([KMGTB]?)"
    found = re.fullmatch(pattern, text.strip().upper())
    try:
        number = float(found[1] if found else "none")
        return round(number * SUFFIXES[found[2] if found else ""])
    except (ValueError, OverflowError):
        raise InputError(
            f"{name}={text[:80]!r} must be a number with or without a suffix, such as 6GB, 500MB "
            "or 3B"
        ) from None


def layer_rates(entries: Sequence[str]) -> dict[int, float]:
    """Prune rates of single layers from entries LAYER=RATE.

    Raises:
      InputError: an entry has another form, a rate lies outside [0, 1), or a layer comes twice.
    """
    rates: dict[int, float] = {}
    for entry in entries:
        layer, separator, rate = entry.partition("=")
        try:
            index, value = int(layer), float(rate)
        except ValueError:
            separator, index, value = "", 0, 0.0
        if not separator or index < 0 or not 0.0 <= value < 1.0:
            raise InputError(
                f"layer_rate={entry!r} must be LAYER=RATE with a rate in [0, 1), such as 3=0.5; a "
                "rate of 0 leaves the layer alone"
            )
        if index in rates:
            raise InputError(f"layer_rate={list(entries)} names layer {index} twice")
        rates[index] = value
    return rates


def text_words(name: str, entry: dict[str, Any]) -> str:
    """A text file given as a mapping, in the words of the command line.

    Args:
      name: of the option.
      entry: `path`, and perhaps `weight`, `field` or `template`, and `format`.

    Raises:
      InputError: another key, no path, or a value of another type.
    """
    kinds: dict[str, Any] = {"path": str, "weight": float, "field": str, "template": str,
                             "format": str}  # fmt: skip
    for key in entry:
        choose(kinds, key, f"key of {name}")
    if "path" not in entry:
        raise InputError(f"{name}={repr(entry)[:LONGEST]} has no path; write path: FILE")
    given = {key: typed(f"{name}: {key}", value, kinds[key]) for key, value in entry.items()}
    weight = f"={given['weight']}" if "weight" in given else ""
    options = (key for key in ("field", "template", "format") if key in given)
    return given["path"] + weight + "".join(f":{key}={json.dumps(given[key])}" for key in options)


def typed(name: str, value: Any, kind: Any) -> Any:
    """The value as its field's type: a list becomes a tuple, a whole number a float.

    Raises:
      InputError: naming value and expectation.
    """
    shown = f"{name}={repr(value)[:LONGEST]}"
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in inner:
        if value is None:
            return None
        value = parse_amount(name, value) if name in AMOUNTS and isinstance(value, str) else value
        return typed(name, value, inner[0])
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{shown} must be a list; write [{str(value)[:LONGEST]}]")
        return tuple(
            text_words(name, one) if isinstance(one, dict) and name in TEXTS
            else typed(name, one, inner[0]) for one in value
        )  # fmt: skip
    if origin is Literal:
        if not any(type(value) is type(one) and value == one for one in inner):
            near = difflib.get_close_matches(str(value), [one for one in inner if type(one) is str])
            like = f"did you mean {near[0]!r}? " if near else ""
            hint = why_not_written(str(value)) or like
            raise InputError(
                f"{shown} is unknown; {hint}choose among {', '.join(map(repr, inner))}"
            )
        return value
    if kind is str and isinstance(value, os.PathLike):
        # A path has lost its "./", which tells a folder of that name from the embedded model.
        text = os.fspath(value)
        return f"./{text}" if (name, text) == ("model", "demo") else text
    number, words = NUMBERS.get(kind, (kind, "true or false" if kind is bool else "text"))
    if isinstance(value, number) and (kind is bool or not isinstance(value, bool)):
        return kind(value)
    hint = ""
    if name == "prune_rate" and isinstance(value, list | tuple):
        hint = "; `moe-compress plan` and `eval` take several rates"
    raise InputError(f"{shown} must be {words}{hint}")
