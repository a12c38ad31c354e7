"""Documents as tokens, those that a tokenizer puts first, and which of all count in losses."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import InputError
from pruning.text.conversation import Conversation

Encode = Callable[[Any], list[int]]  # of a text, or of a Conversation
Answers = Callable[[Conversation], list[bool]]


class Encoded(NamedTuple):
    """A document as tokens.

    Attributes:
      tokens: its ids.
      counted: which of them count; none that the tokenizer puts first.
      text: what was read, of a conversation its JSON.
    """

    tokens: list[int]
    counted: list[bool]
    text: str


def encoded(
    document: str | Conversation,
    encode: Encode,
    characters: int,
    first: Sequence[int],
    answers: Answers | None,
) -> Encoded:
    """A document as tokens; of a text its first `characters` and before them `first`, of a
    conversation all of it, with what its chat template puts first."""
    if isinstance(document, Conversation):
        tokens = encode(document)
        counted = answers(document) if answers else [True] * len(tokens)
        return Encoded(tokens, counted, json.dumps(asdict(document)))
    text = document[:characters]
    tokens = encode(text)
    tokens = tokens if _begins(tokens, first) else [*first, *tokens]
    counted = [False] * len(first) + [True] * (len(tokens) - len(first))
    return Encoded(tokens, counted, text)


def with_first(
    tokens: np.ndarray, counted: np.ndarray, first: Sequence[int], length: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """A stream with `first` wherever a window begins, unless it does so already.

    Args:
      tokens: int32 [T], the stream.
      counted: bool [T].
      first: tokens that begin a window; none leave the stream as it is.
      length: of a window.
      most: tokens of the result.

    Returns:
      (tokens, counted), of at most `most`.

    Raises:
      InputError: a window has no room behind `first`.
    """
    if not first:
        return tokens, counted
    if length <= len(first):
        raise InputError(
            f"window={length} has no room for text behind the {len(first)} tokens that the "
            "tokenizer puts first; choose a longer --window"
        )
    found, marks, start = [], [], 0
    while start < len(tokens) and len(found) < most:
        put = () if _begins(tokens[start:], first) else first
        end = start + length - len(put)
        found += [*put, *tokens[start:end]]
        marks += [*[False] * len(put), *counted[start:end]]
        start = end
    return np.asarray(found[:most], np.int32), np.asarray(marks[:most], bool)


def _begins(tokens: Sequence[int] | np.ndarray, first: Sequence[int]) -> bool:
    return list(tokens[: len(first)]) == list(first)
