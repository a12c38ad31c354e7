"""Every export of a folder read again and compared with its plan."""

import os
from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.export_format import FORMATS
from moe_jax.errors import InputError
from moe_jax.spread import Spread
from pruning.budget.plan import PruningPlan
from pruning.kit.memory import Allowance
from pruning.kit.progress import Steps
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.recipe import CompressionRecipe
from pruning.runs.cap import capped
from pruning.runs.held import verify_bytes
from pruning.runs.places import joined
from pruning.stages.checks import Check, require_verified
from pruning.stages.export import codes_folder
from pruning.stages.made_by import is_repaired, require_current
from pruning.stages.probe_windows import random_probe
from pruning.stages.repair import stored_repair
from pruning.stages.sizes import export_of, form_of
from pruning.stages.stored import stored_base, stored_recipe
from pruning.stages.verify import verify_export, written_form


def verify(
    folder: str | os.PathLike,
    steps: Steps | None = None,
    *,
    memory_limit: int | str | None = None,
    where: PlaceOptions | None = None,
) -> list[Check]:
    """Check every export of a folder against its plan and the dense model.

    Args:
      folder: holds plan.json, recipe.yaml and exports/.
      steps: where progress goes; default stderr, of process 0.
      memory_limit: as of a recipe; default that of the stored one.
      where: processes that take turns with the layers; default those of `jax.distributed` if that
        is initialized.

    Returns:
      The checks, all passed, in every process.

    Raises:
      InputError: there is no plan or no export, one was made by an older plan, or the memory limit
        is too little.
      VerificationError: an export does not hold what was meant.
      LostProcess: another process has ended.
    """
    folder, (spread, steps) = Path(folder), joined(where, steps)
    given = {} if memory_limit is None else {"memory_limit": memory_limit}
    recipe = stored_recipe(folder, **given)
    base, plan = stored_base(recipe, steps, spread), PruningPlan.load(folder)
    folders = [path for name in FORMATS if (path := folder / "exports" / name).is_dir()]
    if not folders:
        raise InputError(f"{folder}/exports holds nothing; run `moe-compress export` first")
    require_current(folder, plan)
    spread.require_same({"plan": plan.content_hash, "exports": [path.name for path in folders]})
    forms = (form_of(recipe, path.name, plan) for path in folders)
    by_group = all(export_of(base.about, plan, form).by_group for form in forms)
    by_group &= not plan.merged

    def takes(found: Allowance) -> dict[str, int]:
        return {"verify": verify_bytes(base.about, found, by_group)}

    with capped(base, recipe.memory_limit, takes, steps):
        checks = _checks(base, plan, recipe, folders, steps, spread)
    require_verified(checks)
    return checks


def _checks(
    base: Checkpoint,
    plan: PruningPlan,
    recipe: CompressionRecipe,
    folders: list[Path],
    steps: Steps,
    spread: Spread,
) -> list[Check]:
    checks = []
    for target in folders:
        form = written_form(target, base.about, plan, form_of(recipe, target.name, plan))
        repair = stored_repair(recipe, plan) if is_repaired(target) else None
        given = (target, random_probe(base), codes_folder(recipe), repair)
        with steps.bar(f"verify {target.name}"):
            checks += verify_export(base, plan, form, *given, spread=spread)
    return checks
