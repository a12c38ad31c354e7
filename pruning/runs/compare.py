"""Every rule at equal kept channels on held-out text, one sweep of the model per group of rules."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from moe_jax.errors import InputError
from moe_jax.spread import Spread
from pruning.budget.plan import PruningPlan
from pruning.budget.rule import common_budget
from pruning.budget.rules import RULES, check_needs, select_rules, switches
from pruning.kit.errors import BudgetError
from pruning.kit.progress import Steps
from pruning.measure.quality import Reference
from pruning.recipe.options import COMPARED_TOKENS
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.recipe import CompressionRecipe
from pruning.recipe.values import check_rate
from pruning.report import comparison_page
from pruning.report.compared import Repaired, Result
from pruning.report.comparison import Comparison
from pruning.runs.cap import refuse_limit
from pruning.runs.compared import (
    Task,
    joined,
    repaired_hidden,
    require_windows,
    task_plan,
    task_result,
)
from pruning.runs.places import working
from pruning.runs.score import scored
from pruning.scores.statistics import ChannelStatistics
from pruning.shrink.masked import masked_hidden
from pruning.shrink.repair_model import Mode
from pruning.stages import preflight
from pruning.stages.job import Job, open_job
from pruning.stages.measure import first_tokens, measure
from pruning.stages.model_record import identify
from pruning.stages.plan import TEXT_CHOICES
from pruning.text.held_out import seen_shares
from pruning.text.windows import Windows, text_hashes

STATE_BYTES = 1 << 30  # hidden states of a group of plans on the host
GROUP = 16  # plans per group at most: results are saved after each


def compare(
    recipe: CompressionRecipe,
    rates: Sequence[float] = (0.25, 0.5),
    rules: Sequence[str] = ("standard",),
    *,
    repair: Mode | None = None,
    steps: Steps | None = None,
    where: PlaceOptions | None = None,
) -> Comparison:
    """Plan and measure every rule at every rate.

    An interrupted comparison is repeated with the same recipe and goes on after its last group;
    more rates, and rules that need no further statistics, add to what is in the folder, which
    `overwrite` begins anew.

    Args:
      recipe: model, texts, block and output; its planner options are not read. Of each text its
        `evaluation_tokens` are scored, rounded up to whole windows.
      rates: prune rates, each rounded to a budget that all rules can keep exactly.
      rules: names of `RULES`, patterns, "standard" or "all".
      repair: measure every plan repaired in this way as well; each takes a repair of the model on
        all of the calibration text.
      steps: where progress goes; default stderr, of process 0.
      where: devices and processes: windows are dealt to all while scoring, groups of plans to
        processes; as of `score`.

    Returns:
      The comparison, in every process, which is also in the output folder.

    Raises:
      InputError: bad input, before any expensive work, or another process writes there.
      FullDiskError: the disk is full; what is finished stays.
      LostProcess: another process has ended; what is finished stays.
    """
    with working(recipe.output, where, steps) as (spread, steps):
        return _compare(recipe, rates, rules, repair, steps, spread)


def _compare(
    recipe: CompressionRecipe,
    rates: Sequence[float],
    rules: Sequence[str],
    repair: Mode | None,
    steps: Steps,
    spread: Spread,
) -> Comparison:
    refuse_limit(recipe, "compare")
    if repair is not None and spread.processes > 1:
        raise InputError(
            f"repair={repair!r} repairs one model after the other in one process; leave out "
            "--repair or --coordinator"
        )
    names = select_rules(rules, RULES)
    if "all" in rules:
        recipe = dataclasses.replace(recipe, **dict.fromkeys(switches(names), True))
        steps.say("all rules need gradients, expert details and weight gradients: scoring takes "
                  "several times as long as for the standard rules, once")  # fmt: skip
    check_needs(names, recipe.groups)
    with steps.bar("open"):
        # 16-bit weights are compared: no group of 4-bit weights restricts the widths.
        job = _open(dataclasses.replace(recipe, bits=16, export=(), planner=recipe.used_planner,
                                        repair="none"))  # fmt: skip
        job = dataclasses.replace(job, spread=spread)
    if spread.leads:
        identify(job.base, job.output, steps)
    texts = job.evaluation
    if not texts:
        raise InputError("there is no text to evaluate on; name one with --evaluation")
    if repair is not None:
        require_windows(job)
    budgets = _budgets(job, rates)
    earlier = _earlier(job, texts) if spread.leads else None
    statistics, provenance = scored(
        job, steps,
        lambda: preflight.prepare(job, steps, exports=False, last=comparison_page.PAGE),
        {"rules": list(names), "rates": list(budgets), "evaluation": text_hashes(texts)},
    )  # fmt: skip
    found = earlier or Comparison(key=_key(job, texts), dense={}, results=(), refused=())
    repairs: tuple[Repaired, ...] = ("",) if repair is None else ("", repair)
    tasks = [
        Task(name, rate, seed, how)
        for how in repairs
        for rate in budgets for name in names for seed in RULES[name].seeds
    ]  # fmt: skip
    done = {Task(r.rule, r.rate, r.seed, r.repair) for r in (*found.results, *found.refused)}
    left = spread.led(lambda: [number for number, one in enumerate(tasks) if one not in done])
    tasks = [tasks[number] for number in left]
    found = dataclasses.replace(found, sizes=_sizes(job), seen=seen_shares(job.calibration, texts))
    if tasks:
        found = _measure(job, statistics, provenance, tasks, budgets, texts, found, steps)
    shown = found.only(names, list(budgets), repair or "")
    if spread.leads:
        comparison_page.save(shown, job.output)
    return shown


def _open(recipe: CompressionRecipe) -> Job:
    """The job of a recipe, its texts ending with the window that has the last token wanted."""
    wanted = recipe.evaluation_tokens or COMPARED_TOKENS
    read = wanted + (recipe.window or 2048)
    job = open_job(dataclasses.replace(recipe, evaluation_tokens=read))
    texts = {name: first_tokens(windows, wanted) for name, windows in job.evaluation.items()}
    stored = dataclasses.replace(job.recipe, evaluation_tokens=wanted)
    return dataclasses.replace(job, recipe=stored, evaluation=texts)


def _budgets(job: Job, rates: Sequence[float]) -> dict[float, int]:
    # By the rate that is really kept: two asked for may round to one.
    c = job.base.config
    shape = (len(c.moe_layers), c.moe.num_experts, c.moe.d_expert)
    found = {}
    for rate in rates:
        check_rate("prune_rate", rate)
        budget = common_budget(shape, rate, job.recipe.block)
        found[round(1.0 - budget / math.prod(shape), 6)] = budget
    return found


def _sizes(job: Job) -> dict[str, int]:
    # Of 16-bit weights; the experts' are what is gone if they keep no channel.
    base, dense = job.base.about, job.base.about.weights()
    empty = tuple(tuple(0 for _ in counts) for counts in base.widths)
    return {"dense": 2 * dense, "experts": 2 * (dense - base.weights(empty))}


def _key(job: Job, texts: Mapping[str, Windows]) -> dict[str, Any]:
    # Contents alone: texts and a model that have moved are the same.
    text, valid = job.calibration.tokens, job.calibration.valid
    return {
        "model_hash": job.base.fingerprint,
        "dtype": job.recipe.dtype,
        "block": job.recipe.block,
        "window": job.recipe.window,
        "seed": job.recipe.seed,
        "calibration": sha256(text.tobytes() + valid.tobytes()).hexdigest(),
        **{n: s[n] for s in job.calibration.sources[:1] for n in TEXT_CHOICES if n in s},
        "evaluation": text_hashes(texts),
    }


def _earlier(job: Job, texts: Mapping[str, Windows]) -> Comparison | None:
    path = job.output / "compare.json"
    if not path.is_file():
        return None
    found, key = Comparison.load(path), _key(job, texts)
    if job.recipe.overwrite and (found.key != key or (job.output / comparison_page.PAGE).exists()):
        return None
    if found.key == key:
        return found
    differ = [name for name in key | found.key if found.key.get(name) != key.get(name)]
    raise InputError(
        f"{path} holds results of another {', '.join(differ)}; name another folder or add "
        "--overwrite"
    )


def _measure(
    job: Job,
    statistics: ChannelStatistics,
    provenance: Mapping[str, Any],
    tasks: list[Task],
    budgets: Mapping[float, int],
    texts: dict[str, Windows],
    found: Comparison,
    steps: Steps,
) -> Comparison:
    references: dict[str, Reference] = {}
    how: dict[str, Any] = {"batch": job.recipe.batch, "dtype": job.dtype}
    dense = measure(job.base, texts, references, steps, "dense", **how)
    found = dataclasses.replace(found, dense={n: q.to_dict() for n, q in dense.items()})
    done, total = 0, len(tasks) * len(job.base)
    share = -(-len(tasks) // job.spread.processes)
    groups = _groups(tasks, min(_group_size(job, texts), share))
    with steps.bar(f"compare {len(tasks)} plans") as on_step:

        def measured(group: list[Task]) -> list[list[dict[str, Any]]]:
            given = (job, statistics, provenance, group, budgets, texts, references)
            both = _run_group(*given, lambda layer: on_step(done + (layer + 1) * len(group), total))
            return [[dataclasses.asdict(result) for result in results] for results in both]

        for group, both in job.spread.shared_out(groups, measured):
            done += len(group) * len(job.base)
            results, refused = ([Result(**values) for values in one] for one in both)
            found = found.with_results(results, refused)
            if job.spread.leads:
                found.save(job.output)
    _say_refused(found.refused, steps)
    return found


def _say_refused(refused: Sequence[Result], steps: Steps) -> None:
    # Many rules cannot keep a budget for one and the same reason.
    rules: dict[tuple[float, str], list[str]] = {}
    for result in refused:
        rules.setdefault((result.rate, result.reason), []).append(result.name)
    for (rate, reason), names in rules.items():
        steps.say(f"at {rate:.4g}: {reason} (refused: {', '.join(names)})")


def _groups(tasks: Sequence[Task], size: int) -> list[list[Task]]:
    """Tasks that run together: masked ones share readings of the model, a repair has its own."""
    masked = [task for task in tasks if not task.repair]
    groups = [masked[start : start + size] for start in range(0, len(masked), size)]
    return groups + [[task] for task in tasks if task.repair]


def _group_size(job: Job, texts: Mapping[str, Windows]) -> int:
    states = sum(w.tokens.size for w in texts.values()) * job.base.config.d_model
    return max(1, min(GROUP, STATE_BYTES // (states * np.dtype(job.dtype).itemsize)))


def _run_group(
    job: Job,
    statistics: ChannelStatistics,
    provenance: Mapping[str, Any],
    group: Sequence[Task],
    budgets: Mapping[float, int],
    texts: Mapping[str, Windows],
    references: Mapping[str, Reference],
    on_layer: Callable[[int], None],
) -> tuple[list[Result], list[Result]]:
    planned: list[tuple[Task, PruningPlan]] = []
    refused = []
    for task in group:
        try:
            plan = task_plan(job, statistics, provenance, task, budgets[task.rate])
            planned.append((task, plan))
        except BudgetError as error:
            # It may be too small for whole experts: the other rules go on.
            refused.append(Result(task.rule, task.rate, task.seed, task.repair, reason=str(error)))
    if not planned:
        return [], refused
    plans, text = [plan for _, plan in planned], joined(texts)
    if group[0].repair:
        hidden = repaired_hidden(job, plans[0], group[0].repair, text, on_layer)[None]
    else:
        batch = min(job.recipe.batch, len(text[0]))
        hidden = masked_hidden(
            job.base, *text, plans, batch=batch, dtype=job.dtype, on_layer=on_layer
        )
    results = [
        task_result(task, plan, job, states, texts, references)
        for (task, plan), states in zip(planned, hidden, strict=True)
    ]
    return results, refused
