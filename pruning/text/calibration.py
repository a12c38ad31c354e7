"""Text to batches of tokens of one shape: files and weighted mixtures of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import InputError
from pruning.text.documents import WHOLE, open_documents
from pruning.text.encoding import Answers, Encode, encoded, with_first
from pruning.text.source import TextSource
from pruning.text.windows import Windows

MIN_TOKENS = 64
CHARACTERS = 16  # of a document, at most, for each token that is wanted
BEGINS = 80  # characters of a text that say which it is


@dataclass(frozen=True)
class TokenBatch:
    """Packed windows.

    Attributes:
      tokens: int32 [B, T].
      valid: bool [B, T]; padding is False.
      sources: per file: path, weight, documents, tokens used, and the sha256 of the file, or of
        what was read of a file of more than `WHOLE` bytes; `part`, see `Documents`, unless "all";
        `options`, see `TextSource`, unless ""; the `about` of its `TokenStream`; `first`, the ids
        that begin each text and window, if there are any; `loss_on` unless "all".
      counted: bool [B, T], tokens whose prediction counts in losses and gradients; None for all.
      files: int [B], the place in `sources` of the file that each window is of; None if unknown.
    """

    tokens: np.ndarray
    valid: np.ndarray
    sources: tuple[dict, ...] = ()
    counted: np.ndarray | None = None
    files: np.ndarray | None = None

    @property
    def total(self) -> int:
        """Number of valid tokens."""
        return int(self.valid.sum())

    def counted_in(self, rows: np.ndarray) -> np.ndarray | None:
        """`counted` of some windows."""
        return None if self.counted is None else self.counted[rows]

    @property
    def scored(self) -> np.ndarray:
        """bool [B, T - 1], position t tells whether the prediction of token t + 1 counts."""
        counted = self.valid if self.counted is None else self.counted
        return self.valid[:, :-1] & self.valid[:, 1:] & counted[:, 1:]

    def of(self, rows: np.ndarray) -> "TokenBatch":
        """Some windows, chosen by number or by a mask [B]."""
        files = None if self.files is None else self.files[rows]
        parts = {"tokens": self.tokens[rows], "valid": self.valid[rows], "files": files}
        return replace(self, counted=self.counted_in(rows), **parts)

    def windows(self) -> Windows:
        """As windows of an evaluation text, side by side."""
        length = self.tokens.shape[1]
        return Windows(self.tokens, self.valid, self.scored, length, length)


@dataclass(frozen=True)
class TokenStream:
    """The beginning of a file's documents in the order of `pruning.text.documents`.

    Attributes:
      tokens: int32 [T].
      counted: bool [T], tokens whose prediction counts: what the text says, and of conversations
        what is asked for; no token that the tokenizer puts first.
      documents: that were read.
      part: of the file that they were chosen from, see `Documents`.
      sha256: of the characters that were read.
      about: the file's `format`, the `field` that documents are made of, unless they are whole
        files, how the text `begins`, and what it is `lacking`, if anything.
    """

    tokens: np.ndarray
    counted: np.ndarray
    documents: int
    part: str
    sha256: str
    about: dict[str, str]


def token_stream(
    source: TextSource,
    encode: Encode,
    limit: int,
    separator: int | None,
    *,
    first: Sequence[int] = (),
    answers: Answers | None = None,
) -> TokenStream:
    """First tokens of a file's documents, joined by `separator`.

    Args:
      source: the file.
      encode: text or conversation -> token ids; those of a text without special tokens.
      limit: most tokens to read.
      separator: token between documents; None for none.
      first: tokens before each text. A conversation has those that its chat template writes.
      answers: conversation -> which of its tokens count; None for all.

    Returns:
      At most `limit` tokens.

    Raises:
      InputError: as `open_documents`.
    """
    tokens: list[int] = []
    counted: list[bool] = []
    # A token covers at least one character often enough: this bounds the work on huge files.
    characters = CHARACTERS * limit
    opened, read, digest, begins = open_documents(source, characters), 0, sha256(), ""
    for document in opened.texts:
        if read and separator is not None:
            tokens.append(separator)
            counted.append(answers is None)
        found = encoded(document, encode, characters, first, answers)
        tokens += found.tokens
        counted += found.counted
        begins = begins or found.text[:BEGINS]
        read += 1
        digest.update(found.text.encode() + b"\n")
        if len(tokens) >= limit:
            break
    rows = opened.rows
    about = {"format": str(opened.layout), "field": rows.field, "begins": begins}
    about |= {"lacking": rows.lacking()}
    return TokenStream(
        np.asarray(tokens[:limit], np.int32),
        np.asarray(counted[:limit], bool),
        read,
        opened.part,
        digest.hexdigest(),
        {key: value for key, value in about.items() if value},
    )


def source_note(source: TextSource, stream: TokenStream, tokens: int) -> dict[str, Any]:
    """What `TokenBatch.sources` holds of a file of which so many tokens are used."""
    is_small = source.path.stat().st_size <= WHOLE
    digest = _file_hash(source.path) if is_small else stream.sha256
    note = {"path": str(source.path), "sha256": digest, "weight": source.weight,
            "documents": stream.documents, "tokens": tokens}  # fmt: skip
    note |= {} if stream.part == "all" else {"part": stream.part}
    note |= {"options": source.options} if source.options else {}
    return {**note, **stream.about}


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def calibration_batch(
    sources: Sequence[TextSource],
    encode: Encode,
    *,
    length: int,
    max_tokens: int,
    separator: int | None = None,
    first: Sequence[int] = (),
    answers: Answers | None = None,
) -> TokenBatch:
    """Pack documents into windows.

    Every file contributes tokens in proportion to its weight; a file that is too short gives all
    it has and the others fill up. Documents are taken in a fixed random order and joined by
    `separator`.

    Args:
      sources: the files.
      encode: text or conversation -> token ids; those of a text without special tokens.
      length: T, window length.
      max_tokens: bound on the tokens over all files.
      separator: token between documents, usually end-of-text; None for none.
      first: tokens that begin every text and every window, such as that of `<s>`.
      answers: conversation -> which of its tokens count in losses; None for all.

    Returns:
      Windows of `length`; only the last window of each file may hold padding.

    Raises:
      InputError: unreadable files, or fewer than 64 tokens in all.
    """
    if not sources:
        raise InputError("no calibration text given; name at least one file with --calibration")
    if length < 2 or max_tokens < 1:
        raise InputError(f"length={length} must be at least 2 and max_tokens={max_tokens} positive")
    streams = []
    for source in sources:
        stream = token_stream(source, encode, max_tokens, separator, first=first, answers=answers)
        tokens, counted = with_first(stream.tokens, stream.counted, first, length, max_tokens)
        streams.append(replace(stream, tokens=tokens, counted=counted))
    shares = _shares([len(s.tokens) for s in streams], [s.weight for s in sources], max_tokens)
    how = ({"first": list(first)} if first else {}) | ({"loss_on": "answers"} if answers else {})
    read = list(zip(sources, streams, shares, strict=True))
    batch = replace(
        _packed([(stream, share) for _, stream, share in read], length),
        sources=tuple(source_note(*one) | how for one in read),
    )
    batch = batch if how else replace(batch, counted=None)
    if batch.total < MIN_TOKENS:
        raise InputError(
            f"the calibration text gives only {batch.total} tokens, at least {MIN_TOKENS} are "
            "needed (and 100 000 or more for stable scores); give more text"
        )
    return batch


def _packed(parts: Sequence[tuple[TokenStream, int]], length: int) -> TokenBatch:
    """The first so many tokens of every stream in windows of its own, the last one padded."""
    rows, masks, counts, windows = [], [], [], [-(-share // length) for _, share in parts]
    for (stream, share), number in zip(parts, windows, strict=True):
        shape = number, length
        padded, counted = np.zeros(number * length, np.int32), np.zeros(number * length, bool)
        padded[:share], counted[:share] = stream.tokens[:share], stream.counted[:share]
        rows.append(padded.reshape(shape))
        counts.append(counted.reshape(shape))
        masks.append((np.arange(number * length) < share).reshape(shape))
    files = np.repeat(np.arange(len(parts)), windows)
    rows, masks, counts = map(np.concatenate, (rows, masks, counts))
    return TokenBatch(rows, masks, counted=counts, files=files)


def hold_out(batch: TokenBatch, share: float = 1 / 16) -> tuple[TokenBatch, TokenBatch]:
    """Set some windows aside, evenly over the files, for measuring quality.

    Args:
      batch: windows of calibration text.
      share: fraction of the windows to set aside, at least one window.

    Returns:
      (what is left, what was set aside); nothing is set aside from fewer than four windows.
    """
    count = max(1, round(share * len(batch.tokens))) if len(batch.tokens) >= 4 else 0
    aside = np.zeros(len(batch.tokens), bool)
    aside[np.linspace(0, len(aside) - 1, count + 2)[1:-1].round().astype(int)] = True
    return batch.of(~aside), batch.of(aside)


def _shares(available: list[int], weights: list[float], total: int) -> list[int]:
    """Tokens of each file: proportional to weight, capped by what there is, exact in sum."""
    shares, open_files, left = [0] * len(available), set(range(len(available))), total
    while open_files and left > 0:
        mass = sum(weights[i] for i in open_files)
        full = {i for i in open_files if available[i] <= left * weights[i] / mass}
        if not full:
            exact = {i: left * weights[i] / mass for i in open_files}
            for i in open_files:
                shares[i] = int(exact[i])
            by_remainder = sorted(open_files, key=lambda i: (shares[i] - exact[i], i))
            for i in by_remainder[: left - sum(shares[i] for i in open_files)]:
                shares[i] += 1
            break
        for i in full:
            shares[i] = available[i]
        left -= sum(available[i] for i in full)
        open_files -= full
    return shares
