"""The formats of an export by name: the widths a folder stores and how its weights are stored.

Only names and whole numbers, without an array library: the options of a command line need them
before anything is imported. No other module takes a format's name apart.
"""

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moe_jax.errors import InputError

# What folders are made as; only those that some program reads.
FormatName = Literal[
    "ragged-bf16", "ragged-int4", "layered-bf16", "layered-int4", "padded-bf16", "padded-int4",
    "padded-mxfp4", "padded-fp8", "ragged-int8", "padded-int8", "ragged-mixed",
]  # fmt: skip
FORMATS: tuple[FormatName, ...] = typing.get_args(FormatName)
# With bits of its own for each layer, which a plan says and no name does. Ragged alone: of several
# schemes transformers takes one for the experts of all layers, where it holds a layer's as one.
MIXED: FormatName = "ragged-mixed"
# Asked for by part of a name, and why no folder is made so.
NOT_WRITTEN = {
    "nf4": "bitsandbytes NF4 is not written, because transformers leaves fused experts in 16 bits "
    "with it and reads such a folder back as another model",
}
FLOAT4: FormatName = "padded-mxfp4"
FLOAT8: FormatName = "padded-fp8"
Layout = Literal["ragged", "layered", "padded"]  # a width per expert, per layer or per model
# Of linear layers, or with mxfp4 of experts alone; "mixed" has those of `STORAGES`.
Storage = Literal["bf16", "int4", "mxfp4", "fp8", "int8", "mixed"]
STORAGES: dict[int, Storage] = {16: "bf16", 8: "int8", 4: "int4"}  # by bits

GROUP_SIZES = (128, 64, 32)  # weights per scale of integers to choose from
FLOAT4_GROUP = 32  # of MXFP4, which knows no other
FLOAT8_BLOCK = 128  # rows, and columns, of a weight per scale of 8-bit floats
GROUPED_STEP = 8  # 16-bit channels in the 16 bytes of which torch._grouped_mm wants all strides
MTP = ("drop", "keep", "prune")  # what becomes of layers that predict further tokens

Widths = tuple[tuple[int, ...], ...]  # channels [layer][expert], () for a dense layer


def why_not_written(word: str) -> str:
    """Why a format of another name is not written, as a hint before its alternatives, or ""."""
    return next((f"{why}; " for name, why in NOT_WRITTEN.items() if name in word.lower()), "")


