"""Every rule at equal kept channels on held-out text, one sweep of the model per group of rules."""

import dataclasses
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Literal

from moe_jax.errors import InputError
from moe_jax.files import replace_text
from moe_jax.spread import Spread
from pruning.budget.merging import select_merges
from pruning.budget.rules import RULES, check_needs, select_rules, switches
from pruning.kit.progress import Steps
from pruning.measure.quality import Reference
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.recipe import CompressionRecipe
from pruning.recipe.task_options import TaskOptions
from pruning.report import comparison_page
from pruning.report.compared import AUTO, CHOSEN, Result
from pruning.report.comparison import Comparison
from pruning.report.comparison_tasks import tasks_csv
from pruning.runs.auto_bits import auto_plans
from pruning.runs.auto_rule import chosen_plans
from pruning.runs.calibration_sets import most_seen, source_of
from pruning.runs.cap import refuse_limit
from pruning.runs.compared import Kept, Scored, require_windows
from pruning.runs.compared_job import opened
from pruning.runs.compared_task import Task, task_of
from pruning.runs.compared_tasks import ask_plans
from pruning.runs.controls import Controls, tasks
from pruning.runs.merged import require_tokens
from pruning.runs.places import working
from pruning.runs.plan_groups import run_groups
from pruning.runs.score import scored
from pruning.runs.tasks import open_tasks
from pruning.shrink.repair_model import Mode
from pruning.stages import preflight
from pruning.stages import score as scoring
from pruning.stages.job import Job
from pruning.stages.measure import measure
from pruning.stages.model_record import identify
from pruning.stages.plan import TEXT_CHOICES
from pruning.text.calibration import TokenBatch
from pruning.text.windows import Windows, text_hashes

RATES = (0.25, 0.5)
TASKS = "compare-tasks.csv"


