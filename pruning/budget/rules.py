"""Every rule that a comparison runs: a criterion, an allocation and what may be removed.

A rule is data: the options of a plan and where they come from. What it has to compute beforehand
(clusters, subsets of experts) is one function of the statistics. `RULES` is open to rules of a
user's own.
"""

import fnmatch
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.errors import InputError, choose
from pruning.budget.clusters import (
    Clusters,
    GrapeRules,
    default_fewest,
    layer_prior,
    merge_experts,
    representatives,
)
from pruning.budget.problem import Limits
from pruning.budget.rule import Rule
from pruning.budget.whole_experts import naee
from pruning.recipe.options import PlanOptions, ScoreOptions
from pruning.scores.channel_criteria import CHANNEL_CRITERIA
from pruning.scores.expert_criteria import EXPERT_CRITERIA
from pruning.scores.statistics import GROUPS, ChannelStatistics

# Rules state all they choose: the tool's own default must not change what a name means.
PAPER: dict[str, Any] = {"criterion": "act", "attribution": "ala", "planner": "paper"}
WHOLE = PlanOptions(**PAPER, width="experts")
DETAILS = frozenset({"expert-details"})


def select_rules(names: Sequence[str], seen: Mapping[str, Rule]) -> list[str]:
    """Names of rules for "all", "standard", names and patterns like "fair*", without repeats.

    Raises:
      InputError: a name or pattern that fits no rule.
    """
    found: dict[str, None] = {}
    for name in names:
        if name == "all":
            found |= dict.fromkeys(seen)
        elif name == "standard":
            found |= dict.fromkeys(STANDARD)
        elif name in seen:
            found[name] = None
        else:
            matches = fnmatch.filter(seen, name)
            if not matches:
                choose({**seen, "all": None, "standard": None}, name, "rules")
            found |= dict.fromkeys(matches)
    return list(found)


def switches(names: Sequence[str]) -> list[str]:
    """Options of a recipe that, set to true, collect what these rules need.

    Those that take more than a yes, such as `nll_ig`, and `weights_only`, with which no text is
    read, are left to the recipe.
    """
    kinds = typing.get_type_hints(ScoreOptions)
    asked = {group.replace("-", "_") for name in names for group in RULES[name].needs}
    return sorted(option for option in asked - {"weights_only"} if kinds.get(option) is bool)


def check_needs(names: Sequence[str], collected: frozenset[str]) -> None:
    """Raise InputError unless all that these rules need is collected."""
    for group in GROUPS:
        lacking = [name for name in names if group in RULES[name].needs - collected]
        if lacking:
            raise InputError(
                f"rules {', '.join(lacking)} need statistics that are not collected; add --{group} "
                "or leave them out"
            )


def _channels(about: str, family: str, criterion: str, **options: Any) -> Rule:
    options = {**PAPER, "criterion": criterion, **options}
    return Rule(about=about, family=family, options=PlanOptions(**options))


def _drop(about: str, attribution: str, **options: Any) -> Rule:
    options = {**PAPER, "attribution": attribution, "width": "experts", **options}
    return Rule(about=about, family="whole experts", options=PlanOptions(**options))


def _quota(kept: int, layers: int) -> np.ndarray:  # [L]
    return kept // layers + (np.arange(layers) < kept % layers)


def _naee(statistics: ChannelStatistics, kept: int, experts_per_token: int) -> Limits:
    del experts_per_token
    assert statistics.output_gram is not None
    return Limits(experts=naee(statistics.output_gram, _quota(kept, statistics.shape[0])))


def _clusters(statistics: ChannelStatistics, kept: int, experts_per_token: int) -> Clusters:
    assert statistics.similarity is not None
    fewest = default_fewest(statistics.shape[1], experts_per_token)
    return merge_experts(statistics.similarity, kept, GrapeRules(fewest=fewest))


def _dek(statistics: ChannelStatistics, kept: int, experts_per_token: int) -> Limits:
    """What `_grape` does within a layer, the layers with as many clusters each.

    The paper that has it, arXiv 2407.09590, averages the weights of a cluster; here one expert of
    it stays, as in GRAPE's comparison, so that the two differ in the layers' budgets alone.
    """
    del experts_per_token
    similarity, quotas = statistics["similarity"], _quota(kept, statistics.shape[0]).tolist()
    layers = [merge_experts(one[None], n) for one, n in zip(similarity, quotas, strict=True)]
    value = EXPERT_CRITERIA["ala"](statistics)
    rows = [representatives(one, row[None]) for one, row in zip(layers, value, strict=True)]
    return Limits(experts=np.concatenate(rows))


def _grape(statistics: ChannelStatistics, kept: int, experts_per_token: int) -> Limits:
    clusters = _clusters(statistics, kept, experts_per_token)
    return Limits(experts=representatives(clusters, EXPERT_CRITERIA["ala"](statistics)))


def _grape_prior(statistics: ChannelStatistics, kept: int, experts_per_token: int) -> Limits:
    return Limits(layer_shares=layer_prior(_clusters(statistics, kept, experts_per_token)))


UNIFORM = (
    "act", "weight", "energy", "amp", "shapley", "wanda", "moe_pruner", "saliency", "abs_taylor",
    "fisher", "heapr", "wg", "obs",
)  # fmt: skip
PAIRED = ("act", "energy", "shapley", "fisher", "abs_taylor")
DEGREES = {"fair0.5": "k = 0.5", "fair": "k = 1", "fair2": "k = 2", "linear": "k = 0"}
DROPS = (
    "ala", "self", "usage", "router", "seer", "ean", "reap", "man", "msan", "mone", "aimer",
    "ala_clipped",
)  # fmt: skip


