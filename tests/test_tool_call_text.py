"""The text of tool calls: what they say, and why it is none."""

from __future__ import annotations

import pytest

from mlxqwen.chat.tool_call_text import parse_tool_calls
from mlxqwen.files.json_file import MAX_DEPTH


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ('{"name": "f"}', "f", "{}"),
        ('\n{ "name" : "f" , "arguments" : { "a" : [ 1 ] } }\n', "f", '{ "a" : [ 1 ] }'),
        ('{"id": {"arguments": {}}, "arguments": {"a": 1}, "name": "f"}', "f", '{"a": 1}'),
        ('{"n\\u0061me": "\\u00e9", "\\u0061rguments": {"a": 1}}', "é", '{"a": 1}'),
        ('{"name": "f", "arguments": " {\\"a\\":\\t1} "}', "f", ' {"a":\t1} '),
        ('{"name": "f", "arguments": null}', "f", "{}"),
        ('{"name": "f", "parameters": {"a": 1}}', "f", '{"a": 1}'),
        ('{"name": "f", "parameters": "{\\"a\\": 1}"}', "f", '{"a": 1}'),
        ('{"name": "f", "parameters": {"a": 1}, "arguments": {"b": 1}}', "f", '{"b": 1}'),
        ('```json\n{"name": "f", "arguments": {"a": "```"}}\n```', "f", '{"a": "```"}'),
        ('```\r\n{"name": "f"}```', "f", "{}"),
        ('{"name": "f",\n"arguments":\n{"a":\n"\t\\"\r\n"}}', "f", '{"a":\n"\\t\\"\\r\\n"}'),
        ('{"name": "f", "arguments": {"a": 1.10, "b": 1E2}}', "f", '{"a": 1.10, "b": 1E2}'),
    ],
)
def test_arguments_are_the_text_that_stands_there(text: str, name: str, arguments: str) -> None:
    assert parse_tool_calls(text) == [(name, arguments)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "found an empty list, expected an object"),
        ("1", "found a number, expected an object"),
        ('[{"name": "f"}, []]', "found a list, expected an object"),
        ("", "Expecting value"),
        ("```\n```", "Expecting value"),
        ('```json\n{"name": "f"}', "Expecting value"),
        ('{"name": "f", "arguments": {"a": "\x0b"}}', "control character"),
        ('{"name": "f", "parameters": 1}', "parameters: found a number, expected an object"),
        ('{"name": "f", "arguments": 1, "parameters": {}}', "arguments: found a number, expected an object"),
        ('{"parameters": {}}', "name: found keys 'parameters', expected text"),
        ('{"name": null}', "name: found null, expected text"),
        ('{"name": ""}', "name: found empty text, expected text"),
        ('{"name": "f", "args": {}}', "arguments: found keys 'name', 'args' instead"),
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
        parse_tool_calls(text)


def test_a_list_is_several_calls() -> None:
    text = '[ {"name": "f", "arguments": {"a": [1, {"]": 2}]}} , {"name": "g", "arguments": {"a\n": 1}}\n]'
    assert parse_tool_calls(text) == [("f", '{"a": [1, {"]": 2}]}'), ("g", '{"a\\n": 1}')]


def test_the_depth_of_json_is_bounded() -> None:
    deepest = '{"a":' * (MAX_DEPTH - 2) + "1" + "}" * (MAX_DEPTH - 2)
    assert parse_tool_calls(f'{{"name": "f", "arguments": {deepest}}}') == [("f", deepest)]
    with pytest.raises(ValueError, match="nested deeper"):
        parse_tool_calls(f'{{"name": "f", "arguments": [{deepest}]}}')
