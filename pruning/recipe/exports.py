"""Which formats a recipe exports: those asked for, if the model's family and the bits allow."""

from collections.abc import Sequence
from typing import Literal

from convert.export_format import (
    FLOAT4,
    FLOAT4_GROUP,
    FLOAT8,
    FORMATS,
    MIXED,
    ExportFormat,
    FormatName,
)
from moe_jax.errors import InputError

Bits = Literal[4, 8, 16, "auto"]


def bits_of(export: str) -> int:
    """Bits of an export's weights."""
    return ExportFormat(export).bits


def width_policy(exports: Sequence[str]) -> str:
    """The width policy whose plans these formats store without padding."""
    layouts = {ExportFormat(name).layout for name in exports}
    if "padded" in layouts:
        return "uniform"
    return "layer" if "layered" in layouts else "free"


def choose_exports(
    asked: Sequence[FormatName],
    formats: Sequence[str],
    bits: Bits,
    group_size: int | None,
    quantizer: str,
) -> tuple[FormatName, ...]:
    """The formats asked for, or the first of the family that has the bits.

    Args:
      asked: names of `FORMATS`, () for the default.
      formats: those the model's family has.
      bits: 4, 8 or 16; 4, the default, takes 16 where the family has no 4; "auto" is one format.
      group_size: weights per scale, None if left open.
      quantizer: "rtn" or "gptq".

    Returns:
      The names.

    Raises:
      InputError: one that the family lacks, or that contradicts the other options.
    """
    if lacking := [name for name in asked if name not in formats]:
        raise InputError(
            f"export={lacking[0]!r} does not exist for this model's family, because no "
            f"program would read it; choose from {', '.join(formats)}"
        )
    if bits == "auto":
        return _of_each_layer(asked, formats, quantizer)
    least = min((bits_of(name) for name in asked), default=bits)
    if least < bits or (bits == 8 and least > bits):
        raise InputError(
            f"bits={bits} contradicts export={list(asked)}; give one of the two, or --bits "
            f"{least}" + ("" if bits == 16 else f", or --export {FLOAT8}")
        )
    if bits == 8 and not asked and FLOAT8 not in formats:
        raise InputError(
            f"bits=8 is the format {FLOAT8}, which this model's family has not; choose from "
            f"{', '.join(formats)}"
        )
    fitting: list[FormatName] = [n for n in FORMATS if n in formats and bits_of(n) == bits]
    plain: list[FormatName] = [n for n in FORMATS if n in formats and bits_of(n) == 16]
    exports = tuple(asked or fitting[:1] or plain[:1])
    if FLOAT4 in exports and group_size not in (None, FLOAT4_GROUP):
        raise InputError(
            f"group_size={group_size} contradicts export={FLOAT4!r}, whose groups are "
            f"{FLOAT4_GROUP}; leave --group-size away"
        )
    others = [name for name in exports if bits_of(name) < 16 and not ExportFormat(name).is_int4]
    if others and quantizer == "gptq":
        raise InputError(
            f"quantizer='gptq' chooses integers of 4 bits, export={others[0]!r} stores others; use "
            "rtn"
        )
    return exports


def _of_each_layer(
    asked: Sequence[FormatName], formats: Sequence[str], quantizer: str
) -> tuple[FormatName, ...]:
    if wrong := [name for name in asked if name != MIXED]:
        raise InputError(
            f"bits='auto' gives each layer bits of its own, which export={wrong[0]!r} has no place "
            f"for; leave --export away, or choose --bits {bits_of(wrong[0])}"
        )
    if MIXED not in formats:
        raise InputError(
            f"bits='auto' is the format {MIXED}, which this model's family has not; choose from "
            f"{', '.join(formats)}"
        )
    if quantizer == "gptq":
        raise InputError(
            "quantizer='gptq' chooses integers of 4 bits, and bits='auto' may give a layer others; "
            "use rtn"
        )
    return (MIXED,)
