"""JSON values that lie one after another in a text are those that json.loads gives, one by one."""

import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax.errors import InputError
from pruning.text import json_values
from pruning.text.json_values import JsonText, json_layout

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.text(max_size=20)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3),
    max_leaves=5,
)  # fmt: skip
BLANK = st.text(" \t\r\n\ufeff", max_size=3)


@pytest.fixture(autouse=True, scope="module")
def small_reads():
    """Reads of so few characters that values are cut anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "CHUNK", 5)
        yield


# A number that is no part of another value may be cut between its digits; no row is one.
ROWS = VALUES.filter(lambda value: type(value) not in (int, float))


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ROWS, max_size=5), st.data())
def test_values_are_those_that_were_written(values, data):
    """As an array, and one after another, whatever is blank between them."""
    blank = lambda: data.draw(BLANK)  # noqa: E731
    asciied = data.draw(st.booleans())
    words = [json.dumps(value, ensure_ascii=asciied) for value in values]
    array = f"{blank()}[" + ",".join(f"{blank()}{word}{blank()}" for word in words) + f"]{blank()}"
    objects = [json.dumps({"v": value}, ensure_ascii=asciied) for value in values]
    several = "".join(f"{blank()}{word}" for word in objects) + blank()
    for text, wanted in ((array, values), (several, [{"v": value} for value in values])):
        read = JsonText(io.StringIO(text, newline=""), len(text))
        assert list(read.values()) == wanted and not read.is_full
        assert read.peek() == ""
        with_less = JsonText(io.StringIO(text, newline=""), data.draw(st.integers(0, len(text))))
        found = list(with_less.values())
        assert found == wanted[: len(found)]
        # What follows the limit, if only blank, was left unread.
        assert with_less.is_full or found == wanted


def test_as_many_values_are_read_as_end_within_the_limit():
    text = '[{"a": 1}, {"b": "two"}, {"c": 3}]'
    ends = [at + 1 for at, letter in enumerate(text) if letter == "}"]
    for most in range(len(text) + 1):
        read = JsonText(io.StringIO(text), most)
        assert list(read.values()) == json.loads(text)[: sum(end <= most for end in ends)]
        assert read.is_full == (most < len(text))


@pytest.mark.parametrize(
    ("words", "has_lines"), [('{"a": 1}\n', False), ('{"a":\n1}', True), ('\n "b"', False)]
)
def test_a_value_says_whether_a_line_ends_in_it(words, has_lines):
    read = JsonText(io.StringIO(words), 100)
    read.peek()
    assert read.value() == (json.loads(words), has_lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1 2]", r"is not followed by ',' or '\]', so the array is not whole"),
        ("[1, 2", r"is not followed by ',' or '\]', so the array is not whole"),
        ("[1] 2", "is followed by more than the end of its array"),
        ("[1,, 2]", "is not valid JSON: Expecting value"),
        ('{"a": 1} oops ' + "x" * 50, "is not valid JSON: Expecting value"),
        ('["' + "x" * 100, "is not valid JSON: Unterminated string"),
        ("[" * 100_000, "is nested too deep"),
        ('[{"n": ' + "1" * 5000 + "}]", "is not valid JSON: Exceeds the limit"),
    ],
)
def test_what_is_between_values_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        list(JsonText(io.StringIO(text), len(text)).values())


@pytest.mark.parametrize(
    ("text", "most", "named", "unnamed"),
    [
        ('{"a": 1}\n{"a": 2}', 100, "JSON lines", "JSON lines"),
        (' \n\ufeff{"a": 1} \t\r\n', 100, "JSON lines", "JSON lines"),
        ('{"a": 1}', 100, "JSON lines", "JSON lines"),
        ('{"a":\n1}', 100, "JSON", "JSON"),
        ('{"a":\n1}\n{"a": 2}', 100, "JSON", "JSON"),
        ('{"a": 1} {"a": 2}', 100, "", ""),
        ('{"a": 1} and prose', 100, "", ""),
        ("{a} brace of prose", 100, "", ""),
        ("", 100, "", ""),
        ("prose", 100, "", ""),
        ("5\n6\n", 100, "", ""),
        ('5{"a": 1}', 100, "", ""),
        ('[{"a": 1}, {"a": 2}]', 100, "JSON", "JSON"),
        ('[\n{"a": 1}]', 100, "JSON", "JSON"),
        ('[{"a": 1}', 100, "JSON", "JSON"),
        ('[{"a": 1} then prose', 100, "", ""),
        ('["a", "b"]', 100, "JSON", ""),
        ("[]", 100, "JSON", ""),
        ("[1, 2]", 100, "", ""),
        ('"a"\n"b"', 100, "", ""),
        ('{"a": "' + "x" * 100, 50, "JSON lines", "JSON lines"),
        ('[{"a": "' + "x" * 100, 50, "JSON", "JSON"),
        ('{"a": "' + "x" * 20, 50, "", ""),
        ('{"a": ' + "[" * 100_000, 10**6, "JSON", "JSON"),
    ],
)
def test_the_first_value_says_how_objects_lie(text, most, named, unnamed):
    for is_named, wanted in ((True, named), (False, unnamed)):
        assert json_layout(io.StringIO(text), most, is_named=is_named) == wanted
