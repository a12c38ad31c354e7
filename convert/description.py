"""What config.json alone says about a checkpoint."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.export_format import Widths
from convert.families import find_family
from convert.formats.ragged import emptied_model, widths_from_hf
from convert.layout import Spec
from convert.model_card import original_model
from convert.mtp import mtp_tensors
from convert.quantized.config import Quantization, UnreadFormat, read_quantization
from convert.reader import CheckpointError, read_json
from convert.rules import Family, ruled_tensors, uniform_widths
from moe_jax.config import ModelConfig
from moe_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class Description:
    """A checkpoint as far as shapes and names go; its weights need not be there.

    Attributes:
      folder: where it lies.
      hf_config: its config.json.
      config: the architecture.
      family: its rules.
      widths: channels per layer and expert; () for a dense layer.
      mtp: dtypes and shapes of the tensors of layers that predict further tokens, as an export
        keeps them; no part of all of the above.
      quantization: how weights are stored in few bits, None if they are not.
    """

    folder: Path
    hf_config: dict[str, Any]
    config: ModelConfig
    family: Family
    widths: Widths
    mtp: dict[str, Spec]
    quantization: Quantization | None

    def __len__(self) -> int:
        return self.config.num_layers

    def weights(self, widths: Widths | None = None, *, constants: bool = False) -> int:
        """Weights of the model, those of `mtp` not counted.

        Args:
          widths: channels per layer and expert, default its own.
          constants: whether experts without channels have what they add instead.
        """
        config = emptied_model(self.config, constants)
        found = ruled_tensors(self.family, config, widths or self.widths)
        return sum(math.prod(shape) for _, shape, _ in found)

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
        family = find_family(hf.get("model_type"))
        quantization = read_quantization(hf, interleaved=family.interleaved)
        config = family.config_from_hf(hf)
        widths = widths_from_hf(hf, config) if family.ragged else uniform_widths(config)
    except UnreadFormat as error:
        original = original_model(folder) or "that it was made from"
        cure = f"give the 16-bit model {original}"
        raise CheckpointError(folder, [f"config.json: {error}; {cure}"]) from error
    except InputError as error:
        raise CheckpointError(folder, [f"config.json: {error}"]) from error
    mtp = mtp_tensors(family, hf, config)
    return Description(folder, hf, config, family, widths, mtp, quantization)
