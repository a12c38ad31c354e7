"""Which formats a recipe exports: those asked for, if the model's family and the bits allow."""

import typing
from collections.abc import Sequence
from typing import Literal

from moe_jax.errors import InputError

Export = Literal[
    "ragged-bf16", "ragged-int4", "layered-bf16", "layered-int4", "padded-bf16", "padded-int4",
    "padded-mxfp4",
]  # fmt: skip
EXPORTS: tuple[Export, ...] = typing.get_args(Export)
GROUP_SIZES = (128, 64, 32)
FLOAT4: Export = "padded-mxfp4"
FLOAT4_GROUP = 32


def is_packed(export: str) -> bool:
    """Whether an export has 4 bits."""
    return not export.endswith("bf16")


def width_policy(exports: Sequence[str]) -> str:
    """The width policy whose plans these formats store without padding."""
    shapes = {name.partition("-")[0] for name in exports}
    if "padded" in shapes:
        return "uniform"
    return "layer" if "layered" in shapes else "free"


def choose_exports(
    asked: Sequence[Export],
    formats: Sequence[str],
    bits: int,
    group_size: int | None,
    quantizer: str,
) -> tuple[Export, ...]:
    """The formats asked for, or the first of the family that has the bits.

    Args:
      asked: names of `EXPORTS`, () for the default.
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
    fitting: list[Export] = [
        name for name in EXPORTS if name in formats and is_packed(name) == (bits == 4)
    ]
    exports = tuple(asked or fitting[:1])
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
