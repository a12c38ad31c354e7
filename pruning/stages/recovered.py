"""The student of a recovery: opened, checked, and written once it is trained."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.export_format import ExportFormat
from moe_jax.errors import InputError
from moe_jax.files import replace_file
from moe_jax.stream import LayerSource, mapped
from moe_jax.structure import named_leaves
from moe_jax.transformer import DecoderLayer
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe
from pruning.recipe.recover_options import RecoverOptions
from pruning.recovery.course import FitOptions
from pruning.recovery.deltas import DeltaConfig, Deltas, merged
from pruning.recovery.forward import layer_deltas
from pruning.report.card import Recovery
from pruning.shrink.rounding import rounded_layer
from pruning.stages.card import card_files
from pruning.stages.export import mtp_source, pruned_source
from pruning.stages.made_by import OLDER, is_repaired, stale_exports
from pruning.stages.recovery_sizes import trained_shapes
from pruning.stages.repair import stored_repair
from pruning.stages.sizes import export_of, form_of, kept_widths
from pruning.stages.stored import stored_base, stored_recipe

M = TypeVar("M", bound=nnx.Module)

PLAN = "plan.json"
BALANCE = 0.001


@dataclass(frozen=True)
class Student:
    """A pruned model, and the dense one that it came from.

    Attributes:
      folder: what was named: the output of `compress`, or one of its exports.
      run: the output of `compress`.
      recipe: of the run.
      base: the dense model.
      plan: what is kept of it.
      source: the pruned model.
      repair: folder of its repaired weights, None if there are none.
    """

    folder: Path
    run: Path
    recipe: CompressionRecipe
    base: Checkpoint
    plan: PruningPlan
    source: LayerSource
    repair: Path | None


def open_student(folder: Path, steps: Steps) -> Student:
    """Open what a run of `compress` left, or one of its exports, whose weights are then trained on.

    Raises:
      InputError: it is neither, or the export is of another plan or stored at other widths.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; name the output folder of `compress`")
    is_run = (folder / PLAN).is_file()
    run = folder if is_run else folder.absolute().parent.parent
    if not (run / PLAN).is_file():
        raise InputError(
            f"{folder} holds no {PLAN} and is no export in a folder that does; name the output "
            "folder of `compress` or `apply`, or OUT/exports/NAME in it"
        )
    plan, recipe = PruningPlan.load(run), stored_recipe(run)
    base = stored_base(recipe, steps)
    plan.require_model(base.fingerprint)
    repair = stored_repair(recipe, plan)
    if is_run:
        source = pruned_source(base, plan, None, repair=repair)
        return Student(folder, run, recipe, base, plan, source, repair)
    if folder.absolute() in stale_exports(run, plan):
        raise InputError(f"{folder}: {OLDER}")
    source = open_checkpoint(folder, dtype=jnp.bfloat16)
    if source.about.widths != kept_widths(plan, base.about):
        raise InputError(
            f"{folder} stores experts at other widths than its plan keeps; name {run}, or a ragged "
            "export of it"
        )
    return Student(folder, run, recipe, base, plan, source, repair if is_repaired(folder) else None)


def forms_of(student: Student, options: RecoverOptions) -> dict[str, ExportFormat]:
    """The formats to write, each checked.

    Raises:
      InputError: one does not suit the plan or the family.
    """
    forms = {}
    for name in options.export or student.recipe.export:
        form = form_of(student.recipe, name, student.plan)
        # Weights that were trained are no longer those whose codes the model stores.
        form = dataclasses.replace(form, requantize=student.base.about.native is not None)
        export_of(student.base.about, student.plan, form).check()
        forms[name] = form
    return forms


def delta_config(options: RecoverOptions, forms: dict[str, ExportFormat]) -> DeltaConfig:
    """What is trained, of filled options.

    Raises:
      InputError: training is to round to 4 bits and no integer format is written.
    """
    group = None
    if options.quantize_aware:
        packed = (form for form in forms.values() if form.is_int4)
        groups = [form.group_size for form in packed]
        if not groups:
            raise InputError(
                f"quantize_aware=True needs an int4 export, and {', '.join(forms)} is none; add "
                "--export ragged-int4"
            )
        group = groups[0]
    assert options.train is not None and options.router_rank is not None
    return DeltaConfig(
        train=options.train,
        rank=options.rank,
        alpha=options.alpha,
        router_rank=options.router_rank,
        attention_rank=options.attention_rank,
        fixed_norm=options.fixed_norm,
        group_size=group,
    )


