"""The plan of a recipe; planner auto takes the rule that loses least on text kept out."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint
from moe_jax.errors import InputError
from pruning.budget.candidates import CANDIDATES, candidate, candidate_name
from pruning.budget.plan import PruningPlan
from pruning.kit.fitting import fits
from pruning.kit.progress import Steps
from pruning.measure.choice import take
from pruning.recipe.plan_options import AUTO, RULE
from pruning.recipe.recipe import ResolvedRecipe
from pruning.scores.statistics import ChannelStatistics
from pruning.stages import plan as planning
from pruning.stages.job import Job
from pruning.stages.rule_losses import Measured, is_repaired, measured_losses
from pruning.text.kept_out import FEWEST

ASKED = ("planner", "width", "prune_rate")  # what a choice says of its recipe beside the rule

Planned = tuple[ResolvedRecipe, PruningPlan]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The plans of all rules under one recipe, by name, and why others have none."""

    plans: dict[str, Planned]
    refused: dict[str, str]


def job_plan(
    job: Job, statistics: ChannelStatistics, provenance: dict, steps: Steps
) -> tuple[Job, PruningPlan]:
    """The plan of a job, and the job with the rule that it was made by."""
    recipe = measurable(job.recipe, provenance, steps)
    if recipe.planner != AUTO:
        with steps.bar("plan"):
            plan = planning.plan(recipe, statistics, provenance, job.base.about)
    else:
        ((recipe, plan),) = choose([recipe], statistics, provenance, job.base, lambda: job, steps)
    return dataclasses.replace(job, recipe=recipe), plan


def measurable(recipe: ResolvedRecipe, provenance: dict, steps: Steps) -> ResolvedRecipe:
    """The recipe, or that with the usual rule if planner auto has nothing to measure rules on."""
    note = provenance.get("kept_out")
    if note is not None and not (fits(note, dict[str, Any]) and "windows" in note):
        raise InputError(f"kept_out={note!r} in {recipe.output}/statistics.json; score again")
    if recipe.planner != AUTO or note is not None:
        return recipe
    usual = recipe.fixed()
    steps.say(
        "no window of calibration text was kept out of the statistics, so no rule can be measured "
        f"and the usual one decides: {_words(usual, recipe)}; to measure rules, score {FEWEST} "
        f"windows or more with --planner {AUTO}"
    )
    return usual


def choose(
    recipes: Sequence[ResolvedRecipe],
    statistics: ChannelStatistics,
    provenance: dict,
    base: Checkpoint,
    opened: Callable[[], Job],
    steps: Steps,
) -> list[Planned]:
    """Plan by every rule of `CANDIDATES`, measure all plans, and take the best.

    What was measured is remembered in choice.json of the output folder by what the plans keep, so
    that nothing is measured twice.

    Args:
      recipes: resolved ones with planner auto, of one folder, each with a budget of its own.
      statistics, provenance: of scoring, which kept windows out: see `measurable`.
      base: the dense model.
      opened: opens the texts, where something is left to measure.
      steps: where progress goes.

    Returns:
      For each recipe the same with the rule that is taken, and its plan, whose provenance has the
      table of all rules as `choice`.

    Raises:
      InputError: no rule has a plan, or the windows are not those that were kept out.
    """
    with steps.bar("plan by every rule") as on_step:
        tables = []
        for number, recipe in enumerate(recipes, 1):
            tables.append(_candidates(recipe, statistics, provenance, base))
            on_step(number, len(recipes))
    plans = [plan for table in tables for _, plan in table.plans.values()]
    measured = measured_losses(plans, recipes[0], statistics, provenance, base, opened, steps)
    pairs = zip(tables, recipes, strict=True)
    found = [_taken(table, measured, provenance, recipe) for table, recipe in pairs]
    for asked, (recipe, plan) in zip(recipes, found, strict=True):
        taken = taken_candidate(plan)
        of = f"prune rate {asked.prune_rate}: " if len(recipes) > 1 else ""
        steps.say(
            f"{of}rule {taken['rule']} is taken, {taken['mean']:+.4f} nats per token on text kept "
            f"out{' once repaired' if is_repaired(asked) else ''}: {_words(recipe, asked)}"
        )
    return found


