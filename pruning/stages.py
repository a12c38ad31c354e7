"""The stages of a compression, each reading what the one before wrote."""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.export import ExportFormat, export_checkpoint, packed_inputs
from convert.rules import uniform_widths
from moe_jax.stream import LayerSource
from pruning.alignment import check_block
from pruning.attribution import collect_statistics
from pruning.calibration import TextSource, TokenBatch, calibration_batch
from pruning.criteria import CHANNEL_CRITERIA, EXPERT_CRITERIA, choose
from pruning.evaluate import Quality, Reference, Windows, evaluate, make_windows
from pruning.plan import PruningPlan, plan_pruning
from pruning.planners import PLANNERS
from pruning.progress import Steps
from pruning.prune import PrunedSource
from pruning.quantized import QuantizedSource
from pruning.recipe import CompressionRecipe
from pruning.sizes import kept_widths
from pruning.statistics import ChannelStatistics, load_statistics, save_statistics
from pruning.tokenizer import TextCodec, open_codec
from pruning.verify import Check, verify_folder

DEMO = Path(__file__).parent / "demo"
STATISTICS = "statistics.safetensors"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Job:
    """A recipe together with the opened model, its tokenizer and its texts."""

    recipe: CompressionRecipe
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


def model_folder(model: str) -> Path:
    """The checkpoint folder a recipe names; "demo" is the embedded model."""
    return DEMO / "model" if model == "demo" else Path(model)


def demo_texts(kind: str) -> tuple[str, ...]:
    """Paths of the embedded texts: kind "calibration" or "evaluation"."""
    names = sorted((DEMO / "text").glob(f"{kind}*"))
    return tuple(str(name) for name in names)


def open_job(recipe: CompressionRecipe) -> Job:
    """Open and check everything a recipe needs; no weights are read.

    Raises:
      ValueError: whatever is wrong with the model, the texts or the options, before any work.
    """
    folder = model_folder(recipe.model)
    # 16-bit weights: the exports store these, so they are what is measured.
    base = open_checkpoint(folder, dtype=jnp.bfloat16)
    c = base.config
    recipe = recipe.resolved(c.moe.d_expert, c.d_model, c.max_position, packed_inputs(base))
    if not c.moe_layers:
        raise ValueError(f"{folder} has no layer with experts; there is nothing to prune")
    if base.widths != uniform_widths(c):
        raise ValueError(f"{folder} is already pruned; give the dense model that it came from")
    choose(CHANNEL_CRITERIA, recipe.criterion, "criterion")
    choose(EXPERT_CRITERIA, recipe.attribution, "attribution")
    choose(PLANNERS, recipe.planner, "planner")
    check_block(recipe.block or 1, c.moe.d_expert)
    codec = open_codec(folder, c.vocab_size)
    texts = recipe.calibration
    if not texts and recipe.model == "demo":
        texts = demo_texts("calibration")
    sources = [TextSource.parse(text, recipe.calibration_field) for text in texts]
    assert recipe.window is not None
    calibration = calibration_batch(
        sources,
        codec.encode,
        length=recipe.window,
        max_tokens=recipe.max_tokens,
        separator=codec.end,
    )
    evaluation = recipe.evaluation
    if not evaluation and recipe.model == "demo":
        evaluation = demo_texts("evaluation")
    return Job(recipe, base, codec, calibration, open_texts(evaluation, codec, recipe.window))


def open_texts(
    files: tuple[str, ...], codec: TextCodec, window: int, max_tokens: int = 16384
) -> dict[str, Windows]:
    """Evaluation windows by file name, at most `max_tokens` of each file."""
    texts = {}
    for file in files:
        path = Path(file)
        name = path.stem if path.stem not in texts else str(path)
        texts[name] = make_windows(read_tokens(path, codec, max_tokens), window=window)
    return texts


