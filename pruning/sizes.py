"""What takes how much space, known from shapes before anything is written."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convert.description import Description
from convert.export import ExportFormat, export_bytes, export_specs
from convert.rules import Widths, expected_tensors
from pruning.plan import PruningPlan
from pruning.recipe import CompressionRecipe
from pruning.statistics import field_shapes


def kept_widths(plan: PruningPlan, base: Description) -> Widths:
    """Channels kept per layer and expert of the whole model, () for dense layers."""
    return expert_widths(plan.counts, plan.layer_indices, base)


def expert_widths(counts: np.ndarray, indices: Sequence[int], base: Description) -> Widths:
    """Widths of the whole model from counts [L, E] of the layers with experts."""
    rows = dict(zip(indices, counts.tolist(), strict=True))
    return tuple(tuple(rows.get(index, ())) for index in range(len(base)))


def form_of(recipe: CompressionRecipe, name: str) -> ExportFormat:
    """The export format of this name under a resolved recipe."""
    return ExportFormat(name, recipe.group_size or 32)


def export_sizes(
    base: Description, plan: PruningPlan, recipe: CompressionRecipe
) -> dict[str, dict]:
    """Bytes and parameters of each requested export, and of its padded twin, before it is made."""
    widths = kept_widths(plan, base)
    dense = sum(row.size for row in plan.keep)
    kept = int(plan.counts.sum())
    parameters = parameter_count(base) - (dense - kept) * 3 * base.config.d_model
    found = {}
    for name in recipe.export:
        form = form_of(recipe, name)
        twin = ExportFormat(name.replace("ragged", "padded"), form.group_size)
        found[name] = {
            "bytes": export_bytes(base, widths, form),
            "parameters": parameters,
            "padded_bytes": export_bytes(base, widths, twin),
        }
    return found


def folder_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weight files and their index."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors*"))


def parameter_count(base: Description) -> int:
    """Weights of a checkpoint, from shapes alone."""
    shapes = expected_tensors(base.family, base.config, base.widths).values()
    return sum(map(math.prod, shapes))


def statistics_bytes(base: Description, recipe: CompressionRecipe) -> int:
    """Bytes of the statistics that a recipe collects of a model."""
    c = base.config
    sizes = (len(c.moe_layers), c.moe.num_experts, c.moe.d_expert, c.d_model)
    return 8 * sum(map(math.prod, field_shapes(*sizes, recipe.groups).values()))


def mean_width(base: Description, recipe: CompressionRecipe, rounding=math.ceil) -> int:
    """Channels per expert if all keep the same share of the budget, in whole blocks."""
    d_expert, block = base.config.moe.d_expert, recipe.block or 1
    # Under a target the plan may keep anything up to the whole model.
    mean = (1 - (recipe.prune_rate or 0.0)) * d_expert
    return max(block, block * rounding(round(mean / block, 9)))


def equal_bytes(base: Description, recipe: CompressionRecipe, name: str, width: int) -> int:
    """Bytes of an export whose experts all have this width."""
    return export_bytes(base, _equal_widths(base, width), form_of(recipe, name))


def _equal_widths(base: Description, width: int) -> Widths:
    return tuple(tuple(width for _ in counts) for counts in base.widths)


def most_bytes(base: Description, recipe: CompressionRecipe, name: str) -> int:
    """Upper bound of an export over all plans of a resolved recipe.

    Bytes of tensors grow in proportion to whole blocks of channels, wherever they are, so a ragged
    export is bounded by equal experts; a padded one of free widths by one expert that keeps
    everything. Headers are longest in the dense model, whose numbers have most digits.
    """
    free = name.startswith("padded") and recipe.width != "uniform"
    width = base.config.moe.d_expert if free else mean_width(base, recipe)
    if name.startswith("padded"):
        width = _costliest_width(base, recipe.block or 1, width)
    return _tensor_bytes(base, recipe, name, width) + _longest_headers(base, recipe, name)


def _costliest_width(base: Description, block: int, most: int) -> int:
    """The padded width up to `most` that stores most channels, those of shared experts included.

    Shared experts that are padded to a whole number of widths can be larger at a smaller width.
    """
    if base.family.twin is not None or base.family.shared_count_key is None:
        return most
    moe = base.config.moe
    channels = {w: (moe.num_experts - (-moe.d_shared // w)) * w for w in range(block, most, block)}
    channels[most] = (moe.num_experts - (-moe.d_shared // most)) * most
    return max(channels, key=channels.__getitem__)


def _tensor_bytes(base: Description, recipe: CompressionRecipe, name: str, width: int) -> int:
    specs = export_specs(base, _equal_widths(base, width), form_of(recipe, name)).values()
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in specs)


def _longest_headers(base: Description, recipe: CompressionRecipe, name: str) -> int:
    width = base.config.moe.d_expert
    return equal_bytes(base, recipe, name, width) - _tensor_bytes(base, recipe, name, width)
