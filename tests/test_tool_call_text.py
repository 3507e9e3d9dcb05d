"""One tool call: what it says, and how far its text reaches."""

from __future__ import annotations

import pytest

from mlxqwen.chat.tool_call_text import MAX_NUMBER_LENGTH, ToolCallScanner, parse_tool_call
from mlxqwen.files.json_file import MAX_DEPTH


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ('{"name": "f"}', "f", "{}"),
        ('\n{ "name" : "f" , "arguments" : { "a" : [ 1 ] } }\n', "f", '{ "a" : [ 1 ] }'),
        ('{"id": {"arguments": {}}, "arguments": {"a": 1}, "name": "f"}', "f", '{"a": 1}'),
        ('{"n\\u0061me": "\\u00e9", "\\u0061rguments": {"a": 1}}', "é", '{"a": 1}'),
        ('{"name": "f", "arguments": " {\\"a\\":\\t1} "}', "f", ' {"a":\t1} '),
        ('{"name": "f", "arguments": {"a": 1.10, "b": 1E2}}', "f", '{"a": 1.10, "b": 1E2}'),
    ],
)
def test_arguments_are_the_text_that_stands_there(text: str, name: str, arguments: str) -> None:
    assert parse_tool_call(text) == (name, arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "found a list, expected an object"),
        ('{"parameters": {}}', "name: found keys 'parameters', expected text"),
        ('{"name": null}', "name: found null, expected text"),
        ('{"name": ""}', "name: found empty text, expected text"),
        ('{"name": "f", "parameters": {}}', "arguments: found keys 'name', 'parameters' instead"),
        ('{"name": "f", "arguments": 1}', "arguments: found a number, expected an object"),
        ('{"name": "f", "arguments": "true"}', "arguments: found true or false, expected an object"),
        ('{"name": "f", "arguments": ""}', "Expecting value"),
        ('{"name": "f", "arguments": "{\\"a\\": NaN}"}', "NaN is not JSON"),
        ('{"name": "f", "arguments": "{\\"a\\": 1, \\"a\\": 1}"}', "'a' appears twice"),
        ('{"name": "f", "arguments": "{\\"a\\": \\"\\\\ud800\\"}"}', "unpaired surrogate"),
        ('{"name": "\\udfff"}', "unpaired surrogate"),
        ('{"name": "f", "arguments": {"a": 1e999}}', "too large"),
        ('{"name": "f", "arguments": {"a": ' + "1" * 41 + "}}", "41 digits"),
        ('{"name": "f", "arguments": "' + "[" * 200_000 + '"}', "nested deeper"),
    ],
)
def test_what_is_no_call_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_tool_call(text)


def test_the_scanner_ends_behind_the_tag() -> None:
    scanner = ToolCallScanner()
    assert scanner.feed('<tool_call>{"a": "</tool_call>', 11) == 30
    assert scanner.undecided
    assert scanner.feed('"}</tool_call>and on') == 14
    assert scanner.complete
    assert scanner.taken == '{"a": "</tool_call>"}</tool_call>'


@pytest.mark.parametrize(
    ("text", "at", "intact"),
    [
        ('{"a": 1]', 7, 7),
        ('{"a" 1}', 5, 5),
        ('{"a": 1}</tool_<tool_call>', 15, 8),  # the tag that never came may be another's beginning
        ('{"a": "</tool_call> " "', 22, 19),
        ('{"a": 1}</tool_ call>', 15, 8),
        ('{"a": 1,}', 8, 8),
        ('{"a": "\\x', 8, 8),
        ('{"a": "\\u00g0', 11, 11),
        ('{"a": "\\u00ag', 12, 12),
        ('{"a": "\t', 7, 7),
        ('{"a": ' + "9" * (MAX_NUMBER_LENGTH + 1), MAX_NUMBER_LENGTH + 6, MAX_NUMBER_LENGTH + 6),
        ('{"a":' * (MAX_DEPTH + 1), 5 * MAX_DEPTH, 5 * MAX_DEPTH),
    ],
)
def test_a_broken_call_ends_where_it_breaks(text: str, at: int, intact: int) -> None:
    for size in (1, len(text)):
        scanner = ToolCallScanner()
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert sum(scanner.feed(piece) for piece in pieces if scanner.undecided) == at
        assert scanner.problem is not None
        assert scanner.taken == text[:at]
        assert scanner.intact == intact


def test_bounds_leave_room() -> None:
    for text in ('{"a": ' + "9" * MAX_NUMBER_LENGTH + "}", '{"a":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH):
        scanner = ToolCallScanner()
        scanner.feed(text + "</tool_call>")
        assert scanner.complete
    deepest = '{"a":' * (MAX_DEPTH - 2) + "1" + "}" * (MAX_DEPTH - 2)
    assert parse_tool_call(f'{{"name": "f", "arguments": {deepest}}}') == ("f", deepest)
