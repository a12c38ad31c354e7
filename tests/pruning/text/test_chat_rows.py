"""Rows of chat data become conversations, whatever shape they are published in."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from moe_jax.errors import InputError
from pruning.text.conversation import Conversation
from pruning.text.documents import open_documents
from pruning.text.source import TextSource

SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
CALL = {"name": "weather", "arguments": {"city": "Ulm"}}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def read(path, *rows, field="text"):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = open_documents(TextSource(path, field), 10**6)
    return list(found.texts), found.rows


@pytest.mark.parametrize(
    ("row", "field", "wanted"),
    [
        ({"messages": TURNS}, "messages", Conversation(TURNS)),
        ({"messages": json.dumps(TURNS), "instance_id": "x"}, "messages", Conversation(TURNS)),
        ({"prompt": "Hi", "prompt_id": "1", "messages": TURNS}, "messages", Conversation(TURNS)),
        ({"conversations": SHARED}, "conversations", Conversation(TURNS)),
        ({"conversation": TURNS}, "conversation", Conversation(TURNS)),
        ({"prompt": "Hi", "completion": "Hello."}, "prompt+completion", Conversation(TURNS)),
        (
            {"prompt": TURNS[:1], "completion": TURNS[1:]},
            "prompt+completion", Conversation(TURNS),
        ),
        (
            {"messages": TURNS, "tools": TOOLS, "system": "Be brief."},
            "messages",
            Conversation([{"role": "system", "content": "Be brief."}, *TURNS], TOOLS),
        ),
        (
            {"messages": [*TURNS, {"role": "system", "content": "Late."}], "system": "Be brief."},
            "messages",
            Conversation([{"role": "system", "content": "Be brief."}, *TURNS,
                          {"role": "system", "content": "Late."}]),
        ),
        (
            {"messages": [{"role": "system", "content": "First."}, *TURNS], "system": "Be brief."},
            "messages",
            Conversation([{"role": "system", "content": "First."}, *TURNS]),
        ),
        (
            {"conversations": [
                {"from": "bing", "value": "a"}, {"from": "function_response", "value": "b"},
                {"from": "function_call", "value": json.dumps([CALL, CALL])},
                {"from": "function_call", "value": "no JSON"},
                {"from": "function_call", "value": json.dumps([CALL, {"city": "Ulm"}])},
                {"role": "tool", "from": "human", "content": "c", "value": "d", "weight": 0},
            ]},
            "conversations",
            Conversation([
                {"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"},
                {"role": "assistant", "content": None,
                 "tool_calls": [{"type": "function", "function": CALL}] * 2},
                {"role": "assistant", "content": "no JSON"},
                {"role": "assistant", "content": json.dumps([CALL, {"city": "Ulm"}])},
                {"role": "tool", "content": "c", "weight": 0},
            ]),
        ),
        ({"messages": TURNS, "tools": json.dumps(TOOLS)}, "messages", Conversation(TURNS, TOOLS)),
        ({"messages": TURNS, "tools": "", "system": ""}, "messages", Conversation(TURNS)),
        (
            {"messages": [{"role": "assistant", "content": None, "name": None,
                           "tool_calls": [{"function": CALL}]},
                          {"role": "tool", "content": "Rain", "tool_call_id": "1"}]},
            "messages",
            Conversation([{"role": "assistant", "content": None,
                           "tool_calls": [{"function": CALL}]},
                          {"role": "tool", "content": "Rain", "tool_call_id": "1"}]),
        ),
        (
            {"conversations": [{"from": "function_call", "value": json.dumps(CALL)},
                               {"from": "observation", "value": "Rain"}]},
            "conversations",
            Conversation([{"role": "assistant", "content": None,
                           "tool_calls": [{"type": "function", "function": CALL}]},
                          {"role": "tool", "content": "Rain"}]),
        ),
    ],
)  # fmt: skip
def test_a_chat_of_any_shape_is_a_conversation(tmp_path, row, field, wanted):
    texts, rows = read(tmp_path / "a.jsonl", row)
    assert texts == [wanted] and rows.field == field and rows.is_chat


def test_a_text_field_comes_first_and_a_named_field_may_be_a_chat(tmp_path):
    texts, rows = read(tmp_path / "a.jsonl", {"text": "plain", "messages": TURNS})
    assert texts == ["plain"] and not rows.is_chat
    texts, _ = read(tmp_path / "a.jsonl", {"chosen": TURNS, "messages": []}, field="chosen")
    assert texts == [Conversation(TURNS)]
    texts, rows = read(tmp_path / "a.jsonl", {"messages": TURNS, "b": "text"}, field="b")
    assert texts == ["text"]
    with pytest.raises(InputError, match=r"no text in field 'c' \(found: messages, b\)"):
        read(tmp_path / "a.jsonl", {"messages": TURNS, "b": "text"}, field="c")


@pytest.mark.parametrize("value", [[], [1], [{}], ["text"], 5, {"role": "user"}, [*TURNS, 1]])
def test_a_text_field_with_another_value_is_no_chat(tmp_path, value):
    with pytest.raises(InputError, match=r"no text in field 'text' \(found: text, messages\)"):
        read(tmp_path / "a.jsonl", {"text": value, "messages": TURNS})


def test_chats_in_which_nothing_is_said_are_counted(tmp_path):
    empty = [{"messages": None}, {"messages": []}, {"prompt": None, "completion": None},
             {"messages": [{"role": "user", "content": " "}]}, {"conversations": ""}]  # fmt: skip
    texts, rows = read(tmp_path / "a.jsonl", *empty, {"messages": TURNS})
    assert texts == [Conversation(TURNS)] and rows.lacking() == "5 of 6 rows hold no text"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": ["Hi"]}, "a.jsonl:1 has a turn in messages that is not an object with role"),
        ({"messages": [{"content": "Hi"}]}, "not an object with role and content, or from"),
        ({"messages": "Hi"}, "has no list in messages but 'Hi'"),
        ({"messages": TURNS, "tools": "none"}, "has no list in tools"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "holds half of a character"),
    ],
)
def test_a_chat_that_is_none_is_refused_with_its_place(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.jsonl", row)


def test_chats_in_parquet_and_tables_are_the_same(tmp_path):
    table = pyarrow.Table.from_pylist([{"messages": TURNS, "id": 1, "tools": None}] * 2)
    pyarrow.parquet.write_table(table, tmp_path / "a")
    (tmp_path / "b").write_text("prompt,completion\nHi,Hello.\nHi,Hello.\n")
    for name in "ab":
        found = open_documents(TextSource(tmp_path / name), 10**6)
        assert list(found.texts) == [Conversation(TURNS)] * 2
