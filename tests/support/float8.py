"""8-bit floats in blocks of 128 x 128, number by number: what codes stand for, and how to round."""

import numpy as np
import torch

SAID = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128]}  # fmt: skip


def blocks(shape):
    """Each block of a weight: (its place in the scales, its rows and columns)."""
    for i in range(-(-shape[0] // 128)):
        for j in range(-(-shape[1] // 128)):
            yield (i, j), (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))


def values(codes: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """float32 values of codes."""
    found = codes.float().numpy().copy()
    for place, part in blocks(found.shape):
        found[part] *= scale.float().numpy()[place]
    return found


def largest(weight: np.ndarray) -> np.ndarray:
    """The largest magnitude of every block."""
    found = np.empty(tuple(-(-size // 128) for size in weight.shape), np.float32)
    for place, part in blocks(weight.shape):
        found[place] = np.abs(weight[part]).max()
    return found


def is_nearest(codes: torch.Tensor, scale: np.ndarray, weight: np.ndarray) -> bool:
    """Whether no other of the 253 finite values is nearer to a weight than its code's."""
    every = np.arange(256, dtype=np.uint8)
    table = torch.from_numpy(every).view(torch.float8_e4m3fn).float().numpy()
    table = np.unique(table[np.isfinite(table)]).astype(np.float64)
    middles = (table[1:] + table[:-1]) / 2
    for place, part in blocks(weight.shape):
        wanted = weight[part].astype(np.float64) / np.float64(scale[place])
        wanted = np.clip(wanted, -448, 448)
        found = codes[part].float().numpy().astype(np.float64)
        at = np.searchsorted(middles, wanted)
        # Quotients in float32 may lie on the other side of a middle by their last bit.
        near = np.abs(found - wanted) <= np.abs(table[at] - wanted) * (1 + 1e-5) + 1e-9
        if not near.all():
            return False
    return True


def published(divisor: float = 300.0, dtype=torch.float32):
    """How a weight is stored, with scales that no rounding would choose: see
    `tests.support.quantized.rewrite`."""

    def make(module: str, shape: torch.Size):
        seed = int.from_bytes(module.encode()[-6:], "little") % (1 << 31) + len(module)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2
        scale = torch.from_numpy(largest(weight.numpy()) / divisor).to(dtype)
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn)
        for place, part in blocks(shape):
            codes[part] = (weight[part] / scale[place].float()).to(torch.float8_e4m3fn)
        exact = torch.from_numpy(values(codes, scale))
        return {"weight": codes, "weight_scale_inv": scale}, exact

    return make
