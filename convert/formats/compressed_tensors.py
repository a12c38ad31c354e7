"""Symmetric weights of 4 and 8 bits in the compressed-tensors `pack-quantized` layout, in numpy."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from convert.export_format import GROUP_SIZES
from moe_jax.errors import InputError

# transformers 5 gives dequantised fused experts the dtype of their scales, so it is the model's.
SCALE = np.dtype(ml_dtypes.bfloat16)


def check_group_size(group_size: int, widths: Iterable[int]) -> None:
    """Refuse widths that would leave a group of weights incomplete.

    Raises:
      InputError: naming the first such width and the group sizes that divide all.
    """
    widths = sorted(set(widths))
    wrong = [width for width in widths if width % group_size]
    if wrong:
        fits = [g for g in GROUP_SIZES if not any(width % g for width in widths)]
        cure = (
            f"use group size {fits[0]}"
            if fits
            else "export 16 bits (or plan with --block 32 if it is a pruned expert's)"
        )
        raise InputError(f"group_size={group_size} does not divide width {wrong[0]}; {cure}")


def packed_specs(
    rows: int, columns: int, group_size: int, bits: int
) -> dict[str, tuple[np.dtype, tuple]]:
    """Dtype and shape of the three tensors that stand for a weight [rows, columns]."""
    return {
        "weight_packed": (np.dtype(np.int32), (rows, -(-columns * bits // 32))),
        "weight_scale": (SCALE, (rows, columns // group_size)),
        "weight_shape": (np.dtype(np.int64), (2,)),
    }


def pack_codes(codes: np.ndarray, scale: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """Lay out a weight that is already in few bits.

    Args:
      codes: int8 [out, in], -8..7 or -128..127.
      scale: [out, in / g], representable in bfloat16.
      bits: 4 or 8.

    Returns:
      weight_packed int32 [out, ceil(in / 8)], element i of a word in bits 4i to 4i + 3 as code + 8,
      or [out, ceil(in / 4)], in bits 8i to 8i + 7 as code + 128; weight_scale bfloat16
      [out, in / g]; weight_shape int64 [2].
    """
    return {
        "weight_packed": _pack(codes, bits),
        "weight_scale": scale.astype(SCALE),
        "weight_shape": np.array(codes.shape, np.int64),
    }


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:  # int8 [rows, columns] -> int32 [rows, any]
    half = 1 << (bits - 1)
    raised = (codes.astype(np.int16) + half).astype(np.uint8)
    raised = np.pad(raised, ((0, 0), (0, -codes.shape[1] % (32 // bits))), constant_values=half)
    if bits == 4:
        raised = raised[:, 0::2] | (raised[:, 1::2] << 4)  # little endian: byte 0 is the lowest
    return np.ascontiguousarray(raised).view("<i4")


def quantization_config(
    dense: Sequence[str], group_size: int, targets: Mapping[int, str]
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
      dense: exact module names of all linear layers that stay 16-bit; a missing one would load as
        garbage.
      group_size: weights per scale.
      targets: bits of a weight -> the class of modules that have so many, or a pattern "re:..." of
        their names.

    Returns:
      The JSON value.
    """
    # A bare `AutoModel` names its modules without the "model." in front.
    ignore = {*dense, *(name.removeprefix("model.") for name in dense)}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": [target],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": group_size,
                    "dynamic": False,
                    "actorder": None,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for number, (bits, target) in enumerate(targets.items())
        },
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
    }
