"""Conversations as text: the model's own chat template, rendered as transformers renders it.

A template comes from a stranger, so it runs in jinja2's sandbox, and sees the conversation alone.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_jax.errors import InputError
from moe_jax.json_files import parse_json, read_json
from pruning.text.conversation import Conversation

# What templates take for today, so that the same conversation is the same text in every run.
TODAY = datetime(2026, 1, 1)
ANSWERER = "assistant"
MARK = "\ue000"  # of private use: stands in no text
# Names of what a message reasons; templates read the first, that of gpt-oss the second.
REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a checkpoint.

    Attributes:
      place: where it was found.
      sources: jinja2 text by name: "default", and "tool_use" if there is one for conversations
        with tools.
      variables: what it may name besides the conversation, such as `bos_token`.
    """

    place: str
    sources: Mapping[str, str]
    variables: Mapping[str, str]

    def render(self, conversation: Conversation) -> str:
        """The conversation as text, special tokens spelled out; no answer is asked for.

        Arguments of tool calls that are JSON text become mappings, as templates expect them.

        Raises:
          InputError: the template is no jinja2, or refuses the conversation.
        """
        messages = [_message(message) for message in conversation.messages]
        return self._render(messages, conversation.tools)

    def answers(self, conversation: Conversation) -> list[tuple[int, int]]:
        """Where in the rendered text what the assistant said stands, as [start, end) of characters.

        What a message contributes is what changes if it says something else.
        """
        messages = [_message(message) for message in conversation.messages]
        whole, found = self._render(messages, conversation.tools), []
        for number, message in enumerate(messages):
            if message.get("role") != ANSWERER:
                continue
            other = {"role": ANSWERER, "content": MARK}
            changed = self._render(
                [*messages[:number], other, *messages[number + 1 :]], conversation.tools
            )
            start = _common(whole, changed)
            after = _common(whole[start:][::-1], changed[start:][::-1])
            if start < len(whole) - after:
                found.append((start, len(whole) - after))
        return found

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        try:
            return self._compiled[name].render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=False,
                **self.variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise InputError(
                f"the chat template {self.place} refuses a conversation ({roles[:200]}): "
                f"{error}; leave such rows out, or name a text field with --text-field"
            ) from None

    @cached_property
    def _compiled(self) -> dict[str, jinja2.Template]:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = TODAY.strftime
        try:
            return {name: environment.from_string(text) for name, text in self.sources.items()}
        except jinja2.TemplateError as error:
            raise InputError(
                f"the chat template {self.place} is no jinja2 ({error}); get it again"
            ) from None


def find_template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """The chat template of a checkpoint, as transformers finds it; None if it has none.

    Args:
      folder: the checkpoint.
      settings: its tokenizer_config.json.

    Raises:
      InputError: there are templates, but none that stands for all conversations.
    """
    place, sources = folder / "chat_template.jinja", {}
    if place.is_file():
        sources["default"] = place.read_text(encoding="utf-8")
        more = folder / "additional_chat_templates"
        sources |= {file.stem: file.read_text("utf-8") for file in sorted(more.glob("*.jinja"))}
    else:
        place = folder / "tokenizer_config.json"
        given = settings.get("chat_template")
        if given is None and (folder / "chat_template.json").is_file():
            place = folder / "chat_template.json"
            given = read_json(place).get("chat_template")
        if given is None:
            return None
        try:
            named = isinstance(given, list)
            sources = {o["name"]: o["template"] for o in given} if named else {"default": given}
        except (TypeError, KeyError):
            sources = {}
    if not isinstance(sources.get("default"), str):
        raise InputError(
            f"{place} has no chat template of the name 'default' (found: "
            f"{', '.join(map(str, sources))[:200]}); write one into {folder}/chat_template.jinja"
        )
    variables = {name: _content(token) for name, token in settings.items()
                 if name.endswith("_token") and isinstance(token, str | dict)}  # fmt: skip
    return ChatTemplate(str(place), sources, variables)


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token.get("content", ""))


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: what says nothing is absent, arguments are mappings."""
    said = {key: value for key, value in message.items() if value is not None}
    reasoning = next((said[key] for key in REASONING if key in said), None)
    if reasoning is not None:
        said = {"thinking": reasoning, **said, "reasoning_content": reasoning}
    if isinstance(calls := said.get("tool_calls"), list):
        said["tool_calls"] = [_call(call) for call in calls]
    return said


def _call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if "function" in call:
        return {**call, "function": _call(call["function"])}
    if not isinstance(call.get("arguments"), str):
        return call
    try:
        return {**call, "arguments": parse_json(call["arguments"])}
    except InputError:
        return call  # a model may have said what is no JSON


def _common(one: str, two: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = zip(one, two, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(two)))


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """As `json.dumps`, not escaped for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark answers, is as if it were not there."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