def taken_candidate(plan: PruningPlan) -> dict[str, Any]:
    """What the table of all rules says of the one that a chosen plan is of."""
    return next(one for one in plan.provenance["choice"]["candidates"] if one["taken"])


def _words(recipe: ResolvedRecipe, asked: ResolvedRecipe) -> str:
    """A rule as options, which beside those asked for give the same rule without measuring."""
    names = ["criterion", "attribution", "planner"]
    names += [
        name for name in (*RULE, "width")
        if name not in names and getattr(recipe, name) != getattr(asked, name)
    ]  # fmt: skip
    said = ((f"--{name.replace('_', '-')}", getattr(recipe, name)) for name in names)
    return " ".join(flag if value is True else f"{flag} {value}" for flag, value in said)


def _candidates(
    recipe: ResolvedRecipe, statistics: ChannelStatistics, provenance: dict, base: Checkpoint
) -> Candidates:
    found, refused, seen = {}, {}, {}
    for name, rule in CANDIDATES.items():
        shown = candidate_name(name, rule, recipe)
        try:
            one = candidate(rule, recipe, frozenset(statistics.groups))
            plan = planning.plan(one, statistics, provenance, base.about)
        except InputError as error:
            refused[shown] = str(error)
            continue
        if (same := seen.setdefault(plan.content_hash, shown)) != shown:
            refused[shown] = f"it keeps the channels of {same}"
            continue
        found[shown] = one, plan
    if not found:
        raise InputError(next(iter(refused.values())))
    return Candidates(found, refused)


def _taken(
    table: Candidates, measured: Measured, provenance: dict, asked: ResolvedRecipe
) -> Planned:
    """The best of the candidates; its plan says how all of them fared."""
    losses = {
        name: np.asarray(measured.plans[plan.content_hash])
        for name, (_, plan) in table.plans.items()
    }
    dense, tokens, files = map(np.asarray, (measured.dense, measured.tokens, measured.files))
    name, tied = take(losses, dense, tokens, files)
    recipe, plan = table.plans[name]
    rows = _text_rows(provenance, tokens, files)
    candidates = [
        {
            "rule": one,
            "mean": float((loss - dense).sum() / tokens.sum()),
            "added": {t: float((loss - dense)[r].sum() / tokens[r].sum()) for t, r in rows.items()},
            "kept": int(table.plans[one][1].counts.sum()),
            "tied": one in tied,
            "taken": one == name,
        }
        for one, loss in losses.items()
    ]
    choice = {
        "candidates": sorted(candidates, key=lambda one: one["mean"]),
        "refused": [{"rule": one, "reason": reason} for one, reason in table.refused.items()],
        "repaired": is_repaired(asked),
        "asked": {one: getattr(asked, one) for one in (*ASKED, *asked.named)},
        "kept_out": {**provenance["kept_out"], "predictions": int(tokens.sum())},
        "dense": {text: float(dense[r].sum() / tokens[r].sum()) for text, r in rows.items()},
    }
    said = {**plan.provenance, "choice": choice}
    return recipe, dataclasses.replace(plan, provenance=said)


def _text_rows(
    provenance: dict, tokens: np.ndarray, files: np.ndarray
) -> dict[str, np.ndarray]:  # bool [B] each
    """Which windows are of which text, by names that differ; texts without a prediction are out."""
    found: dict[str, np.ndarray] = {}
    paths = [Path(source["path"]) for source in provenance.get("sources", ())]
    for number in np.unique(files[tokens > 0]):
        path = paths[number] if number < len(paths) else Path("text")
        names = (path.stem, path.name, f"{path.name} ({number + 1})")
        name = next(name for name in names if name not in found)
        found[name] = files == number
    return found
