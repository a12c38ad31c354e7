"""How much memory each stage of a compression takes, from shapes alone."""

import math

import numpy as np

from convert.description import Description
from convert.rules import ruled_tensors
from moe_jax.config import ModelConfig
from moe_jax.experts.dispatch import padded_rows
from pruning.budget.candidates import CANDIDATES
from pruning.budget.plan import PruningPlan
from pruning.measure.quality import POSITIONS
from pruning.recipe.recipe import ResolvedRecipe
from pruning.runs.probe import kept_out_tokens
from pruning.scores import elimination
from pruning.scores.end_to_end import ig_chunk
from pruning.scores.grams import sample_size
from pruning.scores.noise import ROWS_PER_EXPERT
from pruning.scores.parts import rows_of_parts, windows_at_work
from pruning.scores.states import (
    MEMORY_STATES,
    layer_slots,
    projection_bytes,
    projection_room,
)
from pruning.shrink.gptq import MOMENT_BYTES
from pruning.stages.client import client_bytes
from pruning.stages.preflight import rehearsed_plan
from pruning.stages.probe_windows import compared, probe_shapes
from pruning.stages.rule_losses import SHARE, STATE_BYTES, is_repaired
from pruning.stages.scoring_sizes import statistics_bytes
from pruning.stages.sizes import equal_export, export_of, form_of, sample_memory

PROCESS_BYTES = 600 << 20  # Python, jax, its compiler and the programs of a stage
LATE_BYTES = 300 << 20  # programs of all stages before the last ones, which stay
SAMPLE_PROGRAMS = 200 << 20  # that write on: of two models, for a prompt and for one more token
LOGITS_HELD = 5  # of a probe: two programs', their difference, its size, and who is asked
LOSS_LOGITS, COMPARED_LOGITS = 3, 4  # copies that XLA holds of a loss, and of two models'
LAYERS_HELD = 2.1  # the one at work and the one being read ahead, tests/convert/test_memory.py


def memory(base: Description, recipe: ResolvedRecipe) -> dict[str, int]:
    """Peak bytes of the host in each stage of `compress`; estimates, 0 for one that is not run.

    Exporting holds two layers and a float32 copy of one, as does evaluating what is pruned on the
    fly. Verifying does that again, and then holds two layers of the export as float32, as
    evaluating does where weights have 4 bits, beside what the probe gives. A sample is
    written by whole models, where they are small enough. "transformers" is what the process takes
    that is asked about an export, if so much is free; all others are the process of `compress`.
    """
    c = base.config
    outer = (1 if c.tie_embeddings else 2) * c.vocab_size * c.d_model
    layer, item = _largest_layer(base), 2 if recipe.dtype == "bfloat16" else 4
    plan, forms = rehearsed_plan(recipe, base), [form_of(recipe, name) for name in recipe.export]
    exports = [export_of(base, plan, form) for form in forms]
    packed = any(form.is_packed for form in forms)
    fixed = PROCESS_BYTES + 2 * outer
    held = {item: int(LAYERS_HELD * item * layer) for item in (2, 4)}
    late, pruned = fixed + LATE_BYTES, held[2] + 4 * layer
    gptq = packed and recipe.quantizer == "gptq"
    repairs = recipe.repair != "none"
    moments = 2 * MOMENT_BYTES + recipe.max_tokens * c.d_model * item
    layers = max(pruned, packed * held[4])
    # A plan of unequal layers may leave one whole, whose rows all others then have.
    whole = [equal_export(base, form, c.moe.d_expert) for form in forms]
    written = exports if recipe.width == "uniform" else whole
    sample = max(sample_memory(base, one) for one in written)
    shapes = probe_shapes(c)
    # Of the probe: logits, the hidden states of all windows, and what the experts make of one.
    probe = LOGITS_HELD * compared(shapes) * c.vocab_size
    probe += sum(shape.windows * shape.length for shape in shapes) * c.d_model
    row = c.moe.experts_per_token * 4 * (c.moe.d_expert + c.d_model)
    probe += max(shape.length for shape in shapes) * row
    return {
        "scoring": _scoring(base, recipe, fixed, layer),
        "choice": _choice(base, recipe, fixed, layer),
        "repair": late + pruned + _repair(base, recipe, plan, layer) if repairs else 0,
        "gptq": fixed + pruned + moments if gptq else 0,
        "export": fixed + pruned,
        "verify": late + max(pruned, 4 * outer + held[4]) + 4 * probe,
        "transformers": max(client_bytes(one, shapes) for one in exports),
        "evaluation": late + 2 * outer + _evaluation(c, recipe, layers),
        "sample": late + SAMPLE_PROGRAMS + sample if sample else 0,
    }


def _logits(config: ModelConfig, copies: int) -> int:
    """The head widened to float32, and copies of the logits of as many tokens as are at work."""
    return 4 * config.vocab_size * (config.d_model + copies * POSITIONS)


def _evaluation(config: ModelConfig, recipe: ResolvedRecipe, layers: int) -> int:
    """The states of all texts thrice, and the layers with a batch at work or, once these are gone,
    the logits of two models."""
    texts = (len(recipe.evaluation) or 1) * recipe.evaluation_tokens
    work = _rows_at_work(config, recipe, texts) * 3 * config.moe.d_expert * 4
    states = 3 * texts * config.d_model * 4
    return states + max(layers + work, _logits(config, COMPARED_LOGITS))


