"""MXFP4 weights as gpt-oss stores them: 32 four-bit floats to a power of two."""

from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.errors import InputError
from moe_jax.mxfp4 import BLOCK, MAGNITUDES, block_codes

_VALUES = np.array([*MAGNITUDES, *(-value for value in MAGNITUDES)], np.float32)
# A byte holds two codes, the first in its low half.
_PAIRS = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=-1)
BIAS = 127  # of the stored exponents


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weight that codes stand for, exactly.

    Args:
      blocks: uint8 [rows, groups, 16].
      scales: uint8 [rows, groups], exponent of two plus 127.

    Returns:
      bfloat16 [rows, 32 groups], which holds every such value; not finite where a scale is 255,
      the format's NaN.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        power = np.ldexp(np.float32(1), scales.astype(np.int32) - BIAS)
        values = _PAIRS[blocks].reshape(*scales.shape, BLOCK) * power[..., None]
        return values.astype(ml_dtypes.bfloat16).reshape(len(blocks), -1)


def pack(weight: np.ndarray) -> dict[str, np.ndarray]:
    """Round a weight [rows, columns] to its nearest codes; one made of such stays as it is.

    Returns:
      weight_blocks uint8 [rows, columns / 32, 16] and weight_scales uint8 [rows, columns / 32].
    """
    codes, exponent = (np.asarray(part) for part in block_codes(weight, axis=1))
    return {
        "weight_blocks": codes[..., 0::2] | (codes[..., 1::2] << 4),
        "weight_scales": (exponent + BIAS).astype(np.uint8),
    }


def packed_specs(rows: int, columns: int) -> dict[str, tuple[np.dtype, tuple]]:
    """Dtype and shape of the two tensors that stand for a weight [rows, columns]."""
    byte, groups = np.dtype(np.uint8), columns // BLOCK
    return {"weight_blocks": (byte, (rows, groups, 16)), "weight_scales": (byte, (rows, groups))}


def check_widths(widths: list[int], d_model: int) -> None:
    """Refuse sizes that would leave a block incomplete.

    Raises:
      InputError: naming the first such size.
    """
    wrong = [width for width in sorted(set(widths)) if width % BLOCK]
    if d_model % BLOCK:
        raise InputError(f"MXFP4 has blocks of {BLOCK}, which do not divide the model width "
                         f"{d_model}; export padded-bf16")  # fmt: skip
    if wrong:
        raise InputError(
            f"MXFP4 has blocks of {BLOCK}, which do not divide the expert width {wrong[0]}; plan "
            "with --block 32, or export padded-bf16"
        )


def quantization_config() -> dict[str, Any]:
    """The `quantization_config` of config.json: all but the experts stays 16-bit."""
    dense = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens")
    return {"quant_method": "mxfp4", "modules_to_not_convert": [*dense, "lm_head"]}
