"""What an export may take at least and at most, before there is a plan."""

import math

import numpy as np

from convert.description import Description
from convert.export import Export
from convert.export_format import MIXED, ExportFormat
from convert.families import find_family
from pruning.recipe.recipe import ResolvedRecipe
from pruning.stages.sizes import expert_widths, form_of


def mean_width(base: Description, recipe: ResolvedRecipe, rounding=math.ceil) -> int:
    """Channels per expert if all keep the same share of the budget, in whole blocks."""
    d_expert, block = base.config.moe.d_expert, recipe.block
    # Under a target the plan may keep anything up to the whole model.
    mean = (1 - (recipe.prune_rate or 0.0)) * d_expert
    if recipe.width == "experts":  # as many whole ones as come nearest
        experts = len(base.config.moe_layers) * base.config.moe.num_experts
        mean = round(mean * experts / d_expert) * d_expert / experts
    return max(block, block * rounding(round(mean / block, 9)))


def equal_export(base: Description, form: ExportFormat, width: int) -> Export:
    """The export whose experts all have this width."""
    return Export(base, tuple(tuple(width for _ in counts) for counts in base.widths), form)


def most_bytes(base: Description, recipe: ResolvedRecipe, name: str) -> int:
    """Upper bound of an export over all plans of a resolved recipe.

    Bytes of tensors grow in proportion to whole blocks of channels, wherever they are, so an export
    that pads nothing is bounded by equal experts; one that does by experts that keep everything,
    one for each width of the folder. Headers are longest in the dense model, whose numbers have
    most digits.
    """
    form, widest = form_of(recipe, name), base.config.moe.d_expert
    width = widest if pads(recipe, form) else mean_width(base, recipe)
    if form.is_padded:
        block = recipe.block
        width = max(range(block, width + 1, block), key=lambda w: (_stored_channels(base, w), w))
    most = equal_export(base, form, width).tensor_bytes
    most += _header_bytes(equal_export(base, form, widest))
    if form.constants:  # of all experts that may be emptied, with their names in header and index
        moe = base.config.moe
        emptied = len(base.config.moe_layers) * (moe.num_experts - moe.experts_per_token)
        most += emptied * (2 * base.config.d_model + 256)
    if recipe.target_bytes is not None and name == recipe.export[0]:
        return recipe.target_bytes if name == MIXED else min(most, recipe.target_bytes)
    return most


def pads(recipe: ResolvedRecipe, form: ExportFormat) -> bool:
    """Whether some plan of a resolved recipe has widths that a format fills up."""
    if form.is_ragged:
        return False
    return recipe.width not in (("uniform", "layer") if form.is_layered else ("uniform",))


def keeps_even_experts(recipe: ResolvedRecipe) -> bool:
    """Whether plans of a recipe keep whole experts, as many in every layer if that divides."""
    return recipe.width == "experts" and recipe.per_layer


def byte_range(
    base: Description, recipe: ResolvedRecipe, name: str, channels: int
) -> tuple[int, int]:
    """Fewest and most bytes of an export over all plans that keep so many channels.

    The tensors of a ragged folder take the same space wherever the channels are, but an emptied
    expert has no tensors and so no header entries: what varies is in how many experts they sit.
    In a padded folder it is how wide the widest expert is, in a layered one that of each layer;
    where experts are numbered anew, all of them are whole.

    Args:
      base: the dense model.
      recipe: a resolved one.
      name: the format.
      channels: routed-expert channels kept, of all layers.
    """
    form, c, block = form_of(recipe, name), base.config, recipe.block
    layers, experts, widest = len(c.moe_layers), c.moe.num_experts, c.moe.d_expert
    if form.renumbers:
        left = np.arange(experts) < -(-channels // (layers * widest))
        counts = np.tile(widest * left, (layers, 1))
        exactly = Export(base, expert_widths(counts, c.moe_layers, base), form).nbytes
        return exactly, exactly
    if form.is_layered:
        # The sum of the layers' widths: least if all experts of a layer keep as many channels.
        least = max(-(-channels // (experts * block)), layers) * block
        greatest = min(layers * widest, channels) if pads(recipe, form) else least
        return (
            _uneven_bytes(base, form, least, layers, block=block, digits=block),
            _uneven_bytes(base, form, max(least, greatest), layers, block=block, digits=widest),
        )
    if form.is_padded:
        narrowest = -(-channels // (layers * experts * block)) * block
        highest = narrowest if recipe.width == "uniform" else widest
        stored = sorted(
            range(narrowest, highest + 1, block), key=lambda w: (_stored_channels(base, w), w)
        )
        fewest, most = (equal_export(base, form, width).nbytes for width in (stored[0], stored[-1]))
        return fewest, most
    equal = recipe.width in ("uniform", "layer")
    needed = max(-(-channels // widest), layers * c.moe.experts_per_token)
    opened = min(layers * experts, channels // block)
    found = [  # constants of emptied experts may take more space than the entries of others
        _uneven_bytes(base, form, channels, number, block=block, digits=digits)
        for number in ((opened,) if equal else (needed, opened))
        for digits in (block, widest)
    ]
    return min(found), max(found)


def _uneven_bytes(
    base: Description, form: ExportFormat, channels: int, opened: int, *, block: int, digits: int
) -> int:
    """Bytes of so many channels in so many experts, or layers, whose experts then are all as wide.

    Header entries are as long as at a width of `digits`.
    """
    c = base.config
    shape = (len(c.moe_layers), 1 if form.is_layered else c.moe.num_experts)
    place, room = np.arange(math.prod(shape)), c.moe.d_expert - block
    more = np.clip(channels - opened * block - place * room, 0, room)
    all_experts = (shape[0], c.moe.num_experts)
    crowded, entries = (
        np.broadcast_to(np.where(place < opened, counts, 0).reshape(shape), all_experts)
        for counts in (block + more, digits)
    )
    tensors, headers = (
        Export(base, expert_widths(counts, c.moe_layers, base), form)
        for counts in (crowded, entries)
    )
    return tensors.tensor_bytes + _header_bytes(headers)


def _stored_channels(base: Description, width: int) -> int:
    """Channels of a layer in a padded folder of this width, those of shared experts included.

    Shared experts that are padded to a whole number of widths can be larger at a smaller width.
    """
    moe = base.config.moe
    twin = base.family.twin
    written = base.family if twin is None else find_family(twin.model_type)
    if written.shared_count_key is None:
        return moe.num_experts * width
    return (moe.num_experts - (-moe.d_shared // width)) * width


def _header_bytes(export: Export) -> int:
    return export.nbytes - export.tensor_bytes
