"""The plan stage: plans of a recipe, and sizes as budgets."""

import functools
from pathlib import Path

from convert.description import Description
from convert.export import Export
from moe_jax.errors import InputError
from pruning.budget.decide import plan_pruning
from pruning.budget.plan import PruningPlan
from pruning.budget.several_budgets import nested_plans, plan_for_target
from pruning.recipe.options import PlanOptions, part_of
from pruning.recipe.recipe import ResolvedRecipe
from pruning.scores.statistics import ChannelStatistics
from pruning.stages.sizes import expert_widths, form_of
from pruning.text.source import without_folders

# Options of a recipe that decide what is scored, and how.
SCORING = (
    "calibration_field", "max_tokens", "window", "dtype", "until_stable", "weights_only",
    "gradients", "expert_details", "weight_gradients", "obs",
    "nll_ig", "nll_ablate", "nll_grad2",
)  # fmt: skip
TEXT_FACTS = ("sha256", "weight", "documents", "tokens")
TEXT_CHOICES = ("options", "first", "loss_on")  # where a text is not read in the usual way


def plan(
    recipe: ResolvedRecipe,
    statistics: ChannelStatistics,
    provenance: dict,
    base: Description,
) -> PruningPlan:
    """Allocate the budget of a resolved recipe: a prune rate, or a target of bytes or parameters.

    Raises:
      InputError: an option is infeasible; for a target the message has the nearest feasible size.
    """
    notes = recorded_notes(recipe, statistics, provenance)
    made = functools.partial(
        plan_pruning,
        statistics,
        part_of(recipe, PlanOptions),
        experts_per_token=routed_experts(recipe, base),
        layer_indices=base.config.moe_layers,
        notes=notes,
    )
    if recipe.prune_rate is not None:
        return _cut(made(), recipe)
    fewest, most, step = budget_range(recipe, base)
    unit = "bytes" if recipe.target_bytes is not None else "parameters"
    target = recipe.target_bytes or recipe.target_parameters
    assert target is not None
    found = plan_for_target(
        lambda channels: made(channels=channels),
        _bytes(recipe, base) if unit == "bytes" else _parameters(base),
        target,
        channels=most,
        fewest=fewest,
        step=step,
        unit=unit,
    )
    return _cut(found, recipe)


def routed_experts(recipe: ResolvedRecipe, base: Description) -> int:
    """To how many experts a token goes under the plans of a recipe.

    Raises:
      InputError: more than in the model, or a router is to be cut of experts that stay.
    """
    most = base.config.moe.experts_per_token
    if recipe.top_k is not None and recipe.top_k > most:
        raise InputError(
            f"top_k={recipe.top_k} must lie in [1, {most}], to how many experts a token of this "
            "model goes"
        )
    if recipe.cut_router and recipe.width not in ("experts", "combined"):
        raise InputError(
            f"cut_router removes the router's rows of emptied experts, and width={recipe.width!r} "
            "does not remove whole experts; choose --width experts or combined"
        )
    return recipe.top_k or most


def _cut(plan: PruningPlan, recipe: ResolvedRecipe) -> PruningPlan:
    return plan.with_cut_router(recipe.top_k) if recipe.cut_router else plan


def plans_of_rates(
    recipe: ResolvedRecipe,
    rates: list[float],
    statistics: ChannelStatistics,
    provenance: dict,
    base: Description,
) -> list[PruningPlan]:
    """One plan per prune rate, each within the next larger one; the recipe's own rate is unused."""
    plans = nested_plans(
        statistics,
        rates,
        part_of(recipe, PlanOptions),
        experts_per_token=routed_experts(recipe, base),
        layer_indices=base.config.moe_layers,
        notes=recorded_notes(recipe, statistics, provenance),
    )
    return [_cut(plan, recipe) for plan in plans]


def recorded_notes(recipe: ResolvedRecipe, statistics: ChannelStatistics, provenance: dict) -> dict:
    """What a plan records about the model and the text behind it.

    Texts go by their file names and hashes: a plan travels, and their folders mean nothing there.
    """
    texts = [
        {
            "text": Path(s["path"]).name,
            **{key: s[key] for key in TEXT_FACTS},
            **{key: s[key] for key in TEXT_CHOICES if key in s},
        }
        for s in provenance.get("sources", ())
    ]
    return {
        "model_hash": provenance["model_hash"],
        "tokens": int(statistics.total_tokens),
        "sources": texts,
        "evaluation": list(map(without_folders, recipe.evaluation)),
        "repair": recipe.repair,
        "scoring": {name: getattr(recipe, name) for name in SCORING},
    }


def _bytes(recipe: ResolvedRecipe, base: Description):
    form = form_of(recipe, recipe.export[0])
    layers = base.config.moe_layers
    return lambda counts: Export(base, expert_widths(counts, layers, base), form).nbytes


def _parameters(base: Description):
    return lambda counts: base.weights(expert_widths(counts, base.config.moe_layers, base))


def budget_range(recipe: ResolvedRecipe, base: Description) -> tuple[int, int, int]:
    """(fewest, most, step) channels that a resolved recipe's width policy and layer rates allow."""
    moe, layers = base.config.moe, base.config.moe_layers
    least = -(-recipe.minimum // recipe.block) * recipe.block
    size = moe.num_experts * moe.d_expert
    even = len(layers) if recipe.cut_router and recipe.per_layer else 1
    steps = {"experts": even * moe.d_expert, "layer": moe.num_experts * recipe.block}
    steps["uniform"] = len(layers) * moe.num_experts * recipe.block
    step = steps.get(recipe.width, recipe.block)
    narrow, opened = least, routed_experts(recipe, base)
    if recipe.width in ("uniform", "layer") or recipe.keep_experts:
        opened = moe.num_experts
    elif recipe.width == "experts":
        narrow = moe.d_expert
    widest = size
    if recipe.width == "capped":
        assert recipe.cap is not None
        widest = moe.num_experts * (recipe.cap - recipe.cap % recipe.block)
    fixed = [round((1.0 - rate) * size) for rate in recipe.layer_rates.values()]
    free = len(layers) - len(fixed)
    most = sum(fixed) + free * widest
    if recipe.width == "combined":
        experts = len(layers) * moe.num_experts
        most = min(most, (experts - round(recipe.expert_rate * experts)) * moe.d_expert)
    return sum(fixed) + free * opened * narrow, most, step
