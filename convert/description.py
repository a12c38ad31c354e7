"""What config.json alone says about a checkpoint."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.export_format import Widths
from convert.families import find_family
from convert.formats.ragged import Emptied, emptied_model, widths_from_hf
from convert.layout import BFLOAT16, FLOAT32, Spec
from convert.matching import hints
from convert.model_card import original_model
from convert.mtp import mtp_tensors
from convert.quantized.config import Quantization, Scheme, UnreadFormat, read_quantization
from convert.reader import CheckpointError, read_json
from convert.rules import Family, ruled_tensors, uniform_widths
from convert.towers import wrapped_family
from moe_jax.config import ModelConfig
from moe_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class Description:
    """A checkpoint as far as shapes and names go; its weights need not be there.

    Attributes:
      folder: where it lies.
      hf_config: its config.json; of a wrapper, the part about the text model.
      config: the architecture.
      family: its rules.
      widths: channels per layer and expert; () for a dense layer.
      mtp: dtypes and shapes of the tensors of layers that predict further tokens, as an export
        keeps them; no part of all of the above.
      quantization: how weights are stored in few bits, None if they are not.
      native: how it stores every routed expert's weights, if an export can take their codes over:
        4-bit integers, symmetric, in groups of 32, 64 or 128, or 8-bit floats in blocks of 128 x
        128. None of any other model.
      plain: linear layers' weights, by name, that files hold in 16 bits though config.json says
        that they are stored like those of experts.
      scale: dtype of the scales of 8-bit floats.
      outer: the whole config.json of a wrapper, else None.
      beside: dtypes and shapes of the tensors of a wrapper that are no part of its text model, by
        their names on disk.
    """

    folder: Path
    hf_config: dict[str, Any]
    config: ModelConfig
    family: Family
    widths: Widths
    mtp: dict[str, Spec]
    quantization: Quantization | None
    native: Scheme | None
    outer: dict[str, Any] | None = None
    beside: Mapping[str, Spec] = field(default_factory=dict)
    plain: frozenset[str] = frozenset()
    scale: np.dtype = FLOAT32

    def __len__(self) -> int:
        return self.config.num_layers

    def is_native(self, name: str) -> bool:
        """Whether a linear layer's weight, by its name on disk, is stored as `native` says."""
        rule = self.family.rule(name)
        if self.native is None or self.quantization is None or rule is None or not rule.is_linear:
            return False
        scheme = self.quantization.scheme(name.removesuffix(".weight"))
        return scheme == self.native and name not in self.plain

    @property
    def has_powers_of_two(self) -> bool:
        """Whether the scales of 8-bit floats are powers of two."""
        said = None if self.quantization is None else self.quantization.options.get("scale_fmt")
        return said == "ue8m0"

    def weights(self, widths: Widths | None = None, emptied: Emptied = "zero") -> int:
        """Weights of the model, those of `mtp` not counted.

        Args:
          widths: channels per layer and expert, default its own.
          emptied: what becomes of experts without channels.
        """
        config = emptied_model(self.config, emptied)
        found = ruled_tensors(self.family, config, widths or self.widths)
        return sum(math.prod(shape) for _, shape, _ in found)

    def untied(self) -> "Description":
        """The same with a head of its own, whatever config.json says."""
        said = {"tie_word_embeddings": False}
        outer = None if self.outer is None else self.outer | said
        config = self.config.replace(tie_embeddings=False)
        return dataclasses.replace(
            self, config=config, hf_config=self.hf_config | said, outer=outer
        )

    @property
    def mtp_weights(self) -> int:
        """Weights of the layers that predict further tokens."""
        return sum(math.prod(shape) for _, shape in self.mtp.values())


def describe(folder: Path | str) -> Description:
    """Read config.json.

    Raises:
      CheckpointError: it is missing, or has an unsupported setting; weights in a format that is
        not read are refused with the name of the model that has them in 16 bits.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(folder, ["is not a folder; pass a downloaded checkpoint"])
    hf = read_json(folder / "config.json")
    try:
        family = wrapped_family(folder, hf)
    except InputError as error:
        raise CheckpointError(folder, [f"config.json: {error}", *hints(folder, hf)]) from None
    try:
        own = family.text_config(hf)
        quantization = read_quantization(own, family)
        config = family.config_from_hf(own)
        widths = widths_from_hf(own, config) if family.ragged else uniform_widths(config)
    except UnreadFormat as error:
        original = original_model(folder) or "that it was made from"
        cure = f"give the 16-bit model {original}"
        raise CheckpointError(folder, [f"config.json: {error}; {cure}"]) from error
    except InputError as error:
        raise CheckpointError(folder, [f"config.json: {error}"]) from error
    mtp, outer = mtp_tensors(family, own, config), hf if family.wrapper else None
    native = None if quantization is None else _native(family, config, quantization)
    return Description(folder, own, config, family, widths, mtp, quantization, native, outer)


def _native(family: Family, config: ModelConfig, quantization: Quantization) -> Scheme | None:
    twin = family if family.twin is None else find_family(family.twin.model_type)
    if twin.rules != family.rules:  # the export has other names
        return None
    schemes = {
        quantization.scheme(name.removesuffix(".weight"))
        for name, _, rule in ruled_tensors(family, config)
        if rule is not None and rule.is_of_expert and rule.is_linear
    }
    scheme = schemes.pop() if len(schemes) == 1 else None
    return scheme if scheme is not None and scheme.is_native(BFLOAT16) else None
