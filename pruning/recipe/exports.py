"""Which formats a recipe exports: those asked for, if the model's family and the bits allow."""

from collections.abc import Sequence

from convert.export_format import FLOAT4, FLOAT4_GROUP, FORMATS, ExportFormat, FormatName
from moe_jax.errors import InputError


def is_packed(export: str) -> bool:
    """Whether an export has 4 bits."""
    return ExportFormat(export).is_packed


def width_policy(exports: Sequence[str]) -> str:
    """The width policy whose plans these formats store without padding."""
    layouts = {ExportFormat(name).layout for name in exports}
    if "padded" in layouts:
        return "uniform"
    return "layer" if "layered" in layouts else "free"


def choose_exports(
    asked: Sequence[FormatName],
    formats: Sequence[str],
    bits: int,
    group_size: int | None,
    quantizer: str,
) -> tuple[FormatName, ...]:
    """The formats asked for, or the first of the family that has the bits, or 16 if none has.

    Args:
      asked: names of `FORMATS`, () for the default.
      formats: those the model's family has.
      bits: 4 or 16.
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
    if bits == 16 and any(is_packed(name) for name in asked):
        raise InputError(
            f"bits=16 contradicts export={list(asked)}; give one of the two, or --bits 4"
        )
    fitting: list[FormatName] = [
        name for name in FORMATS if name in formats and is_packed(name) == (bits == 4)
    ]
    plain: list[FormatName] = [n for n in FORMATS if n in formats and not is_packed(n)]
    exports = tuple(asked or fitting[:1] or plain[:1])
    if FLOAT4 in exports and group_size not in (None, FLOAT4_GROUP):
        raise InputError(
            f"group_size={group_size} contradicts export={FLOAT4!r}, whose groups are "
            f"{FLOAT4_GROUP}; leave --group-size away"
        )
    if FLOAT4 in exports and quantizer == "gptq":
        raise InputError(
            f"quantizer='gptq' chooses integers, export={FLOAT4!r} stores floats; use rtn"
        )
    return exports
