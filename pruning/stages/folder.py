"""The folder that a run writes: going on with it, replacing it, and clearing what is stale."""

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from convert.export_format import FORMATS
from moe_jax.errors import InputError
from moe_jax.files import LEFTOVER, remove_leftovers, replace_text
from moe_jax.json_files import read_json
from pruning.budget.plan import PruningPlan
from pruning.recipe.recipe import CompressionRecipe, load_recipe
from pruning.report.compression import CompressionReport
from pruning.scores.sweep_log import SweepFolder
from pruning.stages import writer
from pruning.stages.job import Job
from pruning.stages.made_by import stale_exports
from pruning.stages.parts import FOLDER as SCORING
from pruning.stages.score import find_statistics
from pruning.text.source import TextSource
from pruning.text.windows import text_hashes

RECIPE = "recipe.yaml"
BEGUN = "exports/.begun.json"  # while `export` writes: its plan and options
PLANS = ("auto", "merged")  # folders of a comparison's plans, which `apply` takes
# All that a run writes but its recipe, in the order of removal: while a report is there a folder
# counts as finished, so what a killed removal leaves is never taken for an interrupted run.
OURS = (
    BEGUN, *(f"exports/{name}" for name in FORMATS),
    "repair/repair.json", "repair/states*", "repair/layer-[0-9]*.safetensors",
    *(f"compare-repair/{name}" for name in ("repair.json", "states*", "layer-[0-9]*.safetensors")),
    "gptq/gptq.json", "gptq/states*", "gptq/layer-[0-9]*.safetensors",
    "scoring/step-[0-9]*.safetensors", "scoring/progress.json", "scoring-[0-9a-f]*.states",
    "plan.json", "plan.safetensors",
    "compare.json", "compare.csv", "compare.html", "compare-tasks.csv",
    "bit-curves.json",
    *(f"{name}/*/plan.{kind}" for name in PLANS for kind in ("json", "safetensors")),
    "choice.json", "statistics.json", "statistics.safetensors",
    "report.html", "report.json", "model.json",
    "ablations.jsonl", "layers-alone.json", "audit.json", "audit.csv", "audit.html",
    "sweep.csv", "sweep.html",
)  # fmt: skip
# Folders that hold some of them.
FOLDERS = ("exports", "repair", "compare-repair", "gptq", "scoring")


def is_interrupted(job: Job, last: str) -> bool:
    """Whether the output folder holds an unfinished run of this recipe, to be gone on with; so is
    one that scored without obs where this is asked for beside.

    Args:
      job: the opened recipe.
      last: the file that the command writes last; what has it is replaced with `overwrite`.

    Raises:
      InputError: it holds something else that may not be replaced.
    """
    texts = (*job.recipe.calibration, *job.recipe.evaluation)
    read = (job.base.about.folder, *(TextSource.parse(text).path for text in texts))
    ends = ("report.json", last) if job.recipe.overwrite else ("report.json",)

    def unfinished() -> bool:
        return not any((job.output / name).exists() for name in ends)

    more = ("obs",) if job.recipe.obs and last == "statistics.json" else ()
    return may_resume(job.recipe, read, unfinished, lambda: has_moved(job), more)


def is_finished(job: Job) -> bool:
    """Whether the output folder holds all of this very run: report, statistics and exports.

    Raises:
      InputError: it does, but its report is damaged.
    """
    recipe, written = job.recipe, ("report.json", *(f"exports/{n}" for n in job.recipe.export))
    return (
        not recipe.overwrite
        and all((job.output / name).exists() for name in written)
        and _same_recipe(job.output / RECIPE, recipe, lambda: has_moved(job))
        and find_statistics(job) is not None
        and not _are_stale(job.output)
        and CompressionReport.load(job.output / "report.json").evaluation.get("texts")
        == text_hashes(job.evaluation)
    )


def has_moved(job: Job) -> bool:
    """Whether the output folder was measured on this very model, wherever that was."""
    try:
        measured = read_json(job.output / "statistics.json").get("model_hash")
    except (InputError, OSError):
        return False
    return measured == job.base.fingerprint