def read_tokens(path: Path, codec: TextCodec, max_tokens: int) -> list[int]:
    """First tokens of an evaluation text.

    Raises:
      ValueError: the file is missing, not UTF-8, or holds fewer than two tokens.
    """
    if not path.is_file():
        raise ValueError(f"evaluation text {path} does not exist; check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from None
    tokens = codec.encode(text[: 16 * max_tokens])[:max_tokens]
    if len(tokens) < 2:
        raise ValueError(
            f"evaluation text {path} has {len(tokens)} tokens, at least 2 are needed to score one; "
            "give more text"
        )
    return tokens


def score(job: Job, steps: Steps) -> tuple[ChannelStatistics, dict]:
    """Collect statistics, or read those an earlier run of the same recipe wrote."""
    found = find_statistics(job)
    if found is not None:
        return found
    with steps.bar("score") as on_step:
        statistics = collect_statistics(
            job.base,
            job.calibration.tokens,
            job.calibration.valid,
            gradients=job.recipe.gradients,
            batch=job.recipe.batch,
            dtype=job.dtype,
            on_step=on_step,
        )
    job.output.mkdir(parents=True, exist_ok=True)
    save_statistics(job.output / STATISTICS, statistics, _provenance(job))
    return statistics, _provenance(job)


def find_statistics(job: Job) -> tuple[ChannelStatistics, dict] | None:
    """What an earlier run of the same recipe measured on the same model and texts, if it did."""
    path = job.output / STATISTICS
    if not path.is_file() or not path.with_suffix(".json").is_file():
        return None
    statistics, found = load_statistics(path)
    same = all(found.get(key) == value for key, value in _provenance(job).items())
    return (
        (statistics, found) if same and statistics.has_gradients >= job.recipe.gradients else None
    )


def _provenance(job: Job) -> dict:
    return {
        "model_hash": job.base.fingerprint,
        "model": str(job.base.folder),
        "window": job.recipe.window,
        "dtype": job.recipe.dtype,
        "tokens": job.calibration.total,
        "sources": list(job.calibration.sources),
    }


def stored_statistics(folder: Path, base: Checkpoint) -> tuple[ChannelStatistics, dict]:
    """Statistics in an output folder, which must be of this very model.

    Raises:
      ValueError: they are missing, damaged, or of another model.
    """
    statistics, provenance = load_statistics(folder / STATISTICS)
    if provenance.get("model_hash") != base.fingerprint:
        raise ValueError(
            f"{folder / STATISTICS} was measured on model {provenance.get('model_hash')}, but "
            f"{base.folder} is {base.fingerprint}; score this model"
        )
    return statistics, provenance


def plan(
    recipe: CompressionRecipe,
    statistics: ChannelStatistics,
    provenance: dict,
    base: Checkpoint,
) -> PruningPlan:
    """Allocate the budget of a resolved recipe."""
    assert recipe.width is not None and recipe.block is not None
    return plan_pruning(
        statistics,
        prune_rate=recipe.prune_rate,
        criterion=recipe.criterion,
        attribution=recipe.attribution,
        planner=recipe.planner,
        width=recipe.width,
        block=recipe.block,
        minimum=recipe.minimum,
        experts_per_token=base.config.moe.experts_per_token,
        layer_indices=base.config.moe_layers,
        seed=recipe.seed,
        provenance={"model_hash": provenance["model_hash"], "tokens": provenance["tokens"]},
    )


def pruned_source(base: Checkpoint, plan: PruningPlan, form: ExportFormat | None) -> LayerSource:
    """The pruned model, with 4-bit weights if the format has them."""
    plan.require_model(base.fingerprint)
    pruned = PrunedSource(base, plan)
    if form is not None and form.is_packed:
        return QuantizedSource(pruned, form.group_size)
    return pruned


def export(
    base: Checkpoint,
    plan: PruningPlan,
    form: ExportFormat,
    target: Path,
    steps: Steps,
    *,
    overwrite: bool = False,
) -> Path:
    """Write one export of a plan."""
    plan.require_model(base.fingerprint)
    target.parent.mkdir(parents=True, exist_ok=True)
    with steps.bar(f"export {form.name}") as on_step:
        return export_checkpoint(
            PrunedSource(base, plan),
            base,
            kept_widths(plan, base),
            target,
            form,
            overwrite=overwrite,
            on_layer=lambda index: on_step(index + 1, len(base)),
        )


def verify(
    base: Checkpoint, plan: PruningPlan, form: ExportFormat, target: Path, probe: np.ndarray
) -> list[Check]:
    """Check one export against its plan and the model in memory."""
    return verify_folder(
        target,
        base=base,
        widths=kept_widths(plan, base),
        form=form,
        expected=pruned_source(base, plan, form),
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
            quality, own = evaluate(
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
