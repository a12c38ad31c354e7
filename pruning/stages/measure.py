"""Evaluation texts as windows, and the quality of models on them."""

import dataclasses
from pathlib import Path

import numpy as np

from moe_jax.errors import InputError
from moe_jax.stream import LayerSource
from pruning.kit.progress import Steps
from pruning.measure.quality import Quality, Reference, measure_quality
from pruning.text.calibration import token_stream
from pruning.text.documents import TextSource
from pruning.text.tokenizer import TextCodec
from pruning.text.windows import Windows, make_windows


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
    tokens = token_stream(source, codec.encode, max_tokens, codec.end).tokens
    if len(tokens) < 2:
        raise InputError(
            f"evaluation text {source.path} has {len(tokens)} tokens, at least 2 are needed to "
            "score one; give more text"
        )
    return tokens


def first_tokens(windows: Windows, tokens: int) -> Windows:
    """The first windows of a text, until so many tokens are scored."""
    scored = np.cumsum(windows.scored.sum(axis=1))
    rows = 1 + int(np.searchsorted(scored, min(tokens, int(scored[-1]))))
    parts = {name: getattr(windows, name)[:rows] for name in ("tokens", "valid", "scored")}
    return dataclasses.replace(windows, **parts)


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
