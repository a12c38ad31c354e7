"""What a checkpoint, or a pruned model and its dense one, write by themselves."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from moe_jax.errors import InputError
from pruning.kit.progress import Steps
from pruning.measure.health import (
    SUM_TOKENS,
    Continuations,
    Health,
    continuations,
    followed_tokens,
    is_right,
    repeated_share,
    sums,
    written_entropy,
)
from pruning.recipe.health_options import HealthOptions
from pruning.recipe.options import MOST_BATCH, WHOLE_TEXT
from pruning.recipe.values import check_whole
from pruning.runs.asked_models import DENSE, AskedModel, asked_models
from pruning.stages.job import DTYPES
from pruning.stages.measure import evaluation_source, read_tokens
from pruning.stages.remarks import say_source
from pruning.text.calibration import source_note
from pruning.text.tokenizer import TextCodec, open_codec

BEGINNING = 32  # tokens that are continued


def generation_health(
    folder: str | os.PathLike,
    texts: Sequence[str | os.PathLike],
    rates: Sequence[float] = (),
    *,
    generate: int = 32,
    new_tokens: int = 64,
    text_field: str = "text",
    evaluation_tokens: int = WHOLE_TEXT,
    first_tokens: bool = True,
    batch: int = 8,
    dtype: Literal["float32", "bfloat16"] = "float32",
    steps: Steps | None = None,
) -> dict[str, Any]:
    """Let models continue texts and do sums, the likeliest token each time.

    A pruned model stands beside its dense one where the run it comes from is known.

    Args:
      folder: as of `evaluate_tasks`.
      texts: files, each as `TextSource.parse` reads it, without a weight.
      rates: prune rates, each planned from the stored statistics and run by masking.
      generate: beginnings that are continued, spread evenly over the texts, and as many sums.
      new_tokens: most tokens of a continuation.
      text_field: field of a row that holds the text.
      evaluation_tokens: of each text, over which its beginnings are spread, at most.
      first_tokens: begin with the tokens that the tokenizer puts first, if it does.
      batch: windows per step where entropies are measured.
      dtype: of the activations.
      steps: where progress goes; default stderr.

    Returns:
      `folder`; `health` by model, as of `Health`; `written`, by model the continuations as text,
      after `beginnings`.

    Raises:
      InputError: a number is out of range, a text is too short or cannot be read, or the model's
        context ends before the new tokens do.
    """
    asked = HealthOptions(generate=generate, new_tokens=new_tokens)
    check_whole("batch", batch, 1, MOST_BATCH, "; change --batch")
    check_whole(
        "evaluation_tokens", evaluation_tokens, BEGINNING, cure="; change --evaluation-tokens"
    )
    if not texts:
        raise InputError("there is no text whose beginnings are continued; name one with --text")
    steps = steps or Steps()
    models, _ = asked_models(folder, rates, steps)
    about = models[0].checkpoint
    codec = open_codec(about.about.folder, about.config.vocab_size, first_tokens=first_tokens)
    prompts = _beginnings(texts, text_field, evaluation_tokens, codec, asked.generate, steps)
    how = {"batch": batch, "dtype": DTYPES[dtype]}
    found, written = {}, {}
    for one in models:
        found[one.name], written[one.name] = _measured(
            one, codec, prompts, written.get(DENSE), asked, how, steps
        )
    return {
        "folder": str(folder),
        "health": {name: health.to_dict() for name, health in found.items()},
        "beginnings": [codec.decode(list(prompt)) for prompt in prompts],
        "written": {name: [codec.decode(new) for new in some] for name, some in written.items()},
    }


def _beginnings(
    texts: Sequence[str | os.PathLike],
    field: str,
    most: int,
    codec: TextCodec,
    number: int,
    steps: Steps,
) -> list[list[int]]:
    """Pieces of the texts, evenly spread over what is read of each, behind the first tokens."""
    prompts = []
    for place, text in enumerate(texts):
        source = evaluation_source(os.fspath(text), field)
        stream = read_tokens(source, codec, most, "all")
        say_source(source_note(source, stream, len(stream.tokens)), steps)
        tokens = stream.tokens[len(codec.first) :]
        if len(tokens) < BEGINNING:
            raise InputError(
                f"{text} has {len(tokens)} tokens and a beginning {BEGINNING}; give more text"
            )
        share = number // len(texts) + (place < number % len(texts))
        starts = np.linspace(0, len(tokens) - BEGINNING, share).astype(int)
        prompts += [
            [*codec.first, *map(int, tokens[start : start + BEGINNING])] for start in starts
        ]
    return prompts


def _measured(
    model: AskedModel,
    codec: TextCodec,
    prompts: list[list[int]],
    dense: Continuations | None,
    asked: HealthOptions,
    how: dict[str, Any],
    steps: Steps,
) -> tuple[Health, Continuations]:
    """What one model writes, set against what the dense one wrote."""
    source, ends, dtype = model.source, tuple(codec.stops), how["dtype"]
    with steps.bar(f"{model.name}: continuations") as on_step:
        written = continuations(
            source, prompts, asked.new_tokens, stop=ends, dtype=dtype, on_step=on_step
        )
    questions = sums(asked.generate)
    with steps.bar(f"{model.name}: sums") as on_step:
        answers = continuations(
            source,
            [codec.encode(text, special=bool(codec.first)) for text, _ in questions],
            SUM_TOKENS,
            stop=ends,
            ended=lambda new: "\n" in codec.decode(new),
            dtype=dtype,
            on_step=on_step,
        )
    with steps.bar(f"{model.name}: entropy"):
        entropy = written_entropy(source, prompts, written, **how)
    ended = [bool(new) and new[-1] in codec.stops for new in written]
    right = [is_right(codec.decode(new), v) for new, (_, v) in zip(answers, questions, strict=True)]
    return Health(
        prompts=len(prompts),
        tokens=float(np.mean([len(new) for new in written])),
        truncated=1 - float(np.mean(ended)),
        repeated=repeated_share(written),
        entropy=entropy,
        followed=None if dense is None else followed_tokens(written, dense),
        sums=float(np.mean(right)),
    ), written
