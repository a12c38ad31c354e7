"""The export stage: the pruned model as a source of layers, and its folders."""

import functools
from collections.abc import Callable
from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.export_format import ExportFormat
from convert.mtp_export import MtpSource
from convert.native import with_native_codes
from convert.native_float8 import with_native_blocks
from convert.view import OnRounded
from moe_jax.groups import own_experts
from moe_jax.spread import ALONE, Spread
from moe_jax.stream import LayerSource, mapped
from moe_jax.transformer import DecoderLayer
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe
from pruning.report.phrases import second_rounding
from pruning.scores.noise import worthiest_on_noise
from pruning.shrink.gptq_model import with_codes
from pruning.shrink.rounding import QuantizedSource, RoundingError, compared
from pruning.stages.card import card_files
from pruning.stages.repair import repaired_source
from pruning.stages.sizes import export_of


def pruned_source(
    base: Checkpoint,
    plan: PruningPlan,
    form: ExportFormat | None,
    codes: Path | None = None,
    on_rounded: OnRounded | None = None,
    repair: Path | None = None,
) -> LayerSource:
    """The pruned model, with weights in few bits if the format has them.

    They are those in the folder `codes`; or else the model's own, if it stores them alike; or else
    rounded to nearest.

    Args:
      base: the dense model.
      plan: what is kept of it.
      form: of the export, None for the model before rounding.
      codes: as of `codes_folder`.
      on_rounded: told of every weight that is rounded, before and after.
      repair: folder of repaired weights, which are what is rounded.
    """
    plan.require_model(base.fingerprint)
    pruned = repaired_source(base, plan, repair)
    if form is None or not form.is_packed:
        return pruned
    if codes is None and export_of(base.about, plan, form).native is not None:
        own = with_native_blocks if form.is_float8 else with_native_codes
        return _with_own_codes(base, pruned, plan, own, on_rounded)
    if codes is not None and form.is_int4:
        rounding = functools.partial(with_codes, folder=codes, group_size=form.group_size)
    else:
        each = [form.of_layer(index).storage for index in range(len(base))]
        rounding = functools.partial(QuantizedSource, group_size=form.group_size, storage=each)
    return rounding(pruned) if on_rounded is None else compared(pruned, rounding, on_rounded)


def _with_own_codes(
    base: Checkpoint,
    pruned: LayerSource,
    plan: PruningPlan,
    own: Callable[..., DecoderLayer],
    on_rounded: OnRounded | None,
) -> LayerSource:
    kept = dict(zip(plan.layer_indices, plan.keep, strict=True))

    def change(index: int, layer: DecoderLayer) -> DecoderLayer:
        keep = kept.get(index)
        if keep is not None:
            keep = keep[own_experts(layer)]
        return own(base, index, layer, keep, on_rounded)

    return mapped(pruned, change, by_group=True)


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
    repair: Path | None = None,
    overwrite: bool = False,
    spread: Spread = ALONE,
) -> Path:
    """Write one export of a plan with its model card; `codes`, `repair` as for `pruned_source`.

    Processes share the layers, and leave to the byte what one leaves. Says there, and to `steps`,
    whether weights that the model stores in few bits were rounded a second time, and what that did
    to them.
    """
    plan.require_model(base.fingerprint)
    again = RoundingError() if base.about.quantization and form.is_packed else None
    source = pruned_source(base, plan, form, codes, again, repair)
    quantizer = "gptq" if codes else "rtn"
    own = spread.in_a_row(len(base))
    with steps.bar(f"export {form.name}") as on_step:
        folder = export_of(base.about, plan, form).write(
            source,
            target,
            mtp=mtp_source(base),
            extra_files=card_files(
                base, plan, form, quantizer=quantizer, again=again, repair=repair
            ),
            overwrite=overwrite,
            on_layer=lambda index: on_step(index + 1 - own.start, len(own)),
            on_written=None if again is None else lambda: again.share(spread),
            spread=spread,
        )
    if again is not None:
        steps.say(f"{form.name}: {second_rounding(again.relative)}")
    return folder


def mtp_source(base: Checkpoint) -> MtpSource:
    """Layers that predict further tokens; no text reaches them, so noise prunes them."""
    return MtpSource(base.read_mtp, worthiest_on_noise)
