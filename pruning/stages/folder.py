"""The folder that a run writes: going on with it, replacing it, and clearing what is stale."""

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from moe_jax.errors import InputError
from moe_jax.files import LEFTOVER, remove_leftovers, replace_text
from moe_jax.json_files import read_json
from pruning.budget.plan import PruningPlan
from pruning.recipe.recipe import CompressionRecipe, load_recipe
from pruning.stages.job import Job
from pruning.stages.score import find_statistics
from pruning.text.source import TextSource
from pruning.text.windows import text_hashes

# All that a run writes, in the order of removal: while a report is there a folder counts as
# finished, so what a killed removal leaves is never taken for an interrupted run.
OURS = ("exports", "plans", "parts", "plan.*", "compare.*", "statistics.*", "report.html")
OURS += ("report.json",)
OURS += ("audit.*", "ablations.jsonl", "sweep.*")
RECIPE = "recipe.yaml"


def is_interrupted(job: Job) -> bool:
    """Whether the output folder holds an unfinished run of this recipe, to be gone on with.

    Raises:
      InputError: it holds something else that may not be replaced.
    """
    texts = (*job.recipe.calibration, *job.recipe.evaluation)
    read = (job.base.about.folder, *(TextSource.parse(text).path for text in texts))
    return may_resume(job.recipe, read, lambda: not (job.output / "report.json").exists())


def is_finished(job: Job) -> bool:
    """Whether the output folder holds all of this very run: report, statistics and exports."""
    recipe, written = job.recipe, ("report.json", *(f"exports/{n}" for n in job.recipe.export))
    return (
        not recipe.overwrite
        and all((job.output / name).exists() for name in written)
        and _same_recipe(job.output / RECIPE, recipe)
        and find_statistics(job) is not None
        and _reported_texts(job.output) == text_hashes(job.evaluation)
    )


def _reported_texts(output: Path) -> dict[str, str] | None:
    try:
        return read_json(output / "report.json").get("evaluation", {}).get("texts")
    except (InputError, OSError, AttributeError):
        return None


def may_resume(
    recipe: CompressionRecipe, read: Iterable[Path], unfinished: Callable[[], bool]
) -> bool:
    """Whether the output folder is to be gone on with, rather than made or replaced.

    Args:
      recipe: resolved; names the output folder.
      read: files and folders that the run reads.
      unfinished: whether a folder of the same recipe lacks something.

    Raises:
      InputError: the folder holds something else that may not be replaced, or what is read.
    """
    output = Path(recipe.output)
    for path in read:
        if output.resolve() in (path.resolve(), *path.resolve().parents):
            raise InputError(f"output={output} holds {path}, which is read; name another folder")
    if output.exists() and not output.is_dir():
        raise InputError(f"output={output} is a file; name a folder")
    if not output.exists() or all(LEFTOVER.fullmatch(path.name) for path in output.iterdir()):
        return False
    if not (output / RECIPE).is_file():
        raise InputError(
            f"output={output} already exists and is no output folder of ours (it has no {RECIPE}), "
            "so --overwrite leaves it alone too; name another folder"
        )
    if _same_recipe(output / RECIPE, recipe) and unfinished():
        return True
    if not recipe.overwrite:
        raise InputError(
            f"output={output} already exists and is not an interrupted run of this recipe; "
            "name another folder or add --overwrite"
        )
    return False


def _same_recipe(path: Path, recipe: CompressionRecipe) -> bool:
    try:
        stored = load_recipe(path, overwrite=recipe.overwrite)
        # How much of the evaluation texts is read decides no earlier stage.
        same = dataclasses.replace(stored, evaluation_tokens=recipe.evaluation_tokens)
        return dataclasses.asdict(same) == dataclasses.asdict(recipe)
    except InputError:  # of another version, or edited
        return False


def make_output(recipe: CompressionRecipe, *, resumed: bool) -> None:
    """Make the output folder, without what an older run left unless that is gone on with."""
    output = Path(recipe.output)
    if not resumed:
        for path in (path for pattern in OURS for path in output.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    output.mkdir(parents=True, exist_ok=True)
    clear_leftovers(output)
    replace_text(output / RECIPE, recipe.to_yaml())


def clear_leftovers(output: Path) -> None:
    """Remove what writes that were killed left in the output folder."""
    for folder in (
        output,
        output / "exports",
        output / "parts",
        *sorted((output / "plans").glob("*")),
    ):
        remove_leftovers(folder)


def replaced_bytes(output: Path) -> int:
    """Bytes of an older run in the output folder, which overwriting frees."""
    return sum(
        file.stat().st_size
        for pattern in OURS
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
        shutil.rmtree(output / "exports", ignore_errors=True)
