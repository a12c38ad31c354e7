"""What is checked and said before a run does expensive work."""

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint
from convert.description import Description
from convert.export import Export
from convert.export_format import ExportFormat
from convert.writer import SPARE_BYTES
from moe_jax.errors import InputError
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.kit.words import amount
from pruning.recipe.recipe import CompressionRecipe, ResolvedRecipe
from pruning.scores.parts import rows_of_parts
from pruning.scores.statistics import ALWAYS, SUMS, ChannelStatistics, field_shapes
from pruning.stages import folder as output_folder
from pruning.stages import plan as planning
from pruning.stages.between_sizes import between_files
from pruning.stages.job import Job
from pruning.stages.measure import evaluation_files
from pruning.stages.model_record import remember
from pruning.stages.parts import sweep_folder
from pruning.stages.remarks import say_left_out, say_nothing_saved, say_texts
from pruning.stages.repair import repair_bytes
from pruning.stages.score import STATISTICS
from pruning.stages.scoring_sizes import scratch_bytes, statistics_bytes
from pruning.stages.size_bounds import (
    equal_export,
    keeps_even_experts,
    mean_width,
    most_bytes,
    pads,
)
from pruning.stages.sizes import export_of, export_sizes, foreseen_form, form_of, gptq_bytes
from pruning.text.held_out import not_held_out, seen_shares

SCRATCH = "scratch files"
SCORED = ("statistics", SCRATCH)  # what scoring takes, and nothing later
WRITTEN = {"statistics": ("scoring", "statistics.*"), SCRATCH: (), "repair": ("repair",),
           "gptq": ("gptq",)}  # fmt: skip


def prepare(job: Job, steps: Steps, *, exports: bool = True, last: str = "report.json") -> None:
    """Refuse what cannot end well, then make the output folder.

    Nothing in an old output folder is touched before every check has passed.

    Args:
      job: the opened recipe.
      steps: where progress and warnings go.
      exports: whether the run goes on to plan and export.
      last: the file that the command writes last.

    Raises:
      InputError: an impossible plan, a bad weight, or an output folder in the way.
      OSError: the disk is too small.
    """
    resumed = output_folder.is_interrupted(job, last)
    if resumed:
        output_folder.clear_leftovers(job.output)
    base = job.base.about
    plan = rehearsed_plan(job.recipe, base)
    if exports:
        for name in job.recipe.export:
            form = foreseen_form(job.recipe, name, base)
            Export(base, base.widths, form).check()
            _require_known_width(job.recipe, form)
            _require_even_cut(job.recipe, form)
            (Export.check if form.cut_router else Export.check_mtp)(export_of(base, plan, form))
        _say_padding(base, job.recipe, steps)
        say_mtp(base, job.recipe, steps)
    check_disk(job, resumed=resumed, exports=exports)
    say_texts(job, steps, evaluates=exports)
    if warning := not_held_out(seen_shares(job.calibration, job.evaluation)):
        steps.say(warning)
    if not resumed and output_folder.replaced_bytes(job.output):
        # Old results stay until the new weights are sound; others are checked as scoring reads.
        with steps.bar("check weights") as on_step:
            job.base.check_finite(on_step, mtp=job.recipe.mtp != "drop")
    output_folder.make_output(job.recipe, resumed=resumed)
    if job.base.weights_hash is not None:
        remember(job.base, job.output)


def _require_known_width(recipe: ResolvedRecipe, form: ExportFormat) -> None:
    # Whole experts that stay are unpruned; of other widths that differ only the plan knows.
    unknown = form.is_padded and pads(recipe, form) and recipe.width != "experts"
    if form.mtp == "keep" and unknown:
        raise InputError(
            f"mtp='keep' asks {form.name} to stay as wide as the model, which with --width "
            f"{recipe.width} only the plan can tell; choose mtp='prune' or 'drop', or a ragged "
            "format"
        )


def _require_even_cut(recipe: ResolvedRecipe, form: ExportFormat) -> None:
    if form.renumbers and not keeps_even_experts(recipe):
        raise InputError(
            f"{form.name} has one number of experts for all layers, and cut_router leaves as many "
            "of each with --width experts --per-layer; add these, or choose a ragged format"
        )


