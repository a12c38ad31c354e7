"""What takes how much space, known from shapes before anything is written."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from convert.assemble import pool_shape
from convert.description import Description
from convert.export import Export
from convert.export_format import MIXED, ExportFormat, Widths
from convert.families import find_family
from convert.layout import nbytes
from convert.rules import EMBEDDING
from pruning.budget.plan import PruningPlan
from pruning.recipe.recipe import CompressionRecipe, ResolvedRecipe
from pruning.scores.statistics import ChannelStatistics
from pruning.shrink.gptq_model import progress_bytes

SAMPLE_BYTES = 4 << 30  # larger models are not read once per generated token


def kept_widths(plan: PruningPlan, base: Description) -> Widths:
    """Channels kept per layer and expert of the whole model, () for dense layers."""
    return expert_widths(plan.counts, plan.layer_indices, base)


def expert_widths(counts: np.ndarray, indices: Sequence[int], base: Description) -> Widths:
    """Widths of the whole model from counts [L, E] of the layers with experts."""
    rows = dict(zip(indices, counts.tolist(), strict=True))
    return tuple(tuple(rows.get(index, ())) for index in range(len(base)))


def form_of(recipe: CompressionRecipe, name: str, plan: PruningPlan | None = None) -> ExportFormat:
    """The export format of this name under a resolved recipe and, once there is one, its plan."""
    constants = recipe.emptied == "mean" if plan is None else plan.constants is not None
    group = recipe.group_size or 32
    bits = plan.layer_bits if name == MIXED and plan is not None else ()
    routed = recipe if plan is None else plan
    # What is merged has no codes of the model's.
    rounds = recipe.requantize or (plan is not None and bool(plan.merged))
    return ExportFormat(
        name, group, constants, recipe.mtp, rounds, routed.cut_router, routed.top_k, bits
    )


def foreseen_form(recipe: CompressionRecipe, name: str, base: Description) -> ExportFormat:
    """The same before there is a plan; bits that it is to choose for each layer count as 4."""
    form = form_of(recipe, name)
    if name != MIXED or recipe.bits != "auto":
        return form
    return dataclasses.replace(form, layer_bits=(4,) * len(base))


def _is_float32(base: Description) -> bool:
    return "float32" in (base.hf_config.get("dtype"), base.hf_config.get("torch_dtype"))


def export_of(base: Description, plan: PruningPlan, form: ExportFormat) -> Export:
    """What the folder of a plan holds in this format."""
    return Export(base, kept_widths(plan, base), form)


def export_sizes(
    base: Description, plan: PruningPlan, recipe: CompressionRecipe
) -> dict[str, dict]:
    """Bytes and parameters of each requested export, and bytes of its padded twin if it has one,
    before it is made."""
    found = {}
    for name in recipe.export:
        export = export_of(base, plan, form_of(recipe, name, plan))
        found[name] = {
            "bytes": export.nbytes,
            "parameters": export.parameters,
            "padded_bytes": _padded(export),
        }
    return found


def _padded(export: Export) -> int | None:
    """Bytes of a folder's padded twin; none of layers with bits of their own, which has none."""
    if export.form.name == MIXED:
        return None
    return dataclasses.replace(export, form=export.form.like(layout="padded")).nbytes


def folder_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weight files and their index."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors*"))


def dense_bytes(base: Description) -> int:
    """Bytes of a dense model's weights as they lie there; of a config.json alone, in 16 bits, or in
    32 if it says so."""
    if any(base.folder.glob("*.safetensors")):
        return folder_bytes(base.folder)
    whole = Export(base, base.widths, ExportFormat("padded-bf16", mtp="keep"))
    return whole.nbytes + _is_float32(base) * whole.tensor_bytes


