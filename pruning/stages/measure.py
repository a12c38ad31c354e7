"""Evaluation texts as windows, and the quality of models on them."""

from pathlib import Path

from moe_jax.errors import InputError
from moe_jax.stream import LayerSource
from pruning.kit.progress import Steps
from pruning.measure.quality import Quality, Reference, measure_quality
from pruning.text.calibration import TokenStream, token_stream
from pruning.text.documents import TextSource
from pruning.text.tokenizer import TextCodec
from pruning.text.windows import Windows, make_windows


def open_texts(
    files: tuple[str, ...],
    codec: TextCodec,
    window: int,
    max_tokens: int,
    field: str = "text",
    loss_on: str = "all",
) -> dict[str, Windows]:
    """Evaluation windows by file name, at most `max_tokens` of each file; `field` holds the text
    of a JSON line, and `loss_on` says what of conversations is scored."""
    texts = {}
    for file in files:
        path = Path(file)
        name = path.stem if path.stem not in texts else str(path)
        stream = read_tokens(TextSource(path, field=field), codec, max_tokens, loss_on)
        texts[name] = text_windows(stream, codec, window)
    return texts


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


def text_windows(
    stream: TokenStream, codec: TextCodec, window: int, stride: int | None = None
) -> Windows:
    """The windows of an evaluation text, as `make_windows`."""
    return make_windows(
        stream.tokens, window=window, stride=stride, counted=stream.counted, full=bool(codec.first)
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
