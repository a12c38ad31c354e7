"""What takes how much space, known from shapes before anything is written."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint
from convert.export import ExportFormat, export_bytes
from convert.rules import Widths, expected_tensors
from pruning.plan import PruningPlan
from pruning.recipe import CompressionRecipe
from pruning.statistics import field_shapes


def kept_widths(plan: PruningPlan, base: Checkpoint) -> Widths:
    """Channels kept per layer and expert of the whole model, () for dense layers."""
    return expert_widths(plan.counts, plan.layer_indices, base)


def expert_widths(counts: np.ndarray, indices: Sequence[int], base: Checkpoint) -> Widths:
    """Widths of the whole model from counts [L, E] of the layers with experts."""
    rows = dict(zip(indices, counts.tolist(), strict=True))
    return tuple(tuple(rows.get(index, ())) for index in range(len(base)))


def form_of(recipe: CompressionRecipe, name: str) -> ExportFormat:
    """The export format of this name under a resolved recipe."""
    return ExportFormat(name, recipe.group_size or 32)


def export_sizes(base: Checkpoint, plan: PruningPlan, recipe: CompressionRecipe) -> dict[str, dict]:
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
    """Bytes of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def parameter_count(base: Checkpoint) -> int:
    """Weights of a checkpoint, from shapes alone."""
    shapes = expected_tensors(base.family, base.config, base.widths).values()
    return sum(map(math.prod, shapes))


def statistics_bytes(base: Checkpoint, recipe: CompressionRecipe) -> int:
    """Bytes of the statistics that a recipe collects of a model."""
    c = base.config
    sizes = (len(c.moe_layers), c.moe.num_experts, c.moe.d_expert, c.d_model)
    return 8 * sum(map(math.prod, field_shapes(*sizes, recipe.groups).values()))


def mean_width(base: Checkpoint, recipe: CompressionRecipe, rounding=math.ceil) -> int:
    """Channels per expert if all keep the same share of the budget, in whole blocks."""
    d_expert, block = base.config.moe.d_expert, recipe.block or 1
    # Under a target the plan may keep anything up to the whole model.
    mean = (1 - (recipe.prune_rate or 0.0)) * d_expert
    return max(block, block * rounding(round(mean / block, 9)))


def equal_bytes(base: Checkpoint, recipe: CompressionRecipe, name: str, width: int) -> int:
    """Bytes of an export whose experts all have this width."""
    widths = tuple(tuple(width for _ in counts) for counts in base.widths)
    return export_bytes(base, widths, form_of(recipe, name))


def most_bytes(base: Checkpoint, recipe: CompressionRecipe, name: str) -> int:
    """Upper bound of an export over all plans of a resolved recipe.

    Bytes grow in proportion to whole blocks of channels, wherever they are, so a ragged export is
    bounded by equal experts; a padded one of free widths by one expert that keeps everything.
    """
    free = name.startswith("padded") and recipe.width != "uniform"
    width = base.config.moe.d_expert if free else mean_width(base, recipe)
    return equal_bytes(base, recipe, name, width)