def rehearsed_plan(recipe: ResolvedRecipe, base: Description) -> PruningPlan:
    """The plan of a resolved recipe on made-up statistics, which need no weights.

    Raises:
      InputError: no plan satisfies the recipe, whatever the statistics.
    """
    c = base.config
    sizes = (len(c.moe_layers), c.moe.num_experts, c.moe.d_expert, c.d_model)
    shapes = field_shapes(*sizes, recipe.groups)
    # Every sum is one, without memory: nothing is degenerate, and no layer differs from another.
    # Without a text there are no sums, only weights.
    values = {name: float(name not in SUMS[ALWAYS] or not recipe.weights_only) for name in shapes}
    statistics = ChannelStatistics.from_arrays(
        {name: np.broadcast_to(values[name], shape) for name, shape in shapes.items()}
    )
    return planning.plan(recipe.fixed(), statistics, {"model_hash": None, "tokens": 0}, base)


def check_disk(job: Job, *, resumed: bool, exports: bool) -> None:
    """Raise OSError unless everything the run will write fits beside what is there."""
    recipe, output = job.recipe, job.output
    parts = written_bytes(job.base.about, recipe, len(job.calibration.tokens), exports=exports)
    for name in parts if resumed else ():
        is_scored = name in SCORED and (output / STATISTICS).exists()
        there = output_folder.written_there(output, WRITTEN.get(name, (f"exports/{name}",)))
        there += sweep_folder(job).state_bytes if name == SCRATCH else 0
        parts[name] = 0 if is_scored else max(0, parts[name] - there)
    if exports:
        later = between_files(job.base.about, recipe, len(job.calibration.tokens))
        later = max(later, evaluation_files(job.base.config, job.evaluation))
        parts |= {SCRATCH: max(parts.get(SCRATCH, 0), later)} if later else {}
    require_both(recipe, parts, 0 if resumed else output_folder.replaced_bytes(output))


def written_bytes(
    base: Description, recipe: ResolvedRecipe, windows: int, *, exports: bool = True
) -> dict[str, int]:
    """Most bytes that a run of a resolved recipe takes on the disk, by what they are for.

    Args:
      base: the dense model.
      recipe: a resolved one.
      windows: of calibration text.
      exports: whether the run goes on to plan and export.
    """
    number = len(rows_of_parts(windows, recipe.until_stable is not None))
    parts = {"statistics": (1 + number) * statistics_bytes(base, recipe)}
    later = between_files(base, recipe, windows) if exports else 0  # these follow one another
    parts |= {SCRATCH: size} if (size := max(later, scratch_bytes(base, recipe, windows))) else {}
    if not exports:
        return parts
    sizes = {name: most_bytes(base, recipe, name) for name in recipe.export}
    parts |= {"repair": size} if (size := repair_bytes(base, recipe, windows)) else {}
    parts |= {"gptq": size} if (size := gptq_bytes(base, recipe, windows, sizes)) else {}
    return parts | sizes


def is_elsewhere(recipe: CompressionRecipe) -> bool:
    """Whether temporary files go to another disk than what a run leaves."""
    disks = {
        _there(folder).stat().st_dev for folder in (Path(recipe.output), recipe.scratch_folder)
    }
    return len(disks) > 1


def require_both(recipe: CompressionRecipe, parts: dict[str, int], replaced: int = 0) -> None:
    """`require_space` in a run's output folder, and where its scratch files go."""
    if is_elsewhere(recipe) and SCRATCH in parts:
        parts = dict(parts)
        require_space(recipe.scratch_folder, {SCRATCH: parts.pop(SCRATCH)})
    require_space(Path(recipe.output), parts, replaced)


def require_space(folder: Path, parts: dict[str, int], replaced: int = 0) -> None:
    """Raise OSError unless `parts`, bytes by name, fit once `replaced` bytes are gone."""
    needed, free = sum(parts.values()) + SPARE_BYTES, free_space(folder) + replaced
    if free < needed:
        listed = ", ".join(f"{name} {amount(size)}" for name, size in parts.items())
        cure = " (--scratch FOLDER that of scratch files alone)" if parts.get(SCRATCH) else ""
        raise OSError(
            f"{folder} has {amount(free)} free but up to {amount(needed)} are needed "
            f"({listed}, spare {amount(SPARE_BYTES)}); free some space or choose another disk"
            f"{cure}"
        )


