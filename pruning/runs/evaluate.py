"""Likelihood of texts under a checkpoint, or under the plans of several prune rates."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from convert.checkpoint import Checkpoint, open_checkpoint
from moe_jax.errors import InputError
from moe_jax.stream import LayerSource
from pruning.budget.plan import PruningPlan
from pruning.demo import model_folder
from pruning.kit.memory import Allowance
from pruning.kit.progress import Steps
from pruning.recipe.options import MOST_BATCH, WHOLE_TEXT, RunOptions
from pruning.recipe.recipe import CompressionRecipe, ResolvedRecipe
from pruning.recipe.values import MOST, check_whole, window_within
from pruning.runs.cap import capped
from pruning.runs.held import (
    evaluation_bytes,
    fixed_bytes,
    largest_layer,
    layers_held,
    outer_weights,
    pruned_bytes,
)
from pruning.runs.memory import Foretold
from pruning.runs.plan import save_sweep
from pruning.stages.export import pruned_source
from pruning.stages.folder import clear_leftovers
from pruning.stages.job import DTYPES, resolved
from pruning.stages.made_by import say_stale
from pruning.stages.measure import evaluation_source, measure, read_tokens, text_windows
from pruning.stages.remarks import say_context, say_source
from pruning.stages.stored import stored_base, stored_plans, stored_recipe
from pruning.stages.writer import only_writer
from pruning.text.calibration import TokenStream, source_note
from pruning.text.tokenizer import TextCodec, open_codec
from pruning.text.windows import Windows


@dataclass(frozen=True)
class _Reading:
    """How texts are read and cut; the options of `evaluate` of these names."""

    text_field: str
    window: int | None
    stride: int | None
    evaluation_tokens: int
    first_tokens: bool
    loss_on: Literal["all", "answers"]

    def windows(
        self, texts: Sequence[str | os.PathLike], base: Checkpoint, window: int, steps: Steps
    ) -> dict[str, Windows]:
        """The windows of every text, `window` tokens long at most."""
        vocabulary = base.config.vocab_size
        codec = open_codec(base.about.folder, vocabulary, first_tokens=self.first_tokens)
        return {
            str(text): text_windows(self._stream(text, codec, steps), codec, window, self.stride)
            for text in texts
        }

    def _stream(self, text: str | os.PathLike, codec: TextCodec, steps: Steps) -> TokenStream:
        """The tokens of a text; what file it is, and whether it has more, is said."""
        most = self.evaluation_tokens
        source = evaluation_source(os.fspath(text), self.text_field)
        stream = read_tokens(source, codec, most, self.loss_on)
        say_source(source_note(source, stream, len(stream.tokens)), steps)
        if len(stream.tokens) == most:
            steps.say(f"{text}: {most:,} tokens are measured; --evaluation-tokens takes more")
        return stream


def evaluate(
    folder: str | os.PathLike,
    texts: Sequence[str | os.PathLike],
    rates: Sequence[float] = (),
    *,
    text_field: str = "text",
    window: int | None = None,
    stride: int | None = None,
    evaluation_tokens: int = WHOLE_TEXT,
    first_tokens: bool = True,
    loss_on: Literal["all", "answers"] = "all",
    batch: int = 8,
    dtype: Literal["float32", "bfloat16"] = "float32",
    memory_limit: int | str | None = None,
    steps: Steps | None = None,
) -> dict[str, Any]:
    """Measure the likelihood of texts.

    Args:
      folder: a checkpoint, or "demo"; with `rates` an output folder of `score`, where several
        also write sweep.csv and sweep.html.
      texts: files, each as `TextSource.parse` reads it, without a weight.
      rates: prune rates, each planned from the stored statistics and measured by masking.
      text_field: field of a row that holds the text.
      window: tokens per window; default the model's context, at most 2048.
      stride: tokens between windows; default half a window.
      evaluation_tokens: most tokens measured of each text.
      first_tokens: begin texts with the tokens that the tokenizer puts first, if it does.
      loss_on: "answers" measures of conversations what the assistant said, not the prompts.
      batch, dtype: windows per step, and the type of their activations.
      memory_limit: as of a recipe; default, with `rates`, that of the stored one.
      steps: where progress goes; default stderr.

    Returns:
      `folder`, `window`, `stride` and `texts`: nll in nats, perplexity, tokens, kl and top1 by
      text, with `rates` by model and text, where models are "dense" and "prune-rate 0.25".

    Raises:
      InputError: a number is out of range, a text or the folder cannot be read, the memory limit is
        too little, or another process writes where the results of several rates go.
    """
    _check(Path(folder), texts, rates, window, stride, evaluation_tokens, batch)
    steps = steps or Steps()
    say_stale(Path(folder), steps)
    reading = _Reading(text_field, window, stride, evaluation_tokens, first_tokens, loss_on)
    how: dict[str, Any] = {"batch": batch, "dtype": DTYPES[dtype]}
    options = RunOptions(model="-", output="-", memory_limit=memory_limit)  # type: ignore[arg-type]
    limit = options.memory_limit
    with only_writer(folder) if len(rates) > 1 else nullcontext():
        return _evaluate(folder, texts, rates, reading, how, limit, steps)


def _cures(stage: str) -> list[str]:
    return ["fewer windows at a time with --batch"]


def _evaluate(
    model: str | os.PathLike,
    texts: Sequence[str | os.PathLike],
    rates: Sequence[float],
    reading: _Reading,
    how: dict[str, Any],
    limit: int | None,
    steps: Steps,
) -> dict[str, Any]:
    """Measure, with `how` as `measure` has it, and write the sweep of several rates."""
    # A path forgets whether it began with "./".
    folder = Path(model)
    recipe = stored_recipe(folder) if rates else None
    base = stored_base(recipe, steps) if recipe else open_checkpoint(model_folder(model))
    window = window_within(reading.window, base.config.max_position)
    say_context(base.config, window, steps)
    opened = reading.windows(texts, base, window, steps)
    scratch, plans, statistics = Path(tempfile.gettempdir()), [], None
    if recipe:
        scratch, limit = recipe.scratch_folder, limit or recipe.memory_limit
    with capped(base, limit, _takes(base, opened, how, recipe, rates), steps, _cures):
        if recipe:  # after the texts: planner auto runs the model
            plans, statistics = stored_plans(folder, recipe, base, rates, steps)
        references, found = {}, {}
        for name, source in _sources(base, plans).items():
            measured = measure(source, opened, references, steps, name, scratch=scratch, **how)
            found[name] = {text: quality.to_dict() for text, quality in measured.items()}
    if statistics is not None and len(plans) > 1:
        clear_leftovers(folder)
        quality = {one.prune_rate: found[f"prune-rate {one.prune_rate}"] for one, _ in plans}
        quality[None] = found["dense"]
        save_sweep(folder, base, plans, statistics, quality)
    stride, found = next(iter(opened.values())).stride, found.get("model", found)
    return {"folder": str(folder), "window": window, "stride": stride, "texts": found}


def _takes(
    base: Checkpoint,
    texts: Mapping[str, Windows],
    how: dict[str, Any],
    recipe: CompressionRecipe | None,
    rates: Sequence[float],
) -> Callable[[Allowance], dict[str, int]]:
    """What measuring takes, by the allowance, and planning beforehand if there is a recipe."""
    about, c = base.about, base.config
    tokens = sum(windows.tokens.size for windows in texts.values())
    step = how["batch"] * max(windows.tokens.shape[1] for windows in texts.values())
    said = (about.hf_config.get(name) for name in ("dtype", "torch_dtype"))
    item = 4 if about.quantization or "float32" in said else 2
    whole = None
    if recipe is not None:
        whole = Foretold(about, resolved(recipe, about), alone=True, rates=len(rates))

    def takes(found: Allowance) -> dict[str, int]:
        layer = largest_layer(about, found)
        layers = pruned_bytes(about, layer, found) if whole else layers_held(layer, item, found)
        outer = (item - 2) * outer_weights(c)
        size = evaluation_bytes(c, tokens, step, layers, found)
        planned = whole.peaks(("planning", "choice"), found) if whole else {}
        return {**planned, "evaluation": fixed_bytes(about) + outer + size}

    return takes


def _check(
    folder: Path,
    texts: Sequence[str | os.PathLike],
    rates: Sequence[float],
    window: int | None,
    stride: int | None,
    evaluation_tokens: int,
    batch: int,
) -> None:
    if not texts:
        raise InputError("there is no text to evaluate on; name one with --text")
    ranges = {
        "window": (window, 2, MOST),
        "stride": (stride, 1, MOST),
        "evaluation_tokens": (evaluation_tokens, 2, MOST),
        "batch": (batch, 1, MOST_BATCH),
    }
    for name, (value, least, most) in ranges.items():
        if value is not None:
            check_whole(name, value, least, most, f"; change --{name.replace('_', '-')}")
    if len(rates) > 1 and not os.access(folder, os.W_OK):
        raise InputError(f"{folder} gets sweep.csv and sweep.html; make it writable first")


def _sources(
    base: Checkpoint, plans: Sequence[tuple[ResolvedRecipe, PruningPlan]]
) -> dict[str, LayerSource]:
    """Models by name: the folder's own, or the dense one and one for every plan."""
    if not plans:
        return {"model": base}
    pruned = {f"prune-rate {o.prune_rate}": pruned_source(base, p, None) for o, p in plans}
    return {"dense": base, **pruned}