def _allocations() -> dict[str, Rule]:
    rules = {}
    for score in PAIRED:
        about = f"layers, then experts, by max-min coverage of {score}, arXiv 2606.18304"
        rules[f"paper-{score}"] = _channels(about, "paper's rule", score)
    rules["maxmin-act"] = _channels(
        "max-min coverage of act in one level, ours", "one level", "act", planner="maxmin"
    )
    for planner, degree in DEGREES.items():
        for score in PAIRED:
            if score == "shapley" and planner == "linear":
                continue  # the same as topk-shapley: an expert's shares add up to its attribution
            about = f"coverage of {score}, fairness {degree}, weighted by"
            rules[f"{planner}-{score}"] = _channels(
                f"{about} attribution, ours", "one level", score, planner=planner
            )
            # Global top-k if linear; the attribution itself if shapley.
            if planner != "linear" and score != "shapley":
                rules[f"{planner}-{score}-mass"] = _channels(
                    f"{about} the score's own mass, ours", "one level", score, planner=planner,
                    weights="mass",
                )  # fmt: skip
    for score in PAIRED:
        planner = "normalized_topk" if score == "act" else "global_topk"
        rules[f"topk-{score}"] = _channels(
            f"best channels of the model by {score}", "top-k", score, planner=planner
        )
    return rules


RULES: dict[str, Rule] = {
    "random": Rule(
        about="random channels: what every rule must beat",
        family="random",
        options=PlanOptions(**{**PAPER, "criterion": "random", "planner": "random"}),
        seeds=(0, 1, 2),
    ),
    **{
        f"uniform-{score}": _channels(
            f"one width, {CHANNEL_CRITERIA[score].about}", "uniform", score, width="uniform"
        )
        for score in UNIFORM
    },
    **_allocations(),
    "fair-obs": _channels(
        "coverage of obs, fairness k = 1, weighted by attribution, ours", "one level", "obs",
        planner="fair",
    ),
    "topk-heapr": _channels(
        "best channels of the model, repository LLIKKE/HEAPr", "top-k", "heapr",
        planner="global_topk",
    ),
    "layer-topk-energy": _channels(
        "best channels of each layer by energy", "top-k", "energy", planner="layer_topk"
    ),
    "hull-energy": _channels(
        "aligned optimum of linear coverage, ours", "one level", "energy", planner="linear",
        align="hull",
    ),
    "hull-fair-energy": _channels(
        "aligned optimum of fair coverage, ours", "one level", "energy", planner="fair",
        align="hull",
    ),
    "hull-fair-obs": _channels(
        "aligned optimum of fair coverage of obs, ours", "one level", "obs", planner="fair",
        align="hull",
    ),
    **{f"experts-{name}": _drop(f"whole experts by {EXPERT_CRITERIA[name].about}", name)
       for name in DROPS},
    **{f"experts-{name}-layer": _drop(
           f"same number in each layer by {EXPERT_CRITERIA[name].about}", name, per_layer=True)
       for name in DROPS},
    "experts-ala-constant": _drop(
        "experts-ala, removed experts become their mean output, ours", "ala", emptied="mean"
    ),
    "mone": _drop(
        "experts-mone-layer, removed experts become their mean output, arXiv 2507.00390", "mone",
        per_layer=True, emptied="mean",
    ),
    "naee": Rule(
        about="subset of experts with least output error per layer, arXiv 2402.14800",
        family="whole experts",
        options=WHOLE,
        prepare_needs=DETAILS,
        prepare=_naee,
    ),
    "grape": Rule(
        about="one expert per cluster of similar ones, arXiv 2604.06542",
        family="whole experts",
        options=WHOLE,
        prepare_needs=DETAILS,
        prepare=_grape,
    ),
    "dek": Rule(
        about="one expert per cluster, as many in each layer, after arXiv 2407.09590",
        family="whole experts",
        options=WHOLE,
        prepare_needs=DETAILS,
        prepare=_dek,
    ),
    "grape-prior": Rule(
        about="paper-act, layer budgets by the clusters of arXiv 2604.06542",
        family="paper's rule",
        options=PlanOptions(**PAPER),
        prepare_needs=DETAILS,
        prepare=_grape_prior,
    ),
    "cd-moe": _channels(
        "whole layers condensed to always-on experts, after arXiv 2412.00069", "whole experts",
        "act", planner="cd_moe",
    ),
    "moe-i2": _channels(
        "widths in proportion to attribution, after arXiv 2411.01016", "one level", "act",
        planner="moe_i2",
    ),
}  # fmt: skip

# One of each kind, forward sums alone: minutes where `all` takes an hour.
STANDARD = (
    "random", "uniform-act", "uniform-weight", "uniform-energy", "uniform-shapley", "paper-act",
    "paper-energy", "paper-shapley", "maxmin-act", "fair-act", "fair-energy", "fair-energy-mass",
    "fair-shapley", "fair0.5-energy", "topk-act", "topk-energy", "layer-topk-energy",
    "hull-fair-energy", "moe-i2", "experts-ala", "experts-usage", "experts-reap",
)  # fmt: skip
