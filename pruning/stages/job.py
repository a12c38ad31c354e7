"""A recipe opened: the model, its tokenizer and its texts, checked before any work."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.description import Description
from convert.mtp_export import check_mtp
from convert.packing import packed_inputs
from convert.rules import uniform_widths
from moe_jax.errors import InputError, choose
from moe_jax.spread import ALONE, Spread
from pruning.budget.alignment import check_block
from pruning.budget.importance import PlannerOptions
from pruning.budget.planners import PLANNERS
from pruning.demo import demo_texts, model_folder
from pruning.kit.hub import pinned
from pruning.recipe.plan_options import AUTO
from pruning.recipe.recipe import CompressionRecipe, ResolvedRecipe
from pruning.scores.channel_criteria import CHANNEL_CRITERIA
from pruning.scores.criteria import require_data_free
from pruning.scores.expert_criteria import expert_criterion
from pruning.stages.measure import open_texts
from pruning.stages.sizes import dense_bytes
from pruning.text.calibration import TokenBatch, calibration_batch, hold_out
from pruning.text.kept_out import keep_out
from pruning.text.source import TextSource
from pruning.text.tokenizer import TextCodec, open_codec
from pruning.text.windows import Windows

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Job:
    """A recipe together with the opened model, its tokenizer and its texts.

    `evaluation_sources` are as `TokenBatch.sources`, of the evaluation files. `kept_out` are the
    windows of calibration text on which planner auto measures rules, and no others see them.
    `spread` are the devices and processes that share the calibration text.
    """

    recipe: ResolvedRecipe
    base: Checkpoint
    codec: TextCodec
    calibration: TokenBatch
    evaluation: dict[str, Windows]
    evaluation_sources: tuple[dict, ...] = ()
    kept_out: TokenBatch | None = None
    spread: Spread = ALONE

    @property
    def output(self) -> Path:
        """The output folder."""
        return Path(self.recipe.output)

    @property
    def dtype(self):
        """Dtype of the activations."""
        return DTYPES[self.recipe.dtype]


def open_job(recipe: CompressionRecipe, *, measures: bool = True) -> Job:
    """Open and check everything a recipe needs; no weights are read.

    Args:
      recipe: what is asked for.
      measures: whether, if there is no text to measure on, some of the calibration windows are set
        aside for it.

    Raises:
      InputError: whatever is wrong with the model, the texts or the options, before any work.
    """
    folder = model_folder(recipe.model)
    # 16-bit weights: the exports store these, so they are what is measured.
    base = open_checkpoint(folder, dtype=jnp.bfloat16)
    c = base.config
    recipe = resolved(dataclasses.replace(recipe, model=pinned(recipe.model)), base.about)
    require_possible(recipe, base.about)
    codec = open_codec(folder, c.vocab_size, first_tokens=recipe.first_tokens)
    calibration = calibration_text(recipe, codec)
    evaluation = recipe.evaluation
    if not evaluation and recipe.model == "demo":
        evaluation = demo_texts("evaluation")
    texts, notes = open_texts(
        evaluation, codec, recipe.window, recipe.evaluation_tokens, recipe.calibration_field,
        recipe.loss_on,
    )  # fmt: skip
    if measures and not texts and not recipe.weights_only:
        calibration, held = hold_out(calibration)
        if held.scored.any():
            texts["held-out calibration"] = held.windows()
    kept_out = None
    if recipe.planner == AUTO or recipe.bits == "auto":
        calibration, kept_out = keep_out(calibration)
    return Job(recipe, base, codec, calibration, texts, notes, kept_out)


def require_possible(recipe: ResolvedRecipe, base: Description) -> None:
    """Refuse a resolved recipe that no statistics can satisfy; texts are checked elsewhere.

    Raises:
      InputError: the model has no experts or is pruned already, lacks layers that are to be kept,
        or a name is unknown.
    """
    c = base.config
    if not c.moe_layers:
        raise InputError(f"{base.folder} has no layer with experts; there is nothing to prune")
    if base.widths != uniform_widths(c):
        raise InputError(f"{base.folder} is already pruned; give the dense model that it came from")
    check_mtp(base, recipe.mtp)
    if recipe.bits == "auto" and recipe.target_bytes is None:
        raise InputError(
            "bits='auto' are those of the least loss within a size; give one with --target-bytes "
            "or --target-factor, and no other budget"
        )
    if recipe.bits == "auto" and recipe.weights_only:
        raise InputError(
            "bits='auto' are chosen by what layers lose on calibration text; leave out "
            "--weights-only"
        )
    choose(CHANNEL_CRITERIA, recipe.used_criterion, "criterion")
    expert_criterion(recipe.used_attribution)
    if recipe.weights_only:
        require_data_free(recipe.used_criterion, recipe.used_attribution)
    choose({AUTO: None, **PLANNERS}, recipe.planner, "planner")
    PlannerOptions.of(recipe)
    check_block(recipe.block, c.moe.d_expert)


def calibration_text(recipe: ResolvedRecipe, codec: TextCodec) -> TokenBatch:
    """The windows of a resolved recipe's calibration files; none if it reads weights alone."""
    window = recipe.window
    if recipe.weights_only:
        return TokenBatch(np.zeros((0, window), np.int32), np.zeros((0, window), bool))
    files = recipe.calibration
    if not files and recipe.model == "demo":
        files = demo_texts("calibration")
    return calibration_batch(
        [TextSource.parse(file, recipe.calibration_field) for file in files],
        codec.encode,
        length=window,
        max_tokens=recipe.max_tokens,
        separator=codec.end,
        first=codec.first,
        answers=codec.answers if recipe.loss_on == "answers" else None,
    )


def resolved(recipe: CompressionRecipe, base: Description) -> ResolvedRecipe:
    """The recipe with every default that depends on the model filled in, a factor as the bytes that
    it leaves; InputError as there."""
    c = base.config
    if recipe.target_factor is not None:
        left = int(dense_bytes(base) / recipe.target_factor)
        recipe = dataclasses.replace(recipe, target_factor=None, target_bytes=left)
    formats = base.family.formats
    inputs = packed_inputs(base, recipe.requantize)
    native = None if base.native is None else base.native.group_size
    return recipe.resolved(c.moe.d_expert, c.d_model, c.max_position, inputs, formats, native)
