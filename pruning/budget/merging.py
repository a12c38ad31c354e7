"""Which experts of a layer are merged into one, and how much each counts there.

Baselines that keep all experts' work and lose their differences, beside those that drop experts. Of
each group one expert leads: the others' channels are brought into its order. `MERGES` is open to
rules of a user's own.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from scipy.cluster.hierarchy import linkage

from moe_jax.errors import choose
from pruning.kit.errors import BudgetError
from pruning.scores.likeness import Likeness

Align = Literal["", "weights", "activations"]
# (what a text shows of a layer, tokens of each expert [E], groups) -> leaders [E]
Group = Callable[[Likeness, np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeRule:
    """One way to merge experts.

    Attributes:
      about: what it is and where it comes from, one line.
      counts: (tokens of each expert [L, E], groups in all) -> groups of each layer [L].
      group: which expert leads each one's group; leaders lead themselves.
      weight: how much an expert counts, of (what a text shows, tokens [E]); shares in a group are
        in proportion.
      align: what the order of channels is found by: "" leaves it, "weights" are gate, up and down
        projections, "activations" these and what the channels make of the text.
      behind_merged: a layer is looked at behind the merged ones before it, not behind dense ones.
      cuts_router: tokens are routed among the leaders alone, as if the others' rows of the router
        were gone; otherwise the router stays, and a token's weights for a group add up.
    """

    about: str
    counts: Callable[[np.ndarray, int], np.ndarray]
    group: Group
    weight: Callable[[Likeness, np.ndarray], np.ndarray]
    align: Align = ""
    behind_merged: bool = False
    cuts_router: bool = False


def select_merges(names: Sequence[str]) -> list[str]:
    """Names of `MERGES` for "all", names and patterns, without repeats.

    Raises:
      InputError: a name or pattern that fits none.
    """
    found: dict[str, None] = {}
    for name in names:
        matches = list(MERGES) if name == "all" else fnmatch.filter(MERGES, name)
        if not matches:
            choose({**MERGES, "all": None}, name, "merge")
        found |= dict.fromkeys(matches)
    return list(found)


# --- groups of each layer ---


def evenly(tokens: np.ndarray, groups: int) -> np.ndarray:  # [L, E] -> [L]
    """As many groups in each layer; what is left over goes to the first ones."""
    layers = len(tokens)
    return groups // layers + (np.arange(layers) < groups % layers)


def by_usage(tokens: np.ndarray, groups: int) -> np.ndarray:  # [L, E] -> [L]
    """As many as a layer has of the experts of the model that most tokens go to, at least one.

    Source: M-SMoE, arXiv 2310.01334, whose leaders are the experts used most in the whole model;
    that no layer is left without any is ours.
    """
    most = np.zeros(tokens.shape, bool)
    most[np.arange(len(tokens)), tokens.argmax(axis=1)] = True
    order = np.argsort(-np.where(most, np.inf, tokens), axis=None, kind="stable")
    layer = order[:groups] // tokens.shape[1]
    return np.bincount(layer, minlength=len(tokens))


def check_counts(rule: MergeRule, counts: np.ndarray, experts_per_token: int) -> None:
    """Raise BudgetError where a rule leaves too few groups in a layer."""
    least = experts_per_token if rule.cuts_router else 1
    if (fewest := int(counts.min())) < least:
        raise BudgetError(
            f"a layer would keep {fewest} merged experts, fewer than the {least} that its router "
            "needs; remove less"
        )


# --- groups of one layer ---


def hierarchical(seen: Likeness, tokens: np.ndarray, groups: int) -> np.ndarray:
    """Average linkage of the mean outputs by their Euclidean distance.

    The expert that most tokens go to leads a group.

    Source: HC-SMoE, arXiv 2410.08589; its groups have no leaders.
    """
    experts = len(tokens)
    members = {expert: [expert] for expert in range(experts)}
    if groups < experts:
        joined = linkage(seen.outputs, "average")[: experts - groups, :2].astype(int)
        for number, (one, other) in enumerate(joined.tolist(), experts):
            members[number] = sorted(members.pop(one) + members.pop(other))
    leaders = np.empty(experts, int)
    for group in members.values():
        leaders[group] = group[int(tokens[group].argmax())]
    return leaders


def most_used(seen: Likeness, tokens: np.ndarray, groups: int) -> np.ndarray:
    """The experts that most tokens go to lead; each other joins the one with the likest logits.

    Source: M-SMoE, arXiv 2310.01334.
    """
    lead = _largest(tokens, groups)
    leaders = lead[seen.routing[:, lead].argmax(axis=1)]
    leaders[lead] = lead
    return leaders


def salient(seen: Likeness, tokens: np.ndarray, groups: int) -> np.ndarray:
    """The most salient experts lead; each, the most salient first, takes the likest that are left.

    So that most groups are of one expert, and a few of many. Two are alike by the mean of the
    cosines of their outputs and of their logits.

    Source: REAM, arXiv 2604.04356, whose groups have at most 16 of 128 experts: here an eighth of
    the experts there are, at least 2 and as many as all need (ours).
    """
    experts = len(tokens)
    lead = _largest(seen.saliency, groups)
    size = max(2, experts // 8, -(-experts // groups))
    alike = (seen.cosine + seen.routing) / 2
    leaders = np.full(experts, -1)
    leaders[lead] = lead
    for leader in lead.tolist():
        left = np.flatnonzero(leaders < 0)
        nearest = np.argsort(-alike[leader, left], kind="stable")
        leaders[left[nearest[: size - 1]]] = leader
    return leaders


def _largest(value: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest values, ties to the lower one."""
    return np.argsort(-value, kind="stable")[:count]


def shares(leaders: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """How much each expert counts in its group, [E], summing to one over a group.

    Args:
      leaders: int [E].
      weight: [E], at least 0; experts of a group that weighs nothing count alike.
    """
    total = np.bincount(leaders, weight, len(leaders))[leaders]
    alike = 1.0 / np.bincount(leaders, minlength=len(leaders))[leaders]
    return np.divide(weight, total, out=alike, where=total > 0)


def _usage(seen: Likeness, tokens: np.ndarray) -> np.ndarray:
    return tokens


def _saliency(seen: Likeness, tokens: np.ndarray) -> np.ndarray:
    return seen.saliency


MERGES: dict[str, MergeRule] = {
    "hc-smoe": MergeRule(
        about="experts whose mean outputs are near, averaged by usage, router as it is; "
        "after arXiv 2410.08589",
        counts=evenly, group=hierarchical, weight=_usage,
    ),
    "hc-smoe-aligned": MergeRule(
        about="hc-smoe, channels brought into one order before, ours",
        counts=evenly, group=hierarchical, weight=_usage, align="weights",
    ),
    "m-smoe": MergeRule(
        about="experts join those used most by their logits, aligned, averaged by usage, router "
        "as it is; after arXiv 2310.01334",
        counts=by_usage, group=most_used, weight=_usage, align="weights",
    ),
    "ream": MergeRule(
        about="experts join the most salient by outputs and logits, aligned, averaged by saliency, "
        "router rows cut, layer behind layer; after arXiv 2604.04356",
        counts=evenly, group=salient, weight=_saliency, align="activations",
        behind_merged=True, cuts_router=True,
    ),
}  # fmt: skip
