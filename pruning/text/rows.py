"""A row of a table or of JSON as a document: a field, several joined, or a chat."""

import json
from collections.abc import Collection
from typing import Any

from moe_jax.errors import InputError
from pruning.text.chat_rows import BESIDE, PAIR, TURNS, chat_fields, conversation, is_chat
from pruning.text.conversation import Conversation
from pruning.text.source import USUAL, TextSource

Document = str | Conversation


class Rows:
    """Makes documents of rows, and counts.

    Attributes:
      source: says what of a row is meant.
      seen: rows until now.
      empty: those of them without text: null or blank.
      marks: byte-order marks that were left out.
      field: what the first document was made of: a field, "prompt+completion" or the template; None
        where rows are text themselves.
      is_chat: whether some document is a conversation.
    """

    def __init__(self, source: TextSource):
        self.source = source
        self.seen = self.empty = self.marks = 0
        self.field: str | None = None
        self.is_chat = False

    def read(self, row: Any, place: str) -> list[Document]:
        """The document of a row; none if it holds no text.

        Raises:
          InputError: the row has not the fields that are meant; it begins with `place`.
        """
        self.seen += 1
        document, field = self._document(row, place)
        if document is None or (isinstance(document, str) and not document.strip()):
            self.empty += 1
            return []
        _require_whole(document, place)
        self.field = self.field or field
        self.is_chat |= isinstance(document, Conversation)
        return [document]

    def lacking(self) -> str:
        """A phrase on what rows lacked, "" if nothing."""
        marks = "byte-order mark" if self.marks == 1 else "byte-order marks"
        said = [f"{self.empty:,} of {self.seen:,} rows hold no text"] if self.empty else []
        said += [f"{self.marks} {marks} left out"] if self.marks else []
        return ", ".join(said)

    def _document(self, row: Any, place: str) -> tuple[Document | None, str | None]:
        source = self.source
        if isinstance(row, str) and not source.template:
            return row, None
        if not isinstance(row, dict):
            raise self._no_text(place, type(row).__name__, {})
        if source.template:
            return self._joined(row, place), source.template
        if source.field in row:
            value = row[source.field]
            if value is None or (isinstance(value, str) and source.field not in TURNS):
                return value, source.field
            fields = (source.field,) if is_chat(value) or source.field in TURNS else ()
        else:
            fields = chat_fields(row) if source.field == USUAL else ()
        if not fields:
            raise self._no_text(place, _names(row), row)
        try:
            return conversation(row, fields), "+".join(fields)
        except InputError as error:
            raise InputError(f"{place} {error}; correct or remove the row") from None

    def _joined(self, row: dict[str, Any], place: str) -> str:
        fields = self.source.template_fields
        if missing := [name for name in fields if name not in row]:
            raise InputError(
                f"{place} has no field {missing[0]!r}, which template={self.source.template!r} "
                f"names (found: {_names(row)}); name one of these, and write {{{{ and }}}} for "
                "braces"
            )
        values = {name: _words(row[name]) for name in fields}
        is_empty = not any(value.strip() for value in values.values())
        return "" if is_empty else self.source.joined(values.__getitem__)

    def _no_text(self, place: str, found: str, row: dict[str, Any]) -> InputError:
        field, path = self.source.field, self.source.path
        texts = [name for name, value in row.items() if isinstance(value, str)] or ["NAME"]
        joined = "\\n".join(f"{{{name}}}" for name in texts[:3])
        return InputError(
            f"{place} has no text in field {field!r} (found: {found}); name the right field with "
            f"--text-field or {path}:field={texts[0]}, or join several with "
            f"{path}:template='{joined}'"
        )


def wanted_fields(source: TextSource) -> list[tuple[str, ...]]:
    """Sets of fields of which one is enough to make a document."""
    if source.template:
        return [source.template_fields]
    chats = [(name,) for name in TURNS] + [PAIR] if source.field == USUAL else []
    return [(source.field,), *chats]


def needed_columns(source: TextSource, names: Collection[str]) -> list[str]:
    """Of a table's columns those that documents are made of; all where none of them is there."""
    for fields in wanted_fields(source):
        if all(name in names for name in fields):
            beside = () if source.template else BESIDE
            return [name for name in names if name in (*fields, *beside)]
    return list(names)


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row))[:1000]


def _words(value: Any) -> str:
    """A value inside a template: text as it is, "" for null, all else as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def _require_whole(document: Document, place: str) -> None:
    text = document if isinstance(document, str) else json.dumps(
        [document.messages, document.tools], ensure_ascii=False, default=str
    )  # fmt: skip
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place} holds half of a character ({error}); correct or remove the line"
        ) from None