def fit_options(options: RecoverOptions, source: LayerSource) -> FitOptions:
    """How it is trained, of filled options."""
    balance = options.balance
    if balance is None:  # a bias that balances was trained without this loss
        balance = 0.0 if source.config.moe.correction_bias else BALANCE
    rate, router = options.learning_rate, options.router_learning_rate
    assert rate and options.epochs
    rate = router or rate if options.train == "router" else rate
    return FitOptions(
        learning_rate=rate,
        router_rate=router and router / rate,
        epochs=options.epochs,
        batch=options.batch,
        accumulate=options.accumulate,
        share_from=options.next_token_from or 0.0,
        share_to=options.next_token or 0.0,
        balance=balance,
        patience=options.patience,
        seed=options.seed,
        dtype={"float32": jnp.float32, "bfloat16": jnp.bfloat16}[options.dtype],
        remat=options.remat,
    )


_merged = jax.jit(merged, static_argnames="config")


def recovered_source(
    source: LayerSource, deltas: Deltas, config: DeltaConfig, form: ExportFormat | None = None
) -> LayerSource:
    """The student with its trained changes.

    Args:
      source: the student.
      deltas: its changes.
      config: of the changes.
      form: a format as which it is rounded; None leaves what was changed in float32.
    """
    plain = dataclasses.replace(config, group_size=None)

    def change(index: int, layer: DecoderLayer) -> DecoderLayer:
        changed = _merged(layer, layer_deltas(deltas, index), config=plain)
        if form is None:
            return changed
        own = form.of_layer(index)
        if own.is_packed:
            changed = rounded_layer(changed, own.group_size, own.storage)
        return _narrowed(changed, layer)

    return mapped(source, change)


def _narrowed(changed: M, before: nnx.Module) -> M:
    """A changed module whose arrays have the types that they had, but for those in 4 bits."""
    narrow = {}
    for field in dataclasses.fields(changed):  # type: ignore[arg-type]
        new, old = getattr(changed, field.name), getattr(before, field.name)
        if isinstance(new, nnx.Module):
            narrow[field.name] = _narrowed(new, old)
        elif isinstance(new, jax.Array):
            narrow[field.name] = new.astype(old.dtype)
    return dataclasses.replace(changed, **narrow)  # type: ignore[type-var]


def save_deltas(file: Path, deltas: Deltas) -> None:
    """Write trained changes, whole or not at all."""
    arrays = {name: jax.device_get(leaf) for name, leaf in named_leaves(deltas).items()}
    replace_file(file, lambda partial: save_file(arrays, partial))


def load_deltas(file: Path, source: LayerSource, config: DeltaConfig) -> Deltas:
    """What `save_deltas` wrote for a student."""
    shapes: Deltas = {}
    for index in range(len(source)):
        for group, part in trained_shapes(source.layer(index), config).items():
            shapes.setdefault(group, {})[str(index)] = part
    stored = load_file(file)
    leaves = [jnp.asarray(stored[name]) for name in named_leaves(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def write_recovered(
    student: Student,
    model: LayerSource,
    form: ExportFormat,
    target: Path,
    recovery: Recovery,
    steps: Steps,
) -> None:
    """Write one export of a trained student, rounded as `form` has it, with its card."""
    base, plan = student.base, student.plan
    target.parent.mkdir(parents=True, exist_ok=True)
    with steps.bar(f"export {form.name}") as on_step:
        export_of(base.about, plan, form).write(
            model,
            target,
            mtp=mtp_source(base),
            extra_files=card_files(
                base, plan, form, quantizer="rtn", repair=student.repair, recovery=recovery
            ),
            on_layer=lambda index: on_step(index + 1, len(base)),
        )
