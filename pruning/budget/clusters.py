"""GRAPE: merge similar experts where the model is most redundant, and read off layer budgets.

Source: Algorithm 1 of arXiv 2604.06542. As printed it can collapse a layer into one cluster and
spend its merges on experts that are already together; each repair of ours is a switch.
"""

import dataclasses
import math

import numpy as np

from moe_jax.errors import InputError
from pruning.kit.errors import BudgetError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrapeRules:
    """How the printed algorithm is repaired.

    Attributes:
      gamma: share of the initial entropy that the cluster counts may lose before layers freeze,
        in [0, 1); 0 keeps the layers nearly even.
      fewest: clusters that every layer keeps; 1 is as printed. A layer needs as many experts as a
        token selects.
      retire_merged: a merged expert takes part in no further merge, so that none is spent on a
        pair that is already together; as printed only the pair itself is struck out.
      follow_redundancy: a layer's redundancy falls with each merge. As printed it is reduced by
        the similarity after that was set to zero, so it never changes.
    """

    gamma: float = 0.05
    fewest: int = 1
    retire_merged: bool = True
    follow_redundancy: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma < 1.0:
            raise InputError(f"gamma={self.gamma} must lie in [0, 1); choose e.g. 0.05")
        if self.fewest < 1:
            raise InputError(f"fewest={self.fewest} must be at least one cluster per layer")


@dataclasses.dataclass(frozen=True, eq=False)
class Clusters:
    """Experts grouped by layer; equal labels are one cluster, named by its lowest expert."""

    labels: np.ndarray  # [L, E]
    wasted_merges: int
    frozen_layers: int

    @property
    def counts(self) -> np.ndarray:  # [L]
        """Clusters per layer."""
        return (self.labels == np.arange(self.labels.shape[1])).sum(axis=1)


def merge_experts(
    similarity: np.ndarray,  # [L, E, E]
    clusters: int,
    rules: GrapeRules = GrapeRules(),
) -> Clusters:
    """Merge the most similar pair of the most redundant layer until so many clusters are left.

    After a merge that takes the entropy of the cluster counts below (1 - gamma) of its start, the
    layer is frozen; when all are, all thaw. A layer at its fewest clusters takes no part.

    Args:
      similarity: symmetric float64, higher is more alike; the diagonal is not read.
      clusters: clusters to leave in the whole model.
      rules: the repairs.

    Returns:
      Exactly `clusters` clusters; ties go to the lower layer and pair.

    Raises:
      InputError: the similarities are not finite or not symmetric, or the layers' fewest clusters
        are already more.
    """
    layers, experts, _ = similarity.shape
    fewest = min(rules.fewest, experts)
    _check(similarity, clusters, layers * fewest)
    upper = np.triu(np.ones((experts, experts), bool), k=1)
    pairs = np.where(upper, similarity, -np.inf)  # the pairs still on offer
    score = np.where(upper, similarity, 0.0).sum(axis=(1, 2)) * 2.0
    labels = np.tile(np.arange(experts), (layers, 1))
    left = np.full(layers, experts)
    frozen = np.zeros(layers, bool)
    wasted = 0
    threshold = (1.0 - rules.gamma) * _entropy(left)
    while left.sum() > clusters:
        open_ = left > fewest
        if (frozen | ~open_).all():
            frozen[:] = False
        layer = int(np.where(open_ & ~frozen, score, -np.inf).argmax())
        one, two = divmod(int(pairs[layer].argmax()), experts)
        struck = _strike(pairs[layer], one, two, whole=rules.retire_merged)
        if rules.follow_redundancy:
            score[layer] -= 2.0 * struck
        kept, gone = sorted((labels[layer, one], labels[layer, two]))
        wasted += kept == gone
        labels[layer][labels[layer] == gone] = kept
        left[layer] -= kept != gone
        frozen[layer] |= _entropy(left) < threshold
    return Clusters(labels, int(wasted), int(frozen.sum()))


def _strike(pairs: np.ndarray, one: int, two: int, *, whole: bool) -> float:
    # Take the pair, or everything with its higher expert, off the offer; the similarity lost.
    if not whole:
        lost = float(pairs[one, two])
        pairs[one, two] = -np.inf
        return lost
    touched = np.concatenate([pairs[two], pairs[:, two]])
    pairs[two], pairs[:, two] = -np.inf, -np.inf
    return float(touched[np.isfinite(touched)].sum())


def _entropy(counts: np.ndarray) -> float:
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def _check(similarity: np.ndarray, clusters: int, fewest: int) -> None:
    if not np.isfinite(similarity).all():
        raise InputError("similarity has entries that are not finite; check the expert outputs")
    if not np.allclose(similarity, similarity.swapaxes(1, 2), rtol=1e-6, atol=1e-9):
        raise InputError("similarity must be symmetric in its last two axes")
    experts = math.prod(similarity.shape[:2])
    if not fewest <= clusters <= experts:
        raise BudgetError(
            f"clusters={clusters} must lie between the layers' fewest, {fewest} in all, and the "
            f"{experts} experts there are; change the prune rate"
        )


def default_fewest(experts: int, experts_per_token: int) -> int:
    """A quarter of the experts, or as many as a token selects if that is more."""
    return min(experts, max(experts_per_token, -(-experts // 4)))


def representatives(clusters: Clusters, value: np.ndarray) -> np.ndarray:  # [L, E] -> [L, E]
    """The one expert of largest value in every cluster, ties to the lower index.

    Returns:
      bool; for `Limits.experts` with width "experts".
    """
    kept = np.zeros(value.shape, bool)
    for layer, row in enumerate(clusters.labels):
        for label in np.unique(row):
            members = np.flatnonzero(row == label)
            kept[layer, members[value[layer, members].argmax()]] = True
    return kept


def layer_prior(clusters: Clusters) -> np.ndarray:  # [L]
    """Weight of each layer from its cluster count, with mean 1.

    For `Limits.layer_shares`, or for `PlannerOptions.layer_weights`, alone or times the smoothed
    loss.
    """
    return clusters.counts / clusters.counts.mean()