def sample_memory(base: Description, export: Export) -> int:
    """Bytes that the larger of the whole dense model and a whole export takes, and writing with it.

    Weights in few bits come as float32, all layers have as many rows of experts as the one that
    keeps most, a layer is held twice on its way, and the head is widened to float32 for every
    token. 0 for a dense model above `SAMPLE_BYTES`, which writes no sample.
    """
    c, weights = base.config, base.weights()
    if 2 * weights > SAMPLE_BYTES:
        return 0
    wide = base.hf_config.get("quantization_config") or _is_float32(base)
    held = sum(
        math.prod(one.shape) * (4 if one.packed else one.dtype.itemsize)
        for one in export.tensors.values()
    )
    widths = export.form.stored_widths(export.widths)
    most = pool_shape(c, widths).rows
    spare = sum(most - sum(widths[index]) for index in c.moe_layers)
    held += (4 if export.form.is_packed else 2) * 3 * spare * c.d_model
    larger = max((4 if wide else 2) * weights, held)
    return larger + larger // len(base) + 4 * c.vocab_size * c.d_model


def token_shares(base: Description, statistics: ChannelStatistics) -> np.ndarray:  # [L, E]
    """Share of the calibration text's tokens that go to each expert; without text the mean."""
    moe, total = base.config.moe, statistics.total_tokens
    even = np.full(statistics.tokens.shape, moe.experts_per_token / moe.num_experts)
    return statistics.tokens / total if total else even


def shares_among_kept(plan: PruningPlan, experts_per_token: int) -> np.ndarray:  # [L, E]
    """Share of tokens at each expert when all go to so many of those that are left, the others
    being gone for the router; which of them they are is not known before, and does not matter where
    they are of one width."""
    left = plan.counts > 0
    return left * (experts_per_token / left.sum(axis=1, keepdims=True))


def active_parameters(base: Description, counts: np.ndarray, shares: np.ndarray) -> int:
    """Weights that a token meets on average.

    Left out: its row of the embedding, padding, constants in the place of emptied experts, and
    layers that predict further tokens.

    Args:
      base: the dense model.
      counts: int [L, E], channels kept.
      shares: [L, E], of the tokens that go to each expert, such as `token_shares`.
    """
    c = base.config
    empty = tuple(tuple(0 for _ in counts) for counts in base.widths)
    without, channels = base.weights(empty), sum(map(sum, base.widths))
    per_channel = (base.weights() - without) // channels
    # Of an expert's biases that of the output is no channel's.
    per_expert = c.d_model if c.moe.expert_bias else 0
    looked_up = 0 if c.tie_embeddings else c.vocab_size * c.d_model
    always = without - looked_up - per_expert * counts.size
    return always + round(float((shares * (per_channel * counts + per_expert)).sum()))


def active_bytes(export: Export, shares: np.ndarray) -> int:
    """Bytes of weights as an export holds them that a token meets on average.

    Its row of the embedding and layers that predict further tokens are left out, filling up to a
    common width is not.

    Args:
      export: of a plan.
      shares: [L, E], as of `active_parameters`.
    """
    form, experts, others = export.form, 0, 0
    for name, stored in export.tensors.items():
        size = sum(map(nbytes, stored.specs(name, form).values()))
        if stored.of_expert:
            experts += size
        elif name != EMBEDDING or export.base.config.tie_embeddings:
            others += size
    widths = np.array([row for row in form.stored_widths(export.widths) if row])  # [L, E]
    if form.cut_router:
        widths *= np.array([row for row in export.widths if row]) > 0
    return others + round(float((shares * widths).sum()) * experts / max(int(widths.sum()), 1))


def gptq_bytes(
    base: Description, recipe: CompressionRecipe, windows: int, exports: Mapping[str, int]
) -> int:
    """Most bytes of the folder in which GPTQ chooses codes, while at work; 0 if it does not.

    Args:
      base: the dense model.
      recipe: a resolved one, or one stored by a run.
      windows: of calibration text.
      exports: bytes of each export.
    """
    packed = [size for name, size in exports.items() if form_of(recipe, name).is_int4]
    if recipe.quantizer != "gptq" or not packed:
        return 0
    text = windows, recipe.window or 2048
    # An export has the same codes and scales, and more.
    return min(packed) + progress_bytes(base.config, text, recipe.batch, recipe.dtype)


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
