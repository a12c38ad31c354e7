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
from convert.layout import nbytes
from convert.rules import EMBEDDING
from pruning.budget.plan import PruningPlan
from pruning.recipe.recipe import CompressionRecipe
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
