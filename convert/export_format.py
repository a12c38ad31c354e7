"""The formats of an export, and which family has which."""

from collections.abc import Sequence
from dataclasses import dataclass

from convert.rules import FORMATS, Family, Widths
from moe_jax.config import ModelConfig
from moe_jax.errors import InputError
from moe_jax.mxfp4 import BLOCK

MTP = ("drop", "keep", "prune")


@dataclass(frozen=True)
class ExportFormat:
    """A folder layout: a width per expert, per layer or per model, 16 or 4 bits.

    Attributes:
      name: one of `convert.rules.FORMATS`.
      group_size: weights per 4-bit scale; MXFP4 knows 32 only.
      constants: whether experts without channels add constants (ragged folders, or in the place of
        the output's bias), or nothing.
      mtp: one of `MTP`: what becomes of layers that predict further tokens.
    """

    name: str
    group_size: int = 32
    constants: bool = False
    mtp: str = "drop"

    def __post_init__(self) -> None:
        if self.mtp not in MTP:
            raise InputError(f"mtp={self.mtp!r} is unknown; choose among {', '.join(MTP)}")
        if self.is_float4 and self.group_size != BLOCK:
            raise InputError(
                f"group_size={self.group_size} must be {BLOCK} for {self.name}, whose blocks the "
                "format fixes"
            )

    @property
    def is_ragged(self) -> bool:
        """Whether every expert keeps its own width."""
        return self.name.startswith("ragged")

    @property
    def is_layered(self) -> bool:
        """Whether all experts of a layer have one width, and layers differ."""
        return self.name.startswith("layered")

    @property
    def is_padded(self) -> bool:
        """Whether all experts have one width, so that stock classes load the folder."""
        return self.name.startswith("padded")

    @property
    def is_packed(self) -> bool:
        """Whether linear layers are stored in 4 bits: all as integers, or experts as floats."""
        return self.is_float4 or self.name.endswith("int4")

    @property
    def is_float4(self) -> bool:
        """Whether experts are stored in MXFP4."""
        return self.name.endswith("mxfp4")

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
        return -(-widest // self.group_size) * self.group_size if self.is_packed else widest


def packed_format(family: Family) -> ExportFormat:
    """The first 4-bit format that a family can be exported in."""
    forms = (ExportFormat(name) for name in FORMATS if name in family.formats)
    return next(form for form in forms if form.is_packed)


def check_format(family: Family, form: ExportFormat) -> None:
    """Raise ValueError unless a family can be exported in a format."""
    if form.name not in family.formats:
        raise InputError(
            f"export={form.name!r} does not exist for {family.model_type}, because no "
            f"program would read it; choose from {', '.join(family.formats)}"
        )


def check_constants(config: ModelConfig, form: ExportFormat) -> None:
    """Raise ValueError if a folder has no place for what emptied experts add."""
    if form.constants and not (form.is_ragged or config.moe.expert_bias):
        raise InputError(
            f"export={form.name!r} has no place for constants of emptied experts, which stock "
            "programs know nothing of; export ragged-bf16 or ragged-int4, or plan with "
            "--emptied zero"
        )
