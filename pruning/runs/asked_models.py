"""The models that a folder stands for: a checkpoint, or exports or plans beside the dense one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.export_format import FORMATS
from moe_jax.errors import InputError
from moe_jax.stream import LayerSource
from pruning.demo import model_folder
from pruning.kit.progress import Steps
from pruning.stages.export import pruned_source
from pruning.stages.folder import RECIPE
from pruning.stages.made_by import say_stale
from pruning.stages.stored import stored_base, stored_plans, stored_recipe

DENSE = "dense"


@dataclass(frozen=True)
class AskedModel:
    """A model that is asked.

    Attributes:
      name: in tables.
      source: its layers.
      checkpoint: whose tokenizer it has.
      place: what results call it: its folder, and of a plan the rate.
      plan: hash of the plan that it is of, where it is masked.
    """

    name: str
    source: LayerSource
    checkpoint: Checkpoint
    place: str
    plan: str = ""

    def identity(self, steps: Steps) -> str:
        """A hash of the model."""
        if self.checkpoint.weights_hash is None:
            with steps.bar(f"identify {self.name}") as on_step:
                self.checkpoint.hash_weights(on_step)
        return self.checkpoint.fingerprint + self.plan


def asked_models(
    folder: str | os.PathLike, rates: Sequence[float], steps: Steps
) -> tuple[list[AskedModel], Path | None]:
    """The models that a folder stands for, the dense one first, and the folder of their run."""
    path = Path(folder)
    say_stale(path, steps)
    if rates:
        return _planned(path, rates, steps), path
    is_output = (path / RECIPE).is_file() and not (path / "config.json").is_file()
    if is_output and folder != "demo":  # which is the embedded model, whatever lies here
        exports = [path / "exports" / name for name in FORMATS]
        exports = [export for export in exports if (export / "config.json").is_file()]
        if not exports:
            raise InputError(
                f"{path} holds no export; write one with `moe-compress export {path}`, or measure "
                "plans with --prune-rate"
            )
        return [*_dense(path, steps), *map(_stored, exports)], path
    run = path.absolute().parent.parent
    if path.absolute().parent.name == "exports" and (run / RECIPE).is_file():
        return [*_dense(run, steps), _stored(path)], run
    base = open_checkpoint(model_folder(folder))
    return [AskedModel("model", base, base, str(folder))], None


def _stored(export: Path) -> AskedModel:
    base = open_checkpoint(export)
    return AskedModel(export.name, base, base, str(export))


def _dense(run: Path, steps: Steps) -> list[AskedModel]:
    """The dense model of a run; none where it is not there any more, which is said."""
    try:
        base = stored_base(stored_recipe(run), steps)
    except InputError as error:
        steps.say(f"there is no dense model to compare with: {error}")
        return []
    return [AskedModel(DENSE, base, base, str(base.about.folder))]


def _planned(run: Path, rates: Sequence[float], steps: Steps) -> list[AskedModel]:
    """The dense model of a run, and a masked one for each rate."""
    recipe = stored_recipe(run)
    base = stored_base(recipe, steps)
    models = [AskedModel(DENSE, base, base, str(base.about.folder))]
    for one, plan in stored_plans(run, recipe, base, rates, steps)[0]:
        name = f"prune-rate {one.prune_rate}"
        place = f"{run}/{name.replace(' ', '-')}"
        masked = pruned_source(base, plan, None)
        models.append(AskedModel(name, masked, base, place, plan.content_hash))
    return models
