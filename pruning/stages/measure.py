"""Evaluation texts as windows, and the quality of models on them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.errors import InputError
from moe_jax.stream import LayerSource
from pruning.kit.memory import allowance
from pruning.kit.progress import Steps
from pruning.measure.quality import Quality, Reference, measure_quality
from pruning.text.calibration import TokenStream, source_note, token_stream
from pruning.text.source import TextSource
from pruning.text.tokenizer import TextCodec
from pruning.text.windows import Windows, make_windows


def open_texts(
    files: tuple[str, ...],
    codec: TextCodec,
    window: int,
    max_tokens: int,
    field: str = "text",
    loss_on: str = "all",
) -> tuple[dict[str, Windows], tuple[dict[str, Any], ...]]:
    """Evaluation windows by file name, at most `max_tokens` of each file, and a `source_note` of
    each; `field` holds the text of a row, and
    `loss_on` says what of conversations is scored."""
    texts, notes = {}, []
    for file in files:
        source = evaluation_source(file, field)
        names = (source.path.stem, str(source.path))
        name = next((name for name in names if name not in texts), file)
        stream = read_tokens(source, codec, max_tokens, loss_on)
        texts[name] = text_windows(stream, codec, window)
        notes.append(source_note(source, stream, len(stream.tokens)))
    return texts, tuple(notes)


def evaluation_source(text: str, field: str) -> TextSource:
    """An evaluation text of words as `TextSource.parse` reads them.

    Raises:
      InputError: as there, or it has a weight.
    """
    source = TextSource.parse(text, field)
    if source.weight != 1.0:
        raise InputError(
            f"evaluation text {text!r} has a weight, by which only --calibration mixes; leave it "
            "out"
        )
    return source


def read_tokens(
    source: TextSource, codec: TextCodec, max_tokens: int, loss_on: str = "all"
) -> TokenStream:
    """First tokens of an evaluation text; `loss_on` "answers" counts those of conversations alone.

    Raises:
      InputError: the file cannot be read as text or holds fewer than two tokens.
    """
    answers = codec.answers if loss_on == "answers" else None
    stream = token_stream(
        source, codec.encode, max_tokens, codec.end, first=codec.first, answers=answers
    )
    if len(stream.tokens) < 2:
        raise InputError(
            f"evaluation text {source.path} has {len(stream.tokens)} tokens, at least 2 are needed "
            "to score one; give more text"
        )
    return stream


def first_tokens(windows: Windows, tokens: int) -> Windows:
    """The first windows of a text, until so many tokens are scored."""
    scored = np.cumsum(windows.scored.sum(axis=1))
    rows = 1 + int(np.searchsorted(scored, min(tokens, int(scored[-1]))))
    parts = {name: getattr(windows, name)[:rows] for name in ("tokens", "valid", "scored")}
    return dataclasses.replace(windows, **parts)


def text_windows(
    stream: TokenStream, codec: TextCodec, window: int, stride: int | None = None
) -> Windows:
    """The windows of an evaluation text, as `make_windows`."""
    return make_windows(
        stream.tokens, window=window, stride=stride, counted=stream.counted, full=bool(codec.first)
    )


def held_states(config: ModelConfig, tokens: int) -> int:
    """Bytes of the hidden states that `measure` holds of so many tokens of windows: the first
    model's and another's."""
    return 2 * tokens * config.d_model * 4


def evaluation_files(config: ModelConfig, texts: dict[str, Windows]) -> int:
    """Bytes of the scratch files that `measure` takes, given a folder, under the allowance of the
    run; 0 where hidden states have room in memory."""
    size = held_states(config, sum(windows.tokens.size for windows in texts.values()))
    return size if size > allowance().of(size) else 0


def measure(
    source: LayerSource,
    texts: dict[str, Windows],
    references: dict[str, Reference],
    steps: Steps,
    name: str,
    *,
    batch: int,
    dtype,
    scratch: Path | None = None,
) -> dict[str, Quality]:
    """Quality on every text; the first model measured becomes the reference of the others. Their
    states go to files in `scratch`, if that is given, where the run's allowance has no room."""
    found, total = {}, len(texts) * len(source)
    folder = scratch if evaluation_files(source.config, texts) else None
    with steps.bar(f"evaluate {name}") as on_step:
        for number, (text, windows) in enumerate(texts.items()):
            quality, own = measure_quality(
                source,
                windows,
                reference=references.get(text),
                batch=batch,
                dtype=dtype,
                on_layer=lambda index, n=number: on_step(n * len(source) + index + 1, total),
                scratch=folder,
            )
            references.setdefault(text, own)
            found[text] = quality
    return found
