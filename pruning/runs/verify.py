"""Every export of a folder read again and compared with its plan."""

import os
from pathlib import Path

from convert.export_format import FORMATS
from moe_jax.errors import InputError
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.stages.checks import Check, require_verified
from pruning.stages.export import codes_folder
from pruning.stages.made_by import is_repaired, require_current
from pruning.stages.probe_windows import random_probe
from pruning.stages.repair import stored_repair
from pruning.stages.sizes import form_of
from pruning.stages.stored import stored_base, stored_recipe
from pruning.stages.verify import verify_export, written_form


def verify(folder: str | os.PathLike, steps: Steps | None = None) -> list[Check]:
    """Check every export of a folder against its plan and the dense model.

    Args:
      folder: holds plan.json, recipe.yaml and exports/.
      steps: where progress goes; default stderr.

    Returns:
      The checks, all passed.

    Raises:
      InputError: there is no plan or no export, or one was made by an older plan.
      VerificationError: an export does not hold what was meant.
    """
    folder, steps = Path(folder), steps or Steps()
    recipe = stored_recipe(folder)
    base, plan = stored_base(recipe, steps), PruningPlan.load(folder)
    folders = [path for name in FORMATS if (path := folder / "exports" / name).is_dir()]
    if not folders:
        raise InputError(f"{folder}/exports holds nothing; run `moe-compress export` first")
    require_current(folder, plan)
    checks = []
    for target in folders:
        form = written_form(target, base.about, plan, form_of(recipe, target.name, plan))
        repair = stored_repair(recipe, plan) if is_repaired(target) else None
        given = (target, random_probe(base), codes_folder(recipe), repair)
        with steps.bar(f"verify {target.name}"):
            checks += verify_export(base, plan, form, *given)
    require_verified(checks)
    return checks