@dataclass(frozen=True)
class ExportFormat:
    """A folder layout: a width per expert, per layer or per model, 16, 8 or 4 bits.

    Attributes:
      name: one of `FORMATS`, its layout and its storage.
      group_size: weights per scale of integers; MXFP4 knows 32 only, 8-bit floats have blocks.
      constants: whether experts without channels add constants (ragged folders, or in the place of
        the output's bias), or nothing.
      mtp: one of `MTP`: what becomes of layers that predict further tokens.
      requantize: whether weights that the base stores in few bits are rounded a second time, and
        linear layers that it stores in 16 bits are rounded too; else codes are taken over, where
        the two formats are alike.
      cut_router: whether experts without channels are gone for the router, too: those that are left
        are numbered anew, or in ragged folders keep their numbers.
      top_k: experts per token, if these are fewer than the model's.
      layer_bits: of `MIXED`, 4, 8 or 16 for each layer of the model: bits of its linear layers; ()
        before there is a plan that says them, which counts as 4 throughout.

    Raises:
      InputError: a value is none of those.
    """

    name: str
    group_size: int = 32
    constants: bool = False
    mtp: str = "drop"
    requantize: bool = False
    cut_router: bool = False
    top_k: int | None = None
    layer_bits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        wrong = self.layer_bits and self.name != MIXED
        if wrong or {*self.layer_bits} - {*STORAGES}:
            raise InputError(
                f"layer_bits={self.layer_bits} must be 4, 8 or 16 for each layer with {MIXED}, and "
                f"() with other formats, not with {self.name}"
            )
        if self.name not in FORMATS:
            raise InputError(f"export={self.name!r} is unknown; choose among {', '.join(FORMATS)}")
        if self.mtp not in MTP:
            raise InputError(f"mtp={self.mtp!r} is unknown; choose among {', '.join(MTP)}")
        if self.is_float4 and self.group_size != FLOAT4_GROUP:
            raise InputError(
                f"group_size={self.group_size} must be {FLOAT4_GROUP} for {self.name}, whose "
                "blocks the format fixes"
            )

    @property
    def layout(self) -> Layout:
        """What shares one width: all channels of an expert, of a layer or of the model."""
        return typing.cast(Layout, self.name.partition("-")[0])

    @property
    def storage(self) -> Storage:
        """How weights are stored."""
        return typing.cast(Storage, self.name.partition("-")[2])

    @property
    def bits(self) -> int:
        """Bits of a stored weight, of the layer with the fewest: 4, 8 or 16."""
        if self.layer_bits:
            return min(self.layer_bits)
        return {"bf16": 16, "fp8": 8, "int8": 8}.get(self.storage, 4)

    @property
    def is_ragged(self) -> bool:
        """Whether every expert keeps its own width."""
        return self.layout == "ragged"

    @property
    def is_layered(self) -> bool:
        """Whether all experts of a layer have one width, and layers differ."""
        return self.layout == "layered"

    @property
    def is_padded(self) -> bool:
        """Whether all experts have one width, so that stock classes load the folder."""
        return self.layout == "padded"

    @property
    def is_packed(self) -> bool:
        """Whether linear layers are stored in few bits."""
        return self.bits < 16

    @property
    def is_integer(self) -> bool:
        """Whether linear layers are stored in integers of 4 or 8 bits, at least of a layer."""
        return self.is_packed and self.storage in ("int4", "int8", "mixed")

    @property
    def is_int4(self) -> bool:
        """Whether they are in those of 4 bits, which GPTQ chooses and some models have."""
        return self.storage == "int4"

    @property
    def is_float4(self) -> bool:
        """Whether experts are stored in MXFP4."""
        return self.storage == "mxfp4"

    @property
    def is_float8(self) -> bool:
        """Whether linear layers are stored in 8-bit floats with a scale per block."""
        return self.storage == "fp8"

    @property
    def step(self) -> int:
        """Channels of which the widths of experts are multiples: those that share a scale, or that
        the grouped products take at a time by which stock classes run their experts."""
        if self.is_float8:
            return FLOAT8_BLOCK
        if self.is_packed:
            return self.group_size
        return GROUPED_STEP if self.is_padded else 1

    @property
    def renumbers(self) -> bool:
        """Whether the experts that are left have other numbers than in the model: where a class
        has one number of experts for all layers."""
        return self.cut_router and not self.is_ragged

    def holds_constants(self, expert_bias: bool) -> bool:
        """Whether there is a place for what emptied experts add, in a family with biases or not."""
        return self.is_ragged or expert_bias

    def like(
        self, *, layout: Layout | None = None, storage: Storage | None = None
    ) -> "ExportFormat":
        """The same format but for its layout or its storage."""
        name = f"{layout or self.layout}-{storage or self.storage}"
        return dataclasses.replace(self, name=name, layer_bits=() if storage else self.layer_bits)

    def of_layer(self, index: int) -> "ExportFormat":
        """How the folder holds a layer: as itself unless each has bits of its own."""
        return self.like(storage=STORAGES[self.layer_bits[index]]) if self.layer_bits else self

    def stored_widths(self, widths: Widths) -> Widths:
        """Channels that the folder stores per layer and expert."""
        if self.is_ragged:
            return widths
        columns = zip(self.layer_widths(widths), widths, strict=True)
        return tuple(tuple(width for _ in counts) for width, counts in columns)

    def layer_widths(self, widths: Widths) -> list[int]:
        """The one width of each layer unless the folder is ragged; 0 for layers without experts."""
        if self.is_padded:
            width = self.padded_width(widths)
            return [width if counts else 0 for counts in widths]
        return [self._filled(counts) if counts else 0 for counts in widths]

    def padded_width(self, widths: Widths) -> int:
        """The one width of a padded folder: that of the widest expert, whole groups."""
        return self._filled([count for counts in widths for count in counts])

    def _filled(self, counts: Sequence[int]) -> int:
        widest = max(1, *counts)  # clients know no expert without channels
        return -(-widest // self.step) * self.step