def compare(
    recipe: CompressionRecipe,
    rates: Sequence[float] = (),
    rules: Sequence[str] = ("standard",),
    *,
    bits: Sequence[int | Literal["auto"]] = (16,),
    target_bytes: Sequence[int] = (),
    target_factors: Sequence[float] = (),
    repair: Mode | None = None,
    repaired: Sequence[str] = (),
    draws: int = 0,
    top_k: Sequence[int] = (),
    skip_below: Sequence[float] = (),
    calibration_sets: Mapping[str, Sequence[str]] | None = None,
    merges: Sequence[str] = (),
    cut_router: bool = False,
    judged: TaskOptions | None = None,
    steps: Steps | None = None,
    where: PlaceOptions | None = None,
) -> Comparison:
    """Plan and measure every rule at every rate and size, in all of the bits.

    An interrupted comparison is repeated with the same recipe and goes on after its last group;
    more rates, and rules that need no further statistics, add to what is in the folder, which
    `overwrite` begins anew.

    Args:
      recipe: model, texts, block and output; its planner options are not read. Of each text its
        `evaluation_tokens` are scored, rounded up to whole windows.
      rates: prune rates, each rounded to a budget that all rules can keep exactly; default 0.25 and
        0.5, or none where sizes are given.
      rules: names of `RULES`, patterns, "standard" or "all"; "auto" is at each rate the rule that
        planner auto takes, by windows kept out of the calibration text.
      bits: of the weights, 16, or fewer, rounded to nearest as an export of each plan rounds them;
        of fewer there is a result without pruning as well. "auto" gives each layer, at the sizes,
        channels and bits by what they cost alone on windows kept out of the calibration text.
      target_bytes: sizes of the folder, weights alone: in all of the bits every rule removes just
        so much that its plan is no larger.
      target_factors: the same by how many times smaller than the model's files.
      repair: measure every plan repaired in this way as well; each takes a repair of the model on
        all of the calibration text.
      repaired: those of the rules whose plans are; default all.
      draws: so often as many windows of the calibration text are drawn with replacement, scored,
        and every rule planned and measured again: what chance in that text does to losses, to
        differences of rules and to what is kept. Each takes as long as all the rest.
      top_k: experts per token, fewer than the model's: the whole model is measured with so many,
        in each of the bits.
      skip_below: the same with those experts of a token skipped whose routing weight is less than
        this share of its best expert's, in (0, 1].
      calibration_sets: files of other calibration texts by name, two or more; a sixteenth of each
        is not scored but measured on, beside the recipe's evaluation texts. Of each, rules are
        scored, planned and measured as well; where the recipe names no calibration text, that is
        equal parts of all sets.
      merges: names of `MERGES`, patterns, or "all": at every prune rate, in all of the bits, the
        experts are merged into as many as have what rules keep; not for draws and sets.
      cut_router: rules that drop whole experts are also measured with the dropped ones' rows of the
        router gone, so that their tokens go to others, as publications do it; top-k stays.
      judged: tasks of lm-evaluation-harness, which the dense model and that of every plan of the
        calibration text are asked after the rest; its `output` is not read, answers are in the
        recipe's. A plan that is repaired is repaired once more for it.
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
    sizes = bool(target_bytes or target_factors)
    numbers = [AUTO if one == "auto" else one for one in bits]
    controls = Controls(
        rates=rates or (() if sizes else RATES), bits=tuple(dict.fromkeys(numbers)),
        target_bytes=target_bytes, target_factors=target_factors, repair=repair or "",
        repaired=repaired, chooses=CHOSEN in rules,
        draws=draws, top_k=top_k, skip_below=skip_below, sets=calibration_sets or {},
        merges=select_merges(merges), cut_router=cut_router,
    )  # fmt: skip
    with working(recipe.output, where, steps) as (spread, steps):
        return _compare(recipe, rules, controls, judged, steps, spread)


def _compare(
    recipe: CompressionRecipe,
    rules: Sequence[str],
    controls: Controls,
    judged: TaskOptions | None,
    steps: Steps,
    spread: Spread,
) -> Comparison:
    refuse_limit(recipe, "compare")
    _require_one_process(controls, judged, spread)
    names = select_rules([name for name in rules if name != CHOSEN], RULES)
    if "all" in rules:
        recipe = dataclasses.replace(recipe, **dict.fromkeys(switches(names), True))
        steps.say("all rules need gradients, expert details and weight gradients: scoring takes "
                  "several times as long as for the standard rules, once")  # fmt: skip
    check_needs(names, recipe.groups)
    if controls.chooses:
        names.append(CHOSEN)
        # As where `compress` repairs: repair's own selection is among the rules that are measured.
        recipe = dataclasses.replace(recipe, obs=recipe.obs or bool(controls.repair))
    with steps.bar("open"):
        job, sets = opened(recipe, controls, spread)
    loaded = open_tasks(judged, steps) if judged else {}
    controls.fewer(job.base.config.moe.experts_per_token)  # before the weights are read
    if spread.leads:
        identify(job.base, job.output, steps)
    texts = job.evaluation
    if not texts:
        raise InputError("there is no text to evaluate on; name one with --evaluation")
    if controls.repair:
        require_windows(job, "leave --repair away")
    if controls.merges:
        require_tokens(job)
    budgets: dict[Task, Kept] = dict(tasks(job, names, controls))
    key = _key(job, sets, texts)
    earlier = _earlier(job, key) if spread.leads else None
    asked = [list(dataclasses.astuple(task)) for task in budgets]
    whole = scored(
        job, steps,
        lambda: preflight.prepare(job, steps, exports=False, last=comparison_page.PAGE),
        {"rules": list(names), "plans": asked, "evaluation": text_hashes(texts)},
    )  # fmt: skip
    found = earlier or Comparison(key=key, dense={}, results=(), refused=())
    done = {task_of(result) for result in (*found.results, *found.refused)}
    left = spread.led(lambda: [number for number, one in enumerate(budgets) if one not in done])
    missing = [task for number, task in enumerate(budgets) if number in left]
    found = dataclasses.replace(found, sizes=_sizes(job), seen=most_seen(job, sets, texts))
    if missing or judged:
        wanted = list(budgets) if judged else missing
        budgets |= auto_plans(job, *whole, wanted, steps)
        budgets |= chosen_plans(job, *whole, budgets, wanted, controls.repair, steps)
    if missing:
        found = _measure(job, whole, sets, missing, budgets, texts, found, steps)
    if judged:
        for more in ask_plans(job, whole, budgets, found, judged, loaded, steps):
            found = more
            found.save(job.output)
            replace_text(job.output / TASKS, tasks_csv(found))
    shown = found.only(lambda result: task_of(result) in budgets)
    if spread.leads:
        comparison_page.save(shown, job.output)
    return shown


def _require_one_process(controls: Controls, judged: TaskOptions | None, spread: Spread) -> None:
    """Raise InputError if several processes are asked for what one of them does."""
    single = {"--repair": controls.repair, "--draws": controls.draws,
              "--calibration-sets": controls.sets, "--tasks": judged,
              "--bits auto": controls.has_auto, "--rules auto": controls.chooses}  # fmt: skip
    alone = next((flag for flag, asked in single.items() if asked), "")
    if alone and spread.processes > 1:
        raise InputError(
            f"{alone} is done by one process, a model after the other; leave out {alone} or "
            "--coordinator"
        )


def _sizes(job: Job) -> dict[str, int]:
    # Of 16-bit weights; the experts' are what is gone if they keep no channel.
    base, dense = job.base.about, job.base.about.weights()
    empty = tuple(tuple(0 for _ in counts) for counts in base.widths)
    return {"dense": 2 * dense, "experts": 2 * (dense - base.weights(empty))}


def _key(job: Job, sets: Mapping[str, TokenBatch], texts: Mapping[str, Windows]) -> dict[str, Any]:
    # Contents alone: texts and a model that have moved are the same.
    def digest(text: TokenBatch) -> str:
        return sha256(text.tokens.tobytes() + text.valid.tobytes()).hexdigest()

    return {
        "model_hash": job.base.fingerprint,
        "dtype": job.recipe.dtype,
        "block": job.recipe.block,
        "group_size": job.recipe.group_size,
        "window": job.recipe.window,
        "seed": job.recipe.seed,
        "calibration": digest(job.calibration),
        **({"sets": {name: digest(text) for name, text in sets.items()}} if sets else {}),
        **{n: s[n] for s in job.calibration.sources[:1] for n in TEXT_CHOICES if n in s},
        "evaluation": text_hashes(texts),
    }


def _earlier(job: Job, key: dict[str, Any]) -> Comparison | None:
    path = job.output / "compare.json"
    if not path.is_file():
        return None
    found = Comparison.load(path)
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
    whole: Scored,
    sets: Mapping[str, TokenBatch],
    tasks: list[Task],
    budgets: Mapping[Task, Kept],
    texts: dict[str, Windows],
    found: Comparison,
    steps: Steps,
) -> Comparison:
    references: dict[str, Reference] = {}
    how: dict[str, Any] = {"batch": job.recipe.batch, "dtype": job.dtype}
    dense = measure(job.base, texts, references, steps, "dense", **how)
    found = dataclasses.replace(found, dense={n: q.to_dict() for n, q in dense.items()})
    for name, draw in dict.fromkeys((task.calibration, task.draw) for task in tasks):
        own = [task for task in tasks if (task.calibration, task.draw) == (name, draw)]
        # Of the calibration text itself the sums are there; a draw or a set has its own.
        source = source_of(job, name, draw, sets)
        sums = scoring.score(source, steps) if name or draw else whole
        of = f" of draw {draw}" if draw else f" of {name}" if name else ""
        title = f"compare {len(own)} plans{of}"
        with steps.bar(title) as on_step:
            given = (source, sums, whole, own, budgets, texts, references)
            for results, refused in run_groups(*given, on_step):
                found = found.with_results(results, refused)
                if job.spread.leads:
                    found.save(job.output)
    _say_refused(found.refused, steps)
    return found


def _say_refused(refused: Sequence[Result], steps: Steps) -> None:
    # Many rules cannot keep a budget for one and the same reason.
    rules: dict[tuple[str, str], list[str]] = {}
    for result in refused:
        rules.setdefault((result.place, result.reason), []).append(result.name)
    for (place, reason), names in rules.items():
        steps.say(f"at {place}: {reason} (refused: {', '.join(names)})")
