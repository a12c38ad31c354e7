"""Rows that hold a chat, in the shapes in which chats are published, as conversations."""

import json
from typing import Any

from moe_jax.errors import InputError
from pruning.text.conversation import Conversation

TURNS = ("messages", "conversations", "conversation")  # fields with a list of turns
PAIR = ("prompt", "completion")
BESIDE = ("tools", "system")  # fields beside the turns that belong to them
# Who speaks in ShareGPT's words.
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip


def chat_fields(names: Any) -> tuple[str, ...]:
    """The fields among these names that hold a chat; none if no known shape is there."""
    if found := [name for name in TURNS if name in names]:
        return (found[0],)
    return PAIR if all(name in names for name in PAIR) else ()


def is_chat(value: Any) -> bool:
    """Whether a field's value is a list of turns."""
    return isinstance(value, list) and bool(value) and all(map(_is_turn, value))


def conversation(row: dict[str, Any], fields: tuple[str, ...]) -> Conversation | None:
    """The chat of a row.

    Args:
      row: holds `fields`: one with a list of turns, which may be written as JSON, or a prompt and
        a completion, each text or turns; beside them perhaps `tools` and `system`.
      fields: as `chat_fields` gives them.

    Returns:
      Turns with `role` and `content` and what else they had that is not null; None if nothing is
      said in them.

    Raises:
      InputError: a turn has no speaker or another type; a clause that follows the row's place.
    """
    if fields == PAIR:
        speakers = zip(PAIR, ("user", "assistant"), strict=True)
        turns = [turn for name, role in speakers for turn in _said(row[name], role, name)]
    else:
        turns = _turns(row[fields[0]], fields[0])
    messages = [_message(turn) for turn in turns]
    if not any(_says(message) for message in messages):
        return None
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    tools = _list(row.get("tools"), "tools")
    return Conversation(messages, tools or None)


def _said(value: Any, role: str, name: str) -> list:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _turns(value, name)


def _turns(value: Any, name: str) -> list:
    turns = _list(value, name)
    for turn in turns:
        if not _is_turn(turn):
            raise InputError(
                f"has a turn in {name} that is not an object with role and content, or from and "
                f"value: {str(turn)[:80]}"
            )
    return turns


def _list(value: Any, name: str) -> list:
    """A list, also one that is written as JSON; [] for null and blank text."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, list):
        raise InputError(f"has no list in {name} but {str(value)[:80]!r}")
    return value


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, dict):
        return False
    role = turn.get("role", turn.get("from"))
    return isinstance(role, str) and bool(role.strip())


def _message(turn: dict[str, Any]) -> dict[str, Any]:
    speaker = turn.get("role", turn.get("from"))
    content = turn["content"] if "content" in turn else turn.get("value")
    others = {key: value for key, value in turn.items()
              if value is not None and key not in ("role", "content", "from", "value")}  # fmt: skip
    if speaker == "function_call" and (calls := _calls(content)):
        content, others["tool_calls"] = None, calls
    return {"role": ROLES.get(speaker, speaker), "content": content, **others}  # type: ignore[arg-type]


def _calls(content: Any) -> list[dict[str, Any]]:
    """ShareGPT's function calls, which are JSON in a text."""
    try:
        value = json.loads(content)
    except (TypeError, ValueError, RecursionError):
        return []
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return []
    return [{"type": "function", "function": call} for call in calls]


def _says(message: dict[str, Any]) -> bool:
    content = message["content"]
    is_said = bool(content.strip()) if isinstance(content, str) else bool(content)
    return is_said or bool(message.get("tool_calls"))
