"""The stages of a compression, each reading what the one before wrote."""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.description import Description
from convert.export import packed_inputs
from convert.export_format import ExportFormat
from convert.mtp_export import MtpSource, check_mtp
from convert.rules import uniform_widths
from moe_jax.errors import InputError, choose
from moe_jax.stream import LayerSource
from pruning.budget.alignment import check_block
from pruning.budget.decide import PruningPlan
from pruning.budget.importance import PlannerOptions
from pruning.budget.planners import PLANNERS
from pruning.demo import demo_texts, model_folder
from pruning.kit.progress import Steps
from pruning.measure.quality import Quality, Reference, measure_quality
from pruning.recipe.recipe import CompressionRecipe, ResolvedRecipe
from pruning.scores.channel_criteria import CHANNEL_CRITERIA
from pruning.scores.criteria import require_data_free
from pruning.scores.expert_criteria import expert_criterion
from pruning.scores.noise import worthiest_on_noise
from pruning.shrink.gptq_model import with_codes
from pruning.shrink.prune import PrunedSource
from pruning.shrink.rounding import QuantizedSource
from pruning.stages.card import card_files
from pruning.stages.sizes import export_of
from pruning.stages.verify import Check, verify_folder
from pruning.text.calibration import (
    TextSource,
    TokenBatch,
    calibration_batch,
    hold_out,
    token_stream,
)
from pruning.text.tokenizer import TextCodec, open_codec
from pruning.text.windows import Windows, make_windows

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Job:
    """A recipe together with the opened model, its tokenizer and its texts."""

    recipe: ResolvedRecipe
    base: Checkpoint
    codec: TextCodec
    calibration: TokenBatch
    evaluation: dict[str, Windows]

    @property
    def output(self) -> Path:
        """The output folder."""
        return Path(self.recipe.output)

    @property
    def dtype(self):
        """Dtype of the activations."""
        return DTYPES[self.recipe.dtype]


def open_job(recipe: CompressionRecipe) -> Job:
    """Open and check everything a recipe needs; no weights are read.

    Raises:
      InputError: whatever is wrong with the model, the texts or the options, before any work.
    """
    folder = model_folder(recipe.model)
    # 16-bit weights: the exports store these, so they are what is measured.
    base = open_checkpoint(folder, dtype=jnp.bfloat16)
    c = base.config
    recipe = resolved(recipe, base.about)
    require_possible(recipe, base.about)
    codec = open_codec(folder, c.vocab_size)
    calibration = _calibration(recipe, codec, recipe.window)
    evaluation = recipe.evaluation
    if not evaluation and recipe.model == "demo":
        evaluation = demo_texts("evaluation")
    texts = open_texts(
        evaluation, codec, recipe.window, recipe.evaluation_tokens, recipe.calibration_field
    )
    if not texts and not recipe.weights_only:
        calibration, held = hold_out(calibration)
        scored = held.valid[:, :-1] & held.valid[:, 1:]
        if scored.any():
            texts["held-out calibration"] = Windows(
                held.tokens, held.valid, scored, recipe.window, recipe.window
            )
    return Job(recipe, base, codec, calibration, texts)


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
    choose(CHANNEL_CRITERIA, recipe.criterion, "criterion")
    expert_criterion(recipe.attribution)
    if recipe.weights_only:
        require_data_free(recipe.criterion, recipe.attribution)
    choose(PLANNERS, recipe.planner, "planner")
    PlannerOptions.of(recipe)
    check_block(recipe.block or 1, c.moe.d_expert)


def _calibration(recipe: ResolvedRecipe, codec: TextCodec, window: int) -> TokenBatch:
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
    )


def resolved(recipe: CompressionRecipe, base: Description) -> ResolvedRecipe:
    """The recipe with every default that depends on the model filled in; ValueError as there."""
    c = base.config
    formats = base.family.formats
    inputs = packed_inputs(base)
    return recipe.resolved(c.moe.d_expert, c.d_model, c.max_position, inputs, formats)


def open_texts(
    files: tuple[str, ...],
    codec: TextCodec,
    window: int,
    max_tokens: int,
    field: str = "text",
) -> dict[str, Windows]:
    """Evaluation windows by file name, at most `max_tokens` of each file; `field` holds the text
    of a JSON line."""
    texts = {}
    for file in files:
        path = Path(file)
        name = path.stem if path.stem not in texts else str(path)
        tokens = read_tokens(TextSource(path, field=field), codec, max_tokens)
        texts[name] = make_windows(tokens, window=window)
    return texts


def read_tokens(source: TextSource, codec: TextCodec, max_tokens: int) -> np.ndarray:  # [T]
    """First tokens of an evaluation text.

    Raises:
      InputError: the file cannot be read as text or holds fewer than two tokens.
    """
    tokens, _ = token_stream(source, codec.encode, max_tokens, codec.end)
    if len(tokens) < 2:
        raise InputError(
            f"evaluation text {source.path} has {len(tokens)} tokens, at least 2 are needed to "
            "score one; give more text"
        )
    return tokens


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


def verify(
    base: Checkpoint,
    plan: PruningPlan,
    form: ExportFormat,
    target: Path,
    probe: np.ndarray,
    codes: Path | None = None,
) -> list[Check]:
    """Check one export against its plan and the model in memory."""
    return verify_folder(
        target,
        export=export_of(base.about, plan, form),
        mtp=mtp_source(base),
        expected=pruned_source(base, plan, form, codes),
        probe=probe,
    )


def measure(
    source: LayerSource,
    texts: dict[str, Windows],
    references: dict[str, Reference],
    steps: Steps,
    name: str,
    *,
    batch: int,
    dtype,
) -> dict[str, Quality]:
    """Quality on every text; the first model measured becomes the reference of the others."""
    found, total = {}, len(texts) * len(source)
    with steps.bar(f"evaluate {name}") as on_step:
        for number, (text, windows) in enumerate(texts.items()):
            quality, own = measure_quality(
                source,
                windows,
                reference=references.get(text),
                batch=batch,
                dtype=dtype,
                on_layer=lambda index, n=number: on_step(n * len(source) + index + 1, total),
            )
            references.setdefault(text, own)
            found[text] = quality
    return found
