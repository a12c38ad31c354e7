"""8-bit floats in blocks, as DeepSeek-V3 and Qwen publish them: `weight` and `weight_scale_inv`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.errors import InputError
from moe_jax.float8 import BLOCK, CODE

METHOD = "fp8"


def check_widths(widths: Iterable[int]) -> None:
    """Refuse experts whose last block would be incomplete, which servers do not read.

    Raises:
      InputError: naming the first such width.
    """
    wrong = [width for width in sorted(set(widths)) if width % BLOCK]
    if wrong:
        raise InputError(
            f"8-bit floats have blocks of {BLOCK}, which do not divide the expert width "
            f"{wrong[0]}; plan with --block {BLOCK}, or export padded-bf16"
        )


def packed_specs(rows: int, columns: int, scale: np.dtype) -> dict[str, tuple[np.dtype, tuple]]:
    """Dtype and shape of the two tensors that stand for a weight [rows, columns]."""
    table = (-(-rows // BLOCK), -(-columns // BLOCK))
    return {"weight": (CODE, (rows, columns)), "weight_scale_inv": (scale, table)}


def quantization_config(dense: Sequence[str], said: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
      dense: module names of what stays 16-bit.
      said: that of a model whose codes are taken over, which then holds but for further modules
        in 16 bits; None for one of our own.

    Returns:
      The JSON value.
    """
    if said is not None:
        key = next((k for k in ("modules_to_not_convert", "ignored_layers") if said.get(k)), None)
        listed = list(said[key]) if key else []
        more = [name for name in dense if name not in listed]
        return {**said, key or "modules_to_not_convert": [*listed, *more]} if more else dict(said)
    return {
        "quant_method": METHOD,
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": list(dense),
    }
