"""How alike the experts of a layer are, from what they make of the same tokens."""

import numpy as np

TINY = 1e-30


def linear_cka(outputs: np.ndarray) -> np.ndarray:  # [E, T, D] -> [E, E]
    """Linear centred kernel alignment between all experts' outputs on the same tokens, in [0, 1].

    An expert whose output does not vary is similar to none, itself included.

    Source: arXiv 1905.00414.
    """
    centred = outputs - outputs.mean(axis=1, keepdims=True)
    norm = np.sqrt(np.square(centred).sum(axis=(1, 2)))[:, None, None]
    centred = np.divide(centred, norm, out=np.zeros_like(centred), where=norm > 0.0)
    # |X^T Y|^2 = <X X^T, Y Y^T>: one product per expert, and one of all pairs.
    count, tokens, _ = centred.shape
    kernels = np.empty((count, tokens, tokens), centred.dtype)
    for one, kernel in zip(centred, kernels, strict=True):
        np.matmul(one, one.T, out=kernel)
    flat = kernels.reshape(count, -1)
    pairs = flat @ flat.T
    own = np.sqrt(np.diagonal(pairs))
    return pairs / np.maximum(np.outer(own, own), TINY)
