"""Text to batches of tokens of one shape: files, JSON lines and weighted mixtures of them."""

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from moe_jax.errors import InputError

Encode = Callable[[str], list[int]]
MIN_TOKENS = 64


@dataclass(frozen=True)
class TextSource:
    """One calibration file: its path, the JSON field that holds the text, and its weight."""

    path: Path
    field: str = "text"
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str, field: str = "text") -> "TextSource":
        """Read `FILE` or `FILE=WEIGHT`.

        Raises:
          InputError: if the weight is not a positive number.
        """
        path, separator, weight = text.rpartition("=")
        if not separator or Path(text).exists():
            return cls(Path(text), field)
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if value <= 0:
            raise InputError(
                f"calibration={text!r}: the weight after '=' must be a positive number; write "
                "FILE or FILE=2.5"
            )
        return cls(Path(path), field, value)


@dataclass(frozen=True)
class TokenBatch:
    """Packed windows.

    Attributes:
      tokens: int32 [B, T].
      valid: bool [B, T]; padding is False.
      sources: per file: path, sha256, documents, tokens used.
    """

    tokens: np.ndarray
    valid: np.ndarray
    sources: tuple[dict, ...] = ()

    @property
    def total(self) -> int:
        """Number of valid tokens."""
        return int(self.valid.sum())


def read_documents(source: TextSource) -> list[str]:
    """Documents of a file: one per line of .jsonl or .jsonl.gz, else the whole file as one.

    Raises:
      InputError: missing or empty file, text that is not UTF-8, a line without the named field.
    """
    if not source.path.is_file():
        raise InputError(f"text file {source.path} does not exist; check the path")
    raw = source.path.read_bytes()
    try:
        if source.path.suffix == ".gz":
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{source.path} is not whole gzip ({error}); download it again") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{source.path} is not UTF-8 text ({error}); convert it first") from None
    if ".jsonl" in source.path.suffixes:
        # Not splitlines, which also cuts at characters that a JSON string may hold.
        documents = [
            _document(line, source, number)
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    else:
        # A text is the same whatever system wrote it.
        documents = [text.replace("\r\n", "\n").replace("\r", "\n")]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"{source.path} holds no text; give a file with at least a few pages")
    return documents


def _document(line: str, source: TextSource, number: int) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{source.path}:{number} is not JSON ({error}); expected JSON lines"
        ) from None
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not isinstance(value.get(source.field), str):
        known = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise InputError(
            f"{source.path}:{number} has no text in field {source.field!r} (found: {known}); name "
            "the right field with --text-field"
        )
    return value[source.field]


def token_stream(
    source: TextSource, encode: Encode, limit: int, separator: int | None
) -> tuple[np.ndarray, int]:
    """First tokens of a file's documents in a fixed random order, joined by `separator`.

    Args:
      source: the file.
      encode: text -> token ids, without special tokens.
      limit: most tokens to read.
      separator: token between documents; None for none.

    Returns:
      (token ids int32, number of documents that were read).

    Raises:
      InputError: as `read_documents`.
    """
    tokens: list[int] = []
    documents = 0
    texts = read_documents(source)
    # Files are often sorted by subject: the first tokens of one would be a sample of one subject.
    order = np.random.default_rng(0).permutation(len(texts))
    for document in (texts[i] for i in order):
        if documents and separator is not None:
            tokens.append(separator)
        # A token covers at least one character often enough: this bounds the work on huge files.
        tokens.extend(encode(document[: 16 * limit]))
        documents += 1
        if len(tokens) >= limit:
            break
    return np.asarray(tokens[:limit], np.int32), documents


def calibration_batch(
    sources: Sequence[TextSource],
    encode: Encode,
    *,
    length: int,
    max_tokens: int,
    separator: int | None = None,
) -> TokenBatch:
    """Pack documents into windows.

    Every file contributes tokens in proportion to its weight; a file that is too short gives all
    it has and the others fill up. Documents are taken in a fixed random order and joined by
    `separator`.

    Args:
      sources: the files.
      encode: text -> token ids, without special tokens.
      length: T, window length.
      max_tokens: bound on the tokens over all files.
      separator: token between documents, usually end-of-text; None for none.

    Returns:
      Windows of `length`; only the last window of each file may hold padding.

    Raises:
      InputError: unreadable files, or fewer than 64 tokens in all.
    """
    if not sources:
        raise InputError("no calibration text given; name at least one file with --calibration")
    if length < 2 or max_tokens < 1:
        raise InputError(f"length={length} must be at least 2 and max_tokens={max_tokens} positive")
    streams = [token_stream(source, encode, max_tokens, separator) for source in sources]
    shares = _shares([len(s) for s, _ in streams], [s.weight for s in sources], max_tokens)
    rows, masks, notes = [], [], []
    for source, (stream, documents), share in zip(sources, streams, shares, strict=True):
        windows = -(-share // length)
        padded = np.zeros(windows * length, np.int32)
        padded[:share] = stream[:share]
        rows.append(padded.reshape(windows, length))
        masks.append((np.arange(windows * length) < share).reshape(windows, length))
        digest = sha256(source.path.read_bytes()).hexdigest()
        notes.append({"path": str(source.path), "sha256": digest, "weight": source.weight,
                      "documents": documents, "tokens": share})  # fmt: skip
    batch = TokenBatch(np.concatenate(rows), np.concatenate(masks), tuple(notes))
    if batch.total < MIN_TOKENS:
        raise InputError(
            f"the calibration text gives only {batch.total} tokens, at least {MIN_TOKENS} are "
            "needed (and 100 000 or more for stable scores); give more text"
        )
    return batch


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
    left, held = (
        TokenBatch(batch.tokens[rows], batch.valid[rows], batch.sources) for rows in (~aside, aside)
    )
    return left, held


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