def may_resume(
    recipe: CompressionRecipe,
    read: Iterable[Path],
    unfinished: Callable[[], bool],
    moved: Callable[[], bool] = lambda: False,
    more: Sequence[str] = (),
) -> bool:
    """Whether the output folder is to be gone on with, rather than made or replaced.

    Args:
      recipe: resolved; names the output folder.
      read: files and folders that the run reads.
      unfinished: whether a folder of the same recipe lacks something.
      moved: whether a model that the recipe has at another place is the same one.
      more: options that may be other ones.

    Raises:
      InputError: the folder holds something else that may not be replaced, or what is read.
    """
    output = Path(recipe.output)
    for path in read:
        if output.resolve() in (path.resolve(), *path.resolve().parents):
            raise InputError(f"output={output} holds {path}, which is read; name another folder")
    there = {path.name for path in output.glob("*")} - {*writer.FILES}
    if all(map(LEFTOVER.fullmatch, there)):
        return False
    if not (output / RECIPE).is_file():
        raise InputError(
            f"output={output} already exists and is no output folder of ours (it has no {RECIPE}), "
            "so --overwrite leaves it alone too; name another folder"
        )
    if _same_recipe(output / RECIPE, recipe, moved, more) and unfinished():
        return True
    if not recipe.overwrite:
        raise InputError(
            f"output={output} already exists and is not an interrupted run of this recipe; "
            "name another folder or add --overwrite"
        )
    return False


def _same_recipe(
    path: Path, recipe: CompressionRecipe, moved: Callable[[], bool], more: Sequence[str] = ()
) -> bool:
    try:
        stored = load_recipe(path, overwrite=recipe.overwrite, output=recipe.output)
        # How much of the evaluation texts is read decides no earlier stage, where temporary files
        # lie and how much memory there is none at all.
        free = ("evaluation_tokens", "scratch", "memory_limit", *more)
        same = dataclasses.replace(stored, **{name: getattr(recipe, name) for name in free})
        stored, asked = (dataclasses.asdict(one.placed()) for one in (same, recipe))
        differ = [name for name in stored if stored[name] != asked[name]]
        return not differ or (differ == ["model"] and moved())
    except InputError:  # of another version, or edited
        return False


def make_output(recipe: CompressionRecipe, *, resumed: bool) -> None:
    """Make the output folder, without what an older run left unless that is gone on with."""
    output = Path(recipe.output)
    if not resumed:
        _remove_ours(output)
    output.mkdir(parents=True, exist_ok=True)
    clear_leftovers(output)
    replace_text(output / RECIPE, recipe.placed().to_yaml())


def _remove_ours(output: Path) -> None:
    for plan in _plans(output):
        _remove_ours(plan)
        (plan / RECIPE).unlink(missing_ok=True)
    SweepFolder(output / SCORING).clear()  # knows a file that may lie elsewhere
    for path in _ours(output):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in PLANS:
        for folder in output.glob(f"{name}/*"):
            _remove_empty(folder)
    for name in (*PLANS, *FOLDERS):
        _remove_empty(output / name)


def _ours(output: Path) -> list[Path]:
    """What an older run wrote into an output folder, but for the plans of a sweep."""
    return [path for pattern in OURS for path in sorted(output.glob(pattern))]


def _plans(output: Path) -> list[Path]:
    """Output folders of the plans of a sweep, half made ones too."""
    written = (
        path for name in ("plan.safetensors", RECIPE) for path in output.glob(f"plans/*/{name}")
    )
    return sorted({path.parent for path in written})


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def clear_leftovers(output: Path) -> None:
    """Remove what writes that were killed left in an output folder; its writer is the caller."""
    for plan in (output / "plans").glob("*/"):
        clear_leftovers(plan)
    # Cards are written again in exports that are whole.
    exports = (output / "exports" / name for name in FORMATS)
    for folder in (output, *(output / name for name in FOLDERS), *exports):
        remove_leftovers(folder)


def replaced_bytes(output: Path) -> int:
    """Bytes of an older run in the output folder, which overwriting frees."""
    return sum(map(replaced_bytes, _plans(output))) + written_there(output, OURS)


def written_there(output: Path, patterns: Iterable[str]) -> int:
    """Bytes of the files that patterns name in an output folder, and of those in such folders."""
    return sum(
        file.stat().st_size
        for pattern in patterns
        for path in output.glob(pattern)
        for file in (path, *path.rglob("*"))
        if file.is_file()
    )


def drop_stale_exports(output: Path, plan: PruningPlan) -> None:
    """Remove the exports in an output folder unless its stored plan is this one."""
    try:
        stored = PruningPlan.load(output)
    except (InputError, OSError):
        stored = None
    if stored is None or not stored.is_same(plan):
        for name in FORMATS:
            shutil.rmtree(output / "exports" / name, ignore_errors=True)
        _remove_empty(output / "exports")
    for export in stale_exports(output, plan):  # of a plan between two that are alike
        shutil.rmtree(export)


def _are_stale(output: Path) -> bool:
    try:
        return bool(stale_exports(output, PruningPlan.load(output)))
    except (InputError, OSError):
        return False