def _repair(base: Description, recipe: ResolvedRecipe, plan: PruningPlan, layer: int) -> int:
    """The states of two models, inputs and lacks of the experts and one of them on its way to the
    device, where each copy of a token goes, three candidates of a layer, and the Grams of its
    experts with their eigenvectors."""
    item = 2 if recipe.dtype == "bfloat16" else 4
    states = recipe.max_tokens * base.config.d_model * (3 * item + 3 * 4)
    states += recipe.max_tokens * base.config.moe.experts_per_token * (3 * 4 + 2 * 8)
    grams = 5 * 8 * int(np.square(plan.counts).sum(axis=1).max())
    return states + 3 * 2 * layer + grams


def _largest_layer(base: Description) -> int:
    """Weights of the layer that has most."""
    layers = [0] * base.config.num_layers
    for name, shape, rule in ruled_tensors(base.family, base.config, base.widths):
        if rule is not None:
            layers[int(name.split(".")[2])] += math.prod(shape)
    return max(layers)


def _choice(base: Description, recipe: ResolvedRecipe, fixed: int, layer: int) -> int:
    """Two layers, the hidden states of plans that share a reading twice, a batch at work, the
    down-projections of a layer without what is masked, what a sample of the text takes where kept
    channels take over, and the logits, whose turn comes when the heap still holds that; 0 if no
    rule is measured."""
    c, item = base.config, 2 if recipe.dtype == "bfloat16" else 4
    tokens = kept_out_tokens(recipe)
    if not tokens:
        return 0
    states = tokens * c.d_model * item
    together = max(1, min(1 + len(CANDIDATES), STATE_BYTES // states))
    work = _rows_at_work(c, recipe, tokens) * (3 * c.moe.d_expert + 3 * c.d_model) * 4
    work += c.moe.num_experts * c.moe.d_expert * c.d_model * item
    work += _logits(c, LOSS_LOGITS)
    if is_repaired(recipe):
        pool = c.moe.num_experts * c.moe.d_expert * c.d_model
        work += _sample(base, recipe, SHARE) + pool * (2 * 4 + item)
    return int(fixed + LAYERS_HELD * 2 * layer + 2 * together * states + work)


def _rows_at_work(config: ModelConfig, recipe: ResolvedRecipe, tokens: int) -> int:
    """Copies of a batch's tokens, one for each of their experts."""
    return min(recipe.batch * recipe.window, tokens) * config.moe.experts_per_token


def _sample(base: Description, recipe: ResolvedRecipe, share: float) -> int:
    """The hidden states of a sample of the text, its rows at work, and the Grams of a layer's
    experts on the device, on the host and of one of them in float64."""
    c, item = base.config, 2 if recipe.dtype == "bfloat16" else 4
    windows = math.ceil(recipe.max_tokens / recipe.window)
    count, size = sample_size(windows, recipe.window, share)
    rows = min(count, recipe.batch) * size * c.moe.experts_per_token
    work = rows * (4 * c.moe.d_expert + 4 * c.d_model) * 4
    grams = (2 * 4 * c.moe.num_experts + 4 * 8) * c.moe.d_expert**2
    return count * size * c.d_model * item + work + grams


def _scoring(base: Description, recipe: ResolvedRecipe, fixed: int, layer: int) -> int:
    """Two layers, half of one in float32, for XLA widens a matrix of all experts at a time, the
    hidden states that a sweep holds, the rows at work and a layer's sums of all parts; or, once the
    text is through, the sums of all layers: of the text, of a part, of two halves and of what
    becomes of them, and a plan's scores."""
    c, sums = base.config, statistics_bytes(base, recipe)
    windows = 0 if recipe.weights_only else math.ceil(recipe.max_tokens / recipe.window)
    parts = rows_of_parts(windows, recipe.until_stable is not None)
    batch, padded = windows_at_work(parts, recipe.batch)
    step = batch * recipe.window
    rows = step * c.moe.experts_per_token
    if recipe.weights_only:
        rows = padded_rows(c.moe.num_experts * ROWS_PER_EXPERT, c.moe.num_experts)
    work = rows * (4 * c.moe.d_expert + 4 * c.d_model) * 4
    work += max(1, len(parts)) * sums // len(c.moe_layers)
    held = _held_states(base, recipe, windows, padded // batch, step)
    return int(fixed + max((LAYERS_HELD + 1) * 2 * layer + held + work, 6 * sums))


def _held_states(
    base: Description, recipe: ResolvedRecipe, windows: int, batches: int, step: int
) -> int:
    """Most bytes that a sweep over the text keeps in memory between its layers.

    That of the statistics has its states in a file and keeps projections alone, that of obs has a
    sample. Others hold the text once or twice, and the states of a way down if they are not too
    large.
    """
    c, item = base.config, 2 if recipe.dtype == "bfloat16" else 4
    text = windows * recipe.window * c.d_model * item
    found = [2 * text * recipe.nll_ablate]
    if recipe.obs:
        found.append(_sample(base, recipe, elimination.SHARE))
    if recipe.gradients:
        found.append(projection_room(c, batches, step) * projection_bytes(c.moe, step))
    if recipe.weight_gradients:
        found.append(text + _in_memory(layer_slots(c) * text))
    if recipe.nll_ig:
        shown = text * recipe.nll_ig * min(1, ig_chunk(recipe.nll_ig) / max(1, windows))
        found.append(int(2 * shown) + _in_memory(int(layer_slots(c) * shown)))
    return max(found)


def _in_memory(states: int) -> int:
    return states if states <= MEMORY_STATES else 0
