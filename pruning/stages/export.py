"""The export stage: the pruned model as a source of layers, and its folders."""

from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.export_format import ExportFormat
from convert.mtp_export import MtpSource
from moe_jax.stream import LayerSource
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe
from pruning.scores.noise import worthiest_on_noise
from pruning.shrink.gptq_model import with_codes
from pruning.shrink.prune import PrunedSource
from pruning.shrink.rounding import QuantizedSource
from pruning.stages.card import card_files
from pruning.stages.sizes import export_of


def pruned_source(
    base: Checkpoint, plan: PruningPlan, form: ExportFormat | None, codes: Path | None = None
) -> LayerSource:
    """The pruned model, with 4-bit weights if the format has them: those in the folder `codes`,
    or rounded to nearest without one."""
    plan.require_model(base.fingerprint)
    pruned = PrunedSource(base, plan)
    if form is None or not form.is_packed:
        return pruned
    if codes is not None and not form.is_float4:
        return with_codes(pruned, codes, form.group_size)
    return QuantizedSource(pruned, form.group_size, float4=form.is_float4)


def codes_folder(recipe: CompressionRecipe) -> Path | None:
    """Where a recipe's 4-bit codes lie; None if weights are rounded to nearest on the fly."""
    return Path(recipe.output) / "gptq" if recipe.quantizer == "gptq" else None


def export(
    base: Checkpoint,
    plan: PruningPlan,
    form: ExportFormat,
    target: Path,
    steps: Steps,
    *,
    codes: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one export of a plan with its model card; `codes` as for `pruned_source`."""
    plan.require_model(base.fingerprint)
    source = pruned_source(base, plan, form, codes)
    target.parent.mkdir(parents=True, exist_ok=True)
    with steps.bar(f"export {form.name}") as on_step:
        return export_of(base.about, plan, form).write(
            source,
            target,
            mtp=mtp_source(base),
            extra_files=card_files(base, plan, form, quantizer="gptq" if codes else "rtn"),
            overwrite=overwrite,
            on_layer=lambda index: on_step(index + 1, len(base)),
        )


def mtp_source(base: Checkpoint) -> MtpSource:
    """Layers that predict further tokens; no text reaches them, so noise prunes them."""
    return MtpSource(base.read_mtp, worthiest_on_noise)
