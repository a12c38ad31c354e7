"""Least squares of one expert: the channels that it keeps take over what is missing without others.

With h the hidden row of a token times its routing weight, K the kept channels and y what the output
lacks, W_K moves by (sum h_K h_K^T + s m I)^-1 sum h_K y^T, m the mean of the diagonal: the pull is
toward the weights as they are. How strong it is, two halves of the text say: each is fitted, and
the other one measures.
"""

from dataclasses import dataclass

import numpy as np

STRENGTHS = (0.0, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
NONE = float("inf")  # the strength under which nothing moves
RESOLUTION = 1e-6  # of the largest eigenvalue: sums in float32 know nothing of smaller ones


@dataclass(frozen=True)
class Missing:
    """What a part of the text says of an output that an expert's channels are to make up for.

    Attributes:
      cross: float64 [K, D], sum of h y^T over the tokens of the expert.
      square: sum of |y|^2, at least 0.
    """

    cross: np.ndarray
    square: float

    def __add__(self, other: "Missing") -> "Missing":
        return Missing(self.cross + other.cross, self.square + other.square)


class Ridge:
    """Ridge regression of an expert; one eigendecomposition of each Gram serves all strengths.

    Args:
      gram: float64 [K, K], sum of h h^T, positive semi-definite.
      channels: how many of the K, the first ones, are channels; behind them may stand the constant
        of a bias, which is not weighed in m unless it is alone.
    """

    def __init__(self, gram: np.ndarray, channels: int):
        self._values, self._vectors = np.linalg.eigh(gram)
        diagonal = np.diagonal(gram)
        self._mean = diagonal[: channels or None].mean()
        self._known = self._values > RESOLUTION * self._values[-1]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, but for some per channel."""
        return self._vectors.nbytes

    def change(self, cross: np.ndarray, strength: float) -> np.ndarray:
        """What the weights move by, float64 [K, D], for sums h y^T [K, D]."""
        shrunk = self._shrunk(strength)[:, None]
        return self._vectors @ (shrunk * (self._vectors.T @ cross))

    def turned(self, gram: np.ndarray) -> np.ndarray:
        """The Gram [K, K] of other tokens in the axes of this one, as `errors` takes it."""
        return self._vectors.T @ gram @ self._vectors

    def errors(self, cross: np.ndarray, turned: np.ndarray, missing: Missing) -> np.ndarray:
        """Squared errors on other tokens after a fit on `cross` with each of `STRENGTHS`.

        Args:
          cross: float64 [K, D] of the tokens that the Gram is of.
          turned: float64 [K, K], `turned` of the other tokens' Gram.
          missing: of the other tokens.
        """
        own, theirs = self._vectors.T @ cross, self._vectors.T @ missing.cross
        gained = np.einsum("kd,kd->k", own, theirs)
        shrunk = np.stack([self._shrunk(strength) for strength in STRENGTHS])  # [S, K]
        spent = ((shrunk @ (turned * (own @ own.T))) * shrunk).sum(axis=1)
        return missing.square - 2 * shrunk @ gained + spent

    def _shrunk(self, strength: float) -> np.ndarray:
        """Inverse eigenvalues [K] under a pull; 0 where the text does not reach."""
        pulled = self._values + strength * self._mean
        return np.divide(1.0, pulled, out=np.zeros_like(pulled), where=self._known)


class HalvedRidge:
    """`Ridge` on a text in two halves, with the strength that does best on what it did not see.

    Args:
      grams: float64 [K, K] of each half.
      channels: as of `Ridge`.
    """

    def __init__(self, grams: tuple[np.ndarray, np.ndarray], channels: int):
        first, second = self._halves = [Ridge(gram, channels) for gram in grams]
        self._turned = first.turned(grams[1]), second.turned(grams[0])
        self._whole = Ridge(grams[0] + grams[1], channels)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, but for some per channel."""
        grams = sum(turned.nbytes for turned in self._turned)
        return grams + sum(ridge.nbytes for ridge in (*self._halves, self._whole))

    def fit(self, missing: tuple[Missing, Missing]) -> tuple[np.ndarray | None, float]:
        """The best change on both halves.

        Args:
          missing: of each half.

        Returns:
          (float64 [K, D], its strength); (None, `NONE`) if the output lacks nothing, or no strength
          brings the halves nearer to what they lack than no change does.
        """
        if not all(half.square > 0 for half in missing):
            return None, NONE
        found = np.zeros(len(STRENGTHS))
        for i, other in ((0, 1), (1, 0)):
            errors = self._halves[i].errors(missing[i].cross, self._turned[i], missing[other])
            found += errors / missing[other].square
        best = int(np.argmin(found))
        if not found[best] < 2:
            return None, NONE
        both = missing[0] + missing[1]
        return self._whole.change(both.cross, STRENGTHS[best]), STRENGTHS[best]
