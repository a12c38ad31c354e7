"""Frequencies of rotary position embedding and of its context extensions."""

import math

import numpy as np

from moe_jax.config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int, max_position: int, length: int):
    """Inverse frequencies and the attention scale of a rotary embedding.

    Args:
      rope: base and context extension.
      head_dim: width of which `rope.fraction` rotates.
      max_position: context length of the checkpoint's config.
      length: positions in use; only "dynamic" and "longrope" depend on it.

    Returns:
      (float32 numpy [rotated / 2], float scale of cos and sin).

    Source: arXiv:2104.09864; arXiv:2309.00071 (yarn); arXiv:2402.13753 (longrope).
    """
    dim = int(head_dim * rope.fraction)
    exponent = np.arange(0, dim, 2, dtype=np.float32) / dim
    base = np.float32(1.0) / np.float32(rope.theta) ** exponent
    match rope.kind:
        case "default":
            return base, 1.0
        case "linear":
            return base / rope.factor, 1.0
        case "dynamic":
            longest = max(length, max_position)
            grown = rope.factor * longest / max_position - (rope.factor - 1)
            return 1.0 / (rope.theta * grown ** (dim / (dim - 2))) ** exponent, 1.0
        case "yarn":
            return _yarn(rope, base, dim, max_position)
        case "llama3":
            return _llama3(rope, base, max_position), 1.0
        case "longrope":
            return _longrope(rope, exponent, max_position, length)


def _yarn(rope: RopeConfig, base: np.ndarray, dim: int, max_position: int):
    original = rope.original_max_position or max_position

    def pair_with(rotations: float) -> float:  # the pair that turns so often over the context
        turns = original / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    slow = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return base / rope.factor * slow + base * (1 - slow), _attention_factor(rope)


def _attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    if rope.mscale and rope.mscale_all_dim:
        return yarn_scale(rope.factor, rope.mscale) / yarn_scale(rope.factor, rope.mscale_all_dim)
    return yarn_scale(rope.factor, 1.0)


def yarn_scale(factor: float, weight: float) -> float:
    """Growth of attention scores for a context `factor` times longer, times its `weight`.

    Source: YaRN, arXiv:2309.00071, section 3.4.
    """
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(rope: RopeConfig, base: np.ndarray, max_position: int) -> np.ndarray:
    original = rope.original_max_position or max_position
    wavelength = 2 * np.pi / base
    smooth = (original / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * base / rope.factor + smooth * base
    slow = np.where(wavelength > original / rope.low_freq_factor, base / rope.factor, blended)
    return np.where(wavelength < original / rope.high_freq_factor, base, slow).astype(np.float32)


def _longrope(rope: RopeConfig, exponent: np.ndarray, max_position: int, length: int):
    original = rope.original_max_position or max_position
    stretch = rope.long_factor if length > original else rope.short_factor
    scale = rope.attention_factor
    if scale is None:
        log_factor = math.log(max(rope.factor, 1.0))
        scale = math.sqrt(1 + log_factor / math.log(original))
    return 1.0 / (np.asarray(stretch, np.float32) * rope.theta**exponent), scale
