"""A conversation as a chat template reads it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """One document of chat data.

    Attributes:
      messages: each with `role` and `content` (text, None, or a list of parts), and whatever else
        the row says of it: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`.
      tools: JSON schemas of the functions that may be called; None if the row has none.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
