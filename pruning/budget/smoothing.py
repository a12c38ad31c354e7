"""Layer losses as layer weights: compressed, so that no layer takes the whole budget."""

from collections.abc import Callable

import numpy as np

from moe_jax.errors import InputError, choose


def huber_tail(loss: np.ndarray) -> np.ndarray:  # [L] -> [L]
    """Losses above mean + half a deviation grow like a root, those below are left as they are.

    The value is the root of twice the Huber loss: continuous with slope 1 where the two meet.
    """
    delta = loss.mean() + 0.5 * loss.std(ddof=1)
    return np.where(loss <= delta, loss, np.sqrt(delta * np.maximum(2.0 * loss - delta, 0.0)))


def clip_to_spread(loss: np.ndarray, deviations: float) -> np.ndarray:  # [L] -> [L]
    """Clip to mean +- this many sample standard deviations."""
    spread = deviations * loss.std(ddof=1)
    return np.clip(loss, loss.mean() - spread, loss.mean() + spread)


# Every entry is non-decreasing and maps non-negative losses to non-negative ones.
SMOOTHINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sqrt": np.sqrt,
    "identity": lambda loss: loss,
    "power0.25": lambda loss: loss**0.25,
    "power0.75": lambda loss: loss**0.75,
    "log5": lambda loss: np.log1p(5.0 * loss),
    "log20": lambda loss: np.log1p(20.0 * loss),
    "clip": lambda loss: clip_to_spread(loss, 0.5),
    "huber": huber_tail,
}


def smooth_layer_loss(
    loss: np.ndarray,  # [L]
    how: str = "sqrt",
    passes: int = 1,
) -> np.ndarray:  # [L]
    """Compress the spread of the layer losses, so that no layer takes the whole budget.

    One pass applies the function, then clips to mean +- one sample standard deviation.

    Args:
      loss: non-negative loss per layer; its unit matters for the logarithms only.
      how: a name of `SMOOTHINGS`.
      passes: how often; 0 only normalises. The paper's curve is one pass, its release does four.

    Returns:
      Layer weights with mean 1; all ones when the losses do not differ.

    Raises:
      InputError: the name is unknown or passes is negative.

    Source: arXiv 2606.18304, section 4.2.
    """
    if passes < 0:
        raise InputError(f"passes={passes} must be 0 or more; the paper uses 1")
    compress = choose(SMOOTHINGS, how, "smoothing")
    loss = np.asarray(loss, np.float64)
    if loss.size < 2 or np.ptp(loss) == 0.0:
        return np.ones_like(loss)
    for _ in range(passes):
        loss = clip_to_spread(compress(loss), 1.0)
    return loss / loss.mean()