def free_space(folder: Path) -> int:
    """Free bytes where a folder lies or will lie."""
    return shutil.disk_usage(_there(folder)).free


def _there(folder: Path) -> Path:
    """A folder, or the nearest above it that exists."""
    folders = (folder.absolute(), *folder.absolute().parents)
    return next(path for path in folders if path.exists())


def check_exports(
    base: Checkpoint,
    plan: PruningPlan,
    recipe: CompressionRecipe,
    folder: Path,
    steps: Steps,
    *,
    overwrite: bool,
) -> None:
    """Check all exports of a plan before the first is written, and say their sizes.

    Raises:
      InputError: the plan is another model's, a target exists, or widths do not fit the groups.
      OSError: the disk is too small.
    """
    plan.require_model(base.fingerprint)
    there = [str(path) for path in (folder / name for name in recipe.export) if path.exists()]
    if there and not overwrite:
        raise InputError(f"{', '.join(there)} already exist; add --overwrite to replace them")
    for name in recipe.export:
        export_of(base.about, plan, form_of(recipe, name, plan)).check()
    sizes = export_sizes(base.about, plan, recipe)
    parts = {name: size["bytes"] for name, size in sizes.items()}
    windows = math.ceil(recipe.max_tokens / (recipe.window or 2048))
    if left := gptq_bytes(base.about, recipe, windows, parts):
        there = output_folder.written_there(folder.parent, WRITTEN["gptq"])
        parts["gptq"] = max(0, left - there)
    require_space(folder, parts)
    say_sizes(sizes, steps)
    say_nothing_saved(plan, recipe, steps)
    say_left_out(base.about.folder, steps)


def check_changes(job: Job, plan: PruningPlan, *, repairs: bool) -> None:
    """Raise OSError unless what repair, if a command repairs, and GPTQ of a plan need fits, but
    for the codes, which are checked with the exports."""
    about, windows = job.base.about, len(job.calibration.tokens)
    recipe = job.recipe if repairs else dataclasses.replace(job.recipe, repair="none")
    parts = {"repair": repair_bytes(about, recipe, windows)} if repairs else {}
    kept = int(plan.counts.sum(axis=1).max())
    parts |= {SCRATCH: size} if (size := between_files(about, recipe, windows, kept)) else {}
    require_both(recipe, parts)


def say_sizes(sizes: dict[str, dict], steps: Steps) -> None:
    """One line per export with its exact size."""
    for name, size in sizes.items():
        line = f"{name}: {amount(size['bytes'])}"
        if not ExportFormat(name).is_padded and size["padded_bytes"] is not None:
            line += f" (padded to one width for stock clients: {amount(size['padded_bytes'])})"
        steps.say(line)


def _say_padding(base: Description, recipe: ResolvedRecipe, steps: Steps) -> None:
    """Say what padding may cost, while nothing has been spent yet."""
    width, widest = mean_width(base, recipe, math.floor), base.config.moe.d_expert
    if recipe.width == "capped":
        assert recipe.cap is not None
        widest = recipe.cap - recipe.cap % recipe.block
    unpruned = ", as without pruning" if widest == base.config.moe.d_expert else ""
    for name in recipe.export:
        form = form_of(recipe, name)
        if form.cut_router or not pads(recipe, form):
            continue
        mean, most = (amount(equal_export(base, form, w).nbytes) for w in (width, widest))
        of, one, cure = ("the widest", "one expert", "uniform")
        if form.is_layered:
            of, one, cure = ("the widest of its layer", "one expert of every layer", "layer")
        steps.say(
            f"{name} with --width {recipe.width} stores every expert as wide as {of}: {mean} if "
            f"all have {width} channels, {most} if {one} keeps {widest}{unpruned}; "
            f"--width {cure} ensures the smaller size, ragged exports store no padding"
        )


def say_mtp(base: Description, recipe: CompressionRecipe, steps: Steps) -> None:
    """Say what becomes of the layers that predict further tokens, if the checkpoint has any."""
    words = {
        "drop": "left out, so programs cannot draft tokens with them; --mtp prune or keep writes "
        "them",
        "keep": "copied as they are",
        "prune": "pruned without a text, experts as wide as the model's",
    }
    if base.mtp:
        steps.say(
            f"{len(base.mtp)} tensors such as {next(iter(base.mtp))} predict further tokens; they "
            f"are {words[recipe.mtp]}"
        )
