"""Replies: the same result for every cut, nothing held back without need, nothing lost."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations, count
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlxqwen.chat import splitter
from mlxqwen.chat.open_call import OpenCall
from mlxqwen.chat.reply import (
    Delta,
    Reply,
    ToolCall,
    ToolCallDelta,
    join_deltas,
)
from mlxqwen.chat.reply_parser import ReplyParser, TagLexer, parse_reply
from mlxqwen.chat.splitter import MAX_WARNINGS, Splitter
from mlxqwen.chat.tags import Tag
from mlxqwen.errors import OptionError

# Text of a thinking model → reasoning and content.
THINKING: list[tuple[str, str | None, str]] = [
    ("", None, ""),
    ("\n\n", None, ""),
    ("<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("\n\n<think>Hm.</think>Yes.", "Hm.", "Yes."),
    ("<think>\n\n</think>\n\nYes.", None, "Yes."),
    ("<think></think>", None, ""),
    ("</think>Yes.", None, "Yes."),
    ("Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("<think>cut off", "cut off", ""),
    ("<think>cut off\n", "cut off", ""),
    ("cut off </thin", "cut off </thin", ""),
    ("<thin", "<thin", ""),
    ("<think>", None, ""),
    ("<thinking>a</think>b", "<thinking>a", "b"),
    ("<think >a</think >b</think>c", "<think >a</think >b", "c"),
    ("<think>a<</think>b", "a<", "b"),
    ("<think>a</</think>b", "a</", "b"),
    ("<think>a</</</think>b", "a</</", "b"),
    ("<think>a</Think>b</think>c", "a</Think>b", "c"),
    ("<think>a<think>b</think>c</think>d", "a<think>b", "c</think>d"),
    ("<think><think>a</think>b", "<think>a", "b"),
    ("a<think>b</think>c", "a<think>b", "c"),
    ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
    ("<think>a\n\nb\n\n\n</think>\n\nc\n\nd\n\n", "a\n\nb", "c\n\nd"),
    ("<think>\n a \n</think>\n b \n", " a ", " b "),
    ("<think>a\n<\n</think>b\n<", "a\n<", "b\n<"),
    ("<think>a</think>\n\n<tool_call>\n{}\n</tool_call>\n", "a", "<tool_call>\n{}\n</tool_call>"),
    ("<think>想</think>答🙂", "想", "答🙂"),
]
# The same without thinking: all of it is content.
CONTENT = [
    ("", ""),
    ("\n\nYes.\n", "Yes."),
    ("a\n\nb", "a\n\nb"),
    ("<think>a</think>b", "<think>a</think>b"),
    ("a</think>b", "a</think>b"),
    ("<thin", "<thin"),
]
# Free to think: a reply that opens no think block is content.
FREE = [
    ("", None, ""),
    ("\n\n<think>Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("<think>\n\n</think>\n\nYes.", None, "Yes."),
    ("<think>cut off", "cut off", ""),
    ("Yes.\n", None, "Yes."),
    ("<thin", None, "<thin"),
    ("a</think>b", None, "a</think>b"),
    ("a<think>b</think>c", None, "a<think>b</think>c"),
]
CASES: list[tuple[str, bool | None, Reply]] = [
    (text, None, Reply(reasoning, content)) for text, reasoning, content in FREE
]
CASES += [(text, True, Reply(reasoning, content)) for text, reasoning, content in THINKING]
CASES += [(text, False, Reply(None, content)) for text, content in CONTENT]

NOW = '<tool_call>{"name": "now"}</tool_call>'
# Text of an answer of a model with tools → content and calls, by name and arguments.
CALLS: list[tuple[str, str, list[tuple[str, str]]]] = [
    ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", '{"a": 1}')]),
    (f"{NOW}\n{NOW}\n", "", [("now", "{}")] * 2),
    (f"Look.\n\n{NOW}", "Look.", [("now", "{}")]),
    (f"\n{NOW}\nand\n{NOW}\n", "and", [("now", "{}")] * 2),
    (f"a\n{NOW}\n\n{NOW}\n\nb\n", "a\nb", [("now", "{}")] * 2),
    (f"a{NOW}b", "ab", [("now", "{}")]),
    ('<tool_call>{"arguments":{"b":[{"c":"}"}]},"name":"f"}</tool_call>', "", [("f", '{"b":[{"c":"}"}]}')]),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ('<tool_call>{"name":"f","arguments":{"a":"</tool_call>"}}</tool_call>', "", [("f", '{"a":"</tool_call>"}')]),
    ('<tool_call>{"name":"f","arguments":{"a":"\\"<tool_call>{"}}</tool_call>', "", [("f", '{"a":"\\"<tool_call>{"}')]),
    (
        '<tool_call>{"name":"f","arguments":{"é":"\\ud83d\\ude00\\\\"}}</tool_call>',
        "",
        [("f", '{"é":"\\ud83d\\ude00\\\\"}')],
    ),
    (
        '<tool_call>{"name":"f","arguments":{"a":[-1.5e3,true,null]}}</tool_call>',
        "",
        [("f", '{"a":[-1.5e3,true,null]}')],
    ),
    ("a <tool_calls> </tool_call> <tool_cal", "a <tool_calls> </tool_call> <tool_cal", []),
    (f"<<tool_call><tool_call>{NOW[11:]}<", "<<tool_call><", [("now", "{}")]),
    ("use <tool_call> here", "use <tool_call> here", []),
    ("write `<tool_call>` here", "write `<tool_call>` here", []),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', "", [("f", '{"a": 1}')]),
    (
        '<tool_call>{"name": "f", "arguments": {"b": 1}, "parameters": {"a": 1}}</tool_call>',
        "",
        [("f", '{"b": 1}')],
    ),
    ('<tool_call>{"name": "f", "arguments": {"a": "\n\t\r"}}</tool_call>', "", [("f", '{"a": "\\n\\t\\r"}')]),
    (
        '<tool_call>\n{"name": "f", "arguments":\n\t{"a":\n"\\"\n"}}\n</tool_call>',
        "",
        [("f", '{"a":\n"\\"\\n"}')],
    ),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\n\\"}"}</tool_call>', "", [("f", '{"a": "\\n"}')]),
    (
        '<tool_call>[{"name": "f", "arguments": {"a": [1]}},\n{"name": "g"}]</tool_call>',
        "",
        [("f", '{"a": [1]}'), ("g", "{}")],
    ),
    ('<tool_call>\n```json\n{"name": "f", "arguments": {"a": "```"}}\n```\n</tool_call>', "", [("f", '{"a": "```"}')]),
    ('<tool_call>```\n[{"name": "f"}]```</tool_call>b', "b", [("f", "{}")]),
    ('a <tool_call>{"name": "f"}', "a ", [("f", "{}")]),
    (f'{NOW}<tool_call>\n{{"name": "f"}}\n', "", [("now", "{}"), ("f", "{}")]),
    ("<think>\na\n</think>", "<think>\na\n</think>", []),
]
# What is no call, kept as it is.
BROKEN = [
    "<tool_call></tool_call>",
    "<tool_call>\n\n</tool_call>",
    "<tool_call>now</tool_call>",
    "<tool_call>[]</tool_call>",
    "<tool_call>{}</tool_call>",
    '<tool_call>{"name": "f"}, {}</tool_call>',
    '<tool_call>{"name": "f"}}</tool_call>',
    '<tool_call>{"name": "f"]</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": .5}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": True}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": -Infinity}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": "\\x"}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 1, "a": 2}}</tool_call>',
    '<tool_call>{"name": "f", "name": "g"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "a"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>',
    '<tool_call>{"name": ""}</tool_call>',
    '<tool_call>{"name": 1}</tool_call>',
    '<tool_call>{"arguments": {}}</tool_call>',
    "<tool_call>{'name': 'f'}</tool_call>",
    '<tool_call>{"name": "f", "arguments": {"a": "}}</tool_call>',
    '<tool_call>{"name": "f}</tool_call>',
    '<tool_call>[{"name": "f"}, 1]</tool_call>',
    '<tool_call>[{"name": "f"} {"name": "f"}]</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": "\x01"}}</tool_call>',
    '<tool_call>```json\n{"name": "f"}</tool_call>',
    '<tool_call>```json\n{"name": "f",}\n```</tool_call>',
    '<tool_call>{"name": "f"}</tool_call',
    '<tool_call>{"name": "f"',
    '<tool_call>{"name": "f',
    "<tool_call>",
]

PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<thi", "nk>", "</", "<", ">", "\n", "\n\n", " ", "a", "b c", "é"]),
    max_size=12,
)


SPLIT_TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_", "call>", "</tool_call", "<tool_calls>"]
SPLIT_JSON = ['{"name": "f"', ', "arguments": ', '{"a": 1}', '"', '\\"', "\\", "{", "}", "[", "]", ",", ":", '{"', '"}']
SPLIT_JSON += ["1", "1x", "NaN", "null", "name", '\\"a\\": 1', "\\u00", "e9", '"arguments": {"q": "']
CALL_PIECES = st.lists(
    st.sampled_from(
        [*SPLIT_TAGS, *SPLIT_JSON, NOW, "<", ">", "\n", " ", "a", "é", '<tool_call>{"a":"', '"}</tool_call>']
    ),
    max_size=25,
)
MODES = st.sampled_from([True, False, None])


def numbered() -> Callable[[], str]:
    numbers = count()
    return lambda: str(next(numbers))


def calls_of(pairs: Iterable[tuple[str, str]]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(str(i), name, arguments) for i, (name, arguments) in enumerate(pairs))


def joined(deltas: Iterable[Delta]) -> Reply:
    deltas = list(deltas)
    for delta in deltas:
        assert bool(delta.reasoning) + bool(delta.content) + bool(delta.tool_call) == 1, "one of them, and never empty"
    reasons = [bool(delta.reasoning) for delta in deltas]
    assert reasons == sorted(reasons, reverse=True), "no reasoning behind anything else"
    calls = [delta.tool_call for delta in deltas if delta.tool_call]
    assert [call.index for call in calls] == list(range(len(calls)))
    return Reply(
        "".join(d.reasoning or "" for d in deltas) or None,
        "".join(d.content or "" for d in deltas),
        tuple(ToolCall(call.id or "", call.name or "", call.arguments) for call in calls),
    )


def in_pieces(pieces: Sequence[str], thinking: bool | None, tools: bool = False) -> tuple[Reply, list[str]]:
    parser = ReplyParser(thinking=thinking, tools=tools, new_id=numbered())
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return joined(deltas + parser.finish()), parser.warnings


def whole(text: str, thinking: bool | None, tools: bool = False) -> Reply:
    reply = parse_reply(text, thinking=thinking, tools=tools)
    assert len({call.id for call in reply.tool_calls}) == len(reply.tool_calls)
    assert all(re.fullmatch("call_[0-9a-f]{24}", call.id) for call in reply.tool_calls)
    return replace(reply, tool_calls=calls_of((call.name, call.arguments) for call in reply.tool_calls))


def by_the_book(text: str, thinking: bool | None, tools: bool = False, *, read: int = 0) -> Reply:
    """The rules for a whole text; up to `read`, tags are tags in strings, too."""
    thinks = thinking or (thinking is None and text.lstrip("\n").startswith("<think>"))
    start = len(text) - len(text.lstrip("\n")) if thinks else 0
    start += len("<think>") if thinks and text.startswith("<think>", start) else 0
    calls: list[tuple[str, str]] = []
    reasoning, at = "", start
    if thinks:
        reasoning, at, read, calls = thought_by_the_book(text, start, tools, read)
    content = text[at:]
    if tools and not calls:
        content, calls = calls_by_the_book(text, at, read=read)
    return Reply(reasoning.strip("\n") or None, content.strip("\n"), calls_of(calls))


def thought_by_the_book(text: str, start: int, tools: bool, read: int) -> tuple[str, int, int, list[tuple[str, str]]]:
    """The thought, where the reply goes on, up to where tags are tags in strings, too, and the calls that end it."""
    at = start
    first: int | None = None  # of the calls behind which nothing has been said yet
    held: list[tuple[str, str]] = []
    while tag := re.compile("</think>|<tool_call>" if tools else "</think>").search(text, at):
        if text[at : tag.start()].strip(" \t\n\r"):
            first, held = None, []
        if tag[0] == "</think>":
            if first is not None and not text[tag.end() :].strip(" \t\n\r"):
                return text[start:first], len(text), read, held
            return text[start : tag.start()], tag.end(), read, []
        at, calls, read_now = call_by_the_book(text, tag.end(), is_due=True, read=read)
        if calls is not None:
            first, held = tag.start() if first is None else first, held + calls
        else:
            first, held, read = None, [], max(read, read_now)
    if first is not None and not text[at:].strip(" \t\n\r"):
        return text[start:first], len(text), read, held
    return text[start:], len(text), read, []


def calls_by_the_book(text: str, at: int, *, read: int) -> tuple[str, list[tuple[str, str]]]:
    """An answer without its calls, and those. A NUL, which no text here has, stands for a call meanwhile."""
    content, calls = "", []
    while tag := re.compile("<tool_call>").search(text, at):
        content += text[at : tag.start()]
        at, made, read_now = call_by_the_book(text, tag.end(), is_due=False, read=read)
        read = max(read, read_now)
        content += text[tag.start() : at] if made is None else "\0"
        calls += made or []
    content = (content + text[at:]).strip("\n\0")
    return re.sub("\n*\0[\n\0]*", lambda found: "\n" if "\n" in found[0] else "", content), calls


def call_by_the_book(
    text: str, start: int, *, is_due: bool, read: int
) -> tuple[int, list[tuple[str, str]] | None, int]:
    """Where what begins with a call's tag ends, the calls, if it is any, and how far it was read.

    Args:
        is_due: whether `</think>` would be a tag.
        read: up to where tags are tags in strings, too.
    """
    ends = re.compile("</tool_call>|<tool_call>|</think>" if is_due else "</tool_call>|<tool_call>")
    broken, strings = json_by_the_book(text, start)
    tags = (tag for tag in ends.finditer(text, start) if tag.start() <= broken)
    tag = next((tag for tag in tags if tag.start() < read or not strings[tag.start() - start]), None)
    if tag is None and broken < len(text):
        # What stands where it breaks is text as well, but for a tag.
        first = ends.search(text, start, broken)
        if first is None:
            return broken, None, broken
        return (first.end() if first[0] == "</tool_call>" else first.start()), None, broken
    end = len(text) if tag is None else tag.start()
    is_closed = tag is not None and tag[0] == "</tool_call>"
    calls = checked_calls(text[start:end]) if tag is None or is_closed else None
    if calls is not None:
        return (end if tag is None else tag.end()), calls, read
    stop = tag.end() if tag is not None and is_closed else end
    first = ends.search(text, start, stop)
    if first is None:
        return stop, None, stop
    return (first.end() if first[0] == "</tool_call>" else first.start()), None, stop


def json_by_the_book(text: str, start: int) -> tuple[int, list[bool]]:
    """Where what begins at `start` can no longer be JSON in a call, and for each place whether it is in a string."""
    strings, opened, closed, quoted, escaped = [], 0, 0, False, False
    is_fenced = text[start:].lstrip(" \t\r\n").startswith("```")
    for at in range(start, len(text)):
        character, before = text[at], text[start:at].strip(" \t\r\n")
        strings.append(quoted)
        if quoted:
            quoted, escaped = escaped or character != '"', character == "\\" and not escaped
        elif is_fenced or (character == "`" and before in ("", "`", "``")):
            quoted = character == '"'
        elif character in " \t\r\n" and before not in ("`", "``"):
            pass
        elif character not in ('{}[]":,+-.0123456789truefalsenullE' if opened > closed else "" if before else "{["):
            return at, strings
        else:
            quoted, opened, closed = character == '"', opened + (character in "{["), closed + (character in "}]")
    return len(text), [*strings, quoted]


def checked_calls(text: str) -> list[tuple[str, str]] | None:
    text = re.sub(r"\A[ \t\r\n]*```[-\w]*[ \t]*\n(.*)```[ \t\r\n]*\Z", r"\1", text, flags=re.DOTALL)
    text = escaped(text)
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if isinstance(value, dict):
        call = checked_call(text)
        return None if call is None else [call]
    if not isinstance(value, list) or not value:
        return None
    # One by one, cut where the text before and behind is a list as well.
    ends = [0, *(i for i, c in enumerate(text) if c == "," and loads(text[:i] + "]") and loads("[" + text[i + 1 :]))]
    calls = [
        checked_call(
            text[i:j].strip(" \t\r\n,").removeprefix("[" if i == 0 else "").removesuffix("]" if j == len(text) else "")
        )
        for i, j in zip(ends, [*ends[1:], len(text.rstrip())], strict=True)
    ]
    return None if None in calls else [call for call in calls if call is not None]


def loads(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def escaped(text: str) -> str:
    """With escapes for the raw line breaks and tabs in strings."""
    out, is_inside, skip = "", False, False
    for character in text:
        raw = is_inside and character in "\n\r\t"
        out += json.dumps(character)[1:-1] if raw else character
        is_inside ^= character == '"' and not skip
        skip = is_inside and character == "\\" and not skip
    return out


def checked_call(text: str) -> tuple[str, str] | None:
    try:
        pairs = json.loads(text, object_pairs_hook=lambda pairs: pairs)
        call = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or not well_made(pairs) or not isinstance(call.get("name"), str) or not call["name"]:
        return None
    if set(call) == {"name"}:
        return call["name"], "{}"
    arguments = call.get("arguments", call.get("parameters", 0) if "arguments" not in call else None)
    if arguments is None:
        return call["name"], "{}"
    if isinstance(arguments, str):
        arguments = escaped(arguments)
        try:
            inner = json.loads(arguments, object_pairs_hook=lambda pairs: ("object", pairs))
        except ValueError:
            return None
        return (call["name"], arguments) if isinstance(inner, tuple) and well_made(inner[1]) else None
    if not isinstance(arguments, dict):
        return None
    # Its source is the piece of the text that means the same: no two that do are the same length here.
    sources = (text[i : j + 1] for i in indices(text, "{") if i for j in reversed(indices(text, "}")))
    return call["name"], next(source for source in sources if loads_to(source, arguments))


def indices(text: str, character: str) -> list[int]:
    return [i for i, found in enumerate(text) if found == character]


def loads_to(text: str, value: object) -> bool:
    try:
        return bool(json.loads(text) == value)
    except ValueError:
        return False


def well_made(value: object) -> bool:
    """No key twice, nothing that is no number, no half characters; objects are lists of pairs."""
    if isinstance(value, tuple):
        return well_made(value[1])
    if isinstance(value, list):
        keys = [pair[0] for pair in value if isinstance(pair, tuple)]
        return len(keys) == len(set(keys)) and all(map(well_made, value))
    if isinstance(value, str):
        return not re.search("[\ud800-\udfff]", value)
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize(("text", "thinking", "expected"), CASES)
def test_every_cut_gives_the_same_reply(text: str, thinking: bool | None, expected: Reply) -> None:
    assert parse_reply(text, thinking=thinking) == expected == by_the_book(text, thinking)
    for first, second in combinations(range(len(text) + 1), 2):
        assert in_pieces([text[:first], text[first:second], text[second:]], thinking) == (expected, [])
    assert in_pieces(list(text), thinking) == (expected, [])


def assert_every_cut(text: str, thinking: bool | None, expected: Reply) -> list[str]:
    """Whole, in two pieces and character by character; the warnings."""
    assert whole(text, thinking, tools=True) == expected == by_the_book(text, thinking, tools=True)
    reply, warnings = in_pieces(list(text), thinking, tools=True)
    assert reply == expected
    for cut in range(len(text) + 1):
        assert in_pieces([text[:cut], text[cut:]], thinking, tools=True) == (expected, warnings)
    return warnings


@pytest.mark.parametrize(("text", "content", "calls"), CALLS)
def test_tool_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    warnings = assert_every_cut(text, False, Reply(None, content, calls_of(calls)))
    assert len(warnings) == content.count("<tool_call>")
    thought = Reply("Hm.", content, calls_of(calls))
    assert assert_every_cut(f"<think>\nHm.\n</think>\n\n{text}", True, thought) == warnings
    assert whole(text, False) == Reply(None, text.strip("\n"))


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_call_is_content_and_the_next_one_counts(text: str) -> None:
    (warning,) = assert_every_cut(text, False, Reply(None, text))
    assert warning.startswith("a tool call was kept as text: ")
    now = calls_of([("now", "{}")])
    behind = f"{text} </tool_call>" if "</tool_call>" not in text else text
    assert assert_every_cut(f"a\n{behind}\n{NOW}\nb", False, Reply(None, f"a\n{behind}\nb", now))
    assert len(assert_every_cut(f"{NOW}\n{text}\n", False, Reply(None, text, now))) == 1


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        (f"Hm.\n{NOW}", "Hm.", "", 1),
        (f"<think>\nHm.\n{NOW}\nb", f"Hm.\n{NOW}\nb", "", 0),
        (f"{NOW}", None, "", 1),
        (f"<think>{NOW}</think>", None, "", 1),
        (f"<think>\nHm.\n{NOW}\n</think>\n\n", "Hm.", "", 1),
        (f"<think>\nHm.\n{NOW}\n</think>\n\nYes.", f"Hm.\n{NOW}", "Yes.", 0),
        (f"Hm.{NOW}\n</think>\n{NOW}", f"Hm.{NOW}", "", 1),
        (f"Hm.{NOW}\n{NOW}\n", "Hm.", "", 2),
        (f"Hm.{NOW}a\n</think>\nb</think>", f"Hm.{NOW}a", "b</think>", 0),
        (f"Hm.{NOW}a{NOW}b</think>c", f"Hm.{NOW}a{NOW}b", "c", 0),
        (f"Hm.{NOW}a{NOW}", f"Hm.{NOW}a", "", 1),
        ("Hm. <tool_call> or", "Hm. <tool_call> or", "", 0),
        ("I could use <tool_call> tags here.</think>Yes.", "I could use <tool_call> tags here.", "Yes.", 0),
        ("a<tool_call></think>b", "a<tool_call>", "b", 0),
        (f'a<tool_call>{{"name": 1}}</tool_call>b{NOW}c', f'a<tool_call>{{"name": 1}}</tool_call>b{NOW}c', "", 0),
        ('a\n<tool_call>{"name": "f}</tool_call>\nb\n</think>c', 'a\n<tool_call>{"name": "f}</tool_call>\nb', "c", 0),
        ('a<tool_call>{"name": "f</think>b', 'a<tool_call>{"name": "f', "b", 0),
        ('a<tool_call>{"x": "</think>b"}</tool_call>', 'a<tool_call>{"x": "', 'b"}</tool_call>', 0),
        (f'{NOW}<tool_call>{{"name": "f</think>b', f'{NOW}<tool_call>{{"name": "f', "b", 0),
        ('Hm.<tool_call>\n```json\n{"name": "now"}\n```\n</tool_call>', "Hm.", "", 1),
        ('a<tool_call>{"name": "now",}</tool_call>', 'a<tool_call>{"name": "now",}</tool_call>', "", 0),
        ('Hm.<tool_call>{"name": "now"}', "Hm.", "", 1),
        ("Hm. <tool_call", "Hm. <tool_call", "", 0),
        ("Hm. <tool_calls></think>a", "Hm. <tool_calls>", "a", 0),
    ],
)
def test_only_a_call_that_nothing_follows_ends_open_reasoning(
    text: str, reasoning: str | None, content: str, calls: int
) -> None:
    assert_every_cut(text, True, Reply(reasoning, content, calls_of([("now", "{}")] * calls)))
    assert whole(f"a{NOW}</think>b", True) == Reply(f"a{NOW}", "b")


@given(PIECES | CALL_PIECES, MODES, st.booleans(), st.data())
def test_every_text_in_every_cut(pieces: list[str], thinking: bool | None, tools: bool, data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    cut = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    expected = by_the_book(text, thinking, tools)
    reply, warnings = in_pieces(cut, thinking, tools)
    assert reply == expected
    assert in_pieces(list(text), thinking, tools) == (expected, warnings)


@given(PIECES | CALL_PIECES, MODES, st.booleans())
@example(["<tool_call>"], True, True)
@example(["a", "<tool_call>", " \t"], True, True)
def test_only_what_may_be_a_tag_a_call_or_an_edge_is_held_back(
    pieces: list[str], thinking: bool | None, tools: bool
) -> None:
    text = "".join(pieces)
    parser = ReplyParser(thinking=thinking, tools=tools, new_id=numbered())
    shown = joined(parser.feed(text))
    reply = by_the_book(text, thinking, tools)
    kept = (reply.reasoning or "").removeprefix(shown.reasoning or "") + reply.content.removeprefix(shown.content)
    assert len(kept) == len((reply.reasoning or "") + reply.content) - len((shown.reasoning or "") + shown.content)
    held = kept.lstrip("\n")
    tags = [*(["<tool_call>"] if tools else []), *(["<think>", "</think>"] if thinking is not False else [])]
    may_be_tag = any(tag.startswith(held) for tag in tags)
    may_be_call = tools and re.match(r"<tool_call>\s*([{\[]|`{0,2}\Z|```|\Z)", held)
    assert not held or may_be_tag or may_be_call
    if not may_be_call and "<tool_call>" not in text:
        assert shown.tool_calls == reply.tool_calls


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"))
    | st.sampled_from(["</tool_call>", "<tool_call>", '"', "\\"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8"), min_size=1),
            st.dictionaries(st.text(st.characters(codec="utf-8")), JSON_VALUES, max_size=3),
            st.sampled_from(["object", "string", "arguments first"]),
            st.booleans(),
            st.sampled_from([None, 1]),
        ),
        max_size=3,
    ),
    st.integers(1, 9),
)
def test_what_the_standard_library_writes_is_read_back(
    written: list[tuple[str, dict[str, object], str, bool, int | None]], size: int
) -> None:
    text, expected = "", []
    for name, values, form, ascii_only, indent in written:
        source = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
        as_string = json.dumps(source, ensure_ascii=ascii_only)
        fields = [f'"name": {json.dumps(name, ensure_ascii=ascii_only)}']
        fields.append(f'"arguments": {as_string if form == "string" else source}')
        fields = fields[::-1] if form == "arguments first" else fields
        text += f"<tool_call>\n{{{', '.join(fields)}}}\n</tool_call>\n"
        expected.append((name, source))
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert in_pieces(pieces, False, tools=True) == (Reply(None, "", calls_of(expected)), [])


@given(st.text(st.sampled_from('<>/tol_ca{}[]":,\\ \n1a')), MODES)
def test_nothing_is_lost(text: str, thinking: bool | None) -> None:
    parser = ReplyParser(thinking=thinking, tools=True)
    deltas = [delta for character in text for delta in parser.feed(character)] + parser.finish()
    kept = "".join((d.reasoning or "") + (d.content or "") for d in deltas if not d.tool_call)
    assert kept.replace("\n", "") == text.replace("\n", "")


def test_a_call_comes_when_it_is_whole_and_text_at_once() -> None:
    parser = ReplyParser(thinking=False, tools=True, new_id=numbered())
    pieces = [
        "a\n<tool",
        "_call>\n",
        '{"name": "now"}\n</tool_call',
        ">",
        "\n",
        "b",
        "<tool_call> ",
        "c",
        "<tool_call> ``",
        "d",
        "<tool_call>{",
        "}",
    ]
    shown = [joined(parser.feed(piece)) for piece in pieces]
    texts = ["a", "", "", "", "", "\nb", "", "<tool_call> c", "", "<tool_call> ``d", "", ""]
    assert [reply.content for reply in shown] == texts
    assert [reply.tool_calls for reply in shown] == [(), (), (), calls_of([("now", "{}")]), *[()] * 8]
    assert joined(parser.finish()) == Reply(None, "<tool_call>{}")


def test_warnings_are_logged_and_bounded(caplog: pytest.LogCaptureFixture) -> None:
    reply = parse_reply("<tool_call>x" * 1000, thinking=False, tools=True)
    assert reply == Reply(None, "<tool_call>x" * 1000)
    assert [record.name for record in caplog.records] == ["mlxqwen"] * (MAX_WARNINGS + 1)
    assert caplog.records[0].levelno == logging.WARNING
    assert caplog.messages[0] == "a tool call was kept as text: found 'x', expected an object"
    assert caplog.messages[-1] == "more tool calls were kept as text"
    long_key = f'<tool_call>{{"{"k" * 9999}": 1}}</tool_call>'
    _, (warning,) = in_pieces([long_key], False, tools=True)
    assert len(warning) < 250


LENGTH = 5_000
HARD = [
    "<tool_call>",
    '<tool_call>{"a":"</tool_call>',
    '<tool_call>{"a":["</tool_call>",',
    '<tool_call>{"</tool_call>',
    '</tool_call>"<tool_call>{"',
    '</tool_call><tool_call>{\\"',
    "x</tool_call><tool_call>[1]",
    '<tool_call>{"</think>"',
    NOW,
]


@pytest.mark.parametrize("size", [1, 5, LENGTH])
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    "text",
    [*(unit * (LENGTH // len(unit)) for unit in HARD)]
    + ['<tool_call>{"' + unit * (LENGTH // len(unit)) for unit in HARD]
    + [start + "[" * LENGTH for start in ("<tool_call>", '<tool_call>{"a":')]
    + ['<tool_call>{"a":' + "1" * LENGTH, "<tool_call>" + " " * LENGTH, "<" * LENGTH, "\n" * LENGTH]
    + ["<tool_call>" + "`" * LENGTH, "<tool_call>```" + " " * LENGTH, '<tool_call>{"a":"' + "\\" * LENGTH]
    + ['<tool_call>{"name":"f","arguments":{"a":"' + "\\u0041" * (LENGTH // 6) + '"}}</tool_call>']
    + ['<tool_call>{"name":"f","arguments":"' + "[" * LENGTH + '"}</tool_call>'],
    ids=lambda text: text[:40],
)
def test_every_character_is_looked_at_a_few_times_at_most(
    text: str, thinking: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = dict.fromkeys(["searched", "taken", "followed", "parsed"], 0)

    def counting(owner: object, name: str, what: str) -> None:
        function = getattr(owner, name)

        def counted(*args: Any) -> Any:
            piece = next(arg for arg in args if isinstance(arg, str | Tag))
            counts[what] += len(piece.value if isinstance(piece, Tag) else piece)
            return function(*args)

        monkeypatch.setattr(owner, name, counted)

    counting(TagLexer, "_search", "searched")
    counting(Splitter, "take", "taken")
    counting(OpenCall, "_follow", "followed")
    counting(splitter, "parse_tool_calls", "parsed")
    reply, _ = in_pieces([text[at : at + size] for at in range(0, len(text), size)], thinking, tools=True)
    length = len(text)
    assert counts["searched"] <= (2 if size > 20 else 13) * length
    assert counts["taken"] <= 3 * length
    assert counts["followed"] <= 2 * length
    assert counts["parsed"] <= 2 * length
    assert reply.content or reply.tool_calls or reply.reasoning or not text.strip("\n")


def test_pieces_of_calls_are_joined() -> None:
    deltas = [
        Delta(reasoning="a"),
        Delta(tool_call=ToolCallDelta(0, "x", "f", "")),
        Delta(tool_call=ToolCallDelta(1, "y", "g", "{}")),
        Delta(content="b"),
        Delta(tool_call=ToolCallDelta(0, None, None, '{"a"')),
        Delta(tool_call=ToolCallDelta(0, None, None, ": 1}")),
    ]
    calls = (ToolCall("x", "f", '{"a": 1}'), ToolCall("y", "g", "{}"))
    assert join_deltas(deltas) == Reply("a", "b", calls)


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["Hello"], ["Hello"]),
        (["a<", "b"], ["a", "<b"]),
        (["a</think", "x"], ["a", "</thinkx"]),
        (["<thin", "g"], ["", "<thing"]),
        (["<think>", "a\n", "\n", "b"], ["", "a", "", "\n\nb"]),
        (["a</t</th", "ink"], ["a</t", ""]),
    ],
)
def test_reasoning_comes_at_once(pieces: list[str], shown: list[str]) -> None:
    parser = ReplyParser()
    assert ["".join(delta.reasoning or "" for delta in parser.feed(piece)) for piece in pieces] == shown


def test_content_comes_at_once() -> None:
    parser = ReplyParser()
    parser.feed("</think>")
    pieces = ["\n", "a<", "</think", "\n", "<think>", ">"]
    shown = ["".join(delta.content or "" for delta in parser.feed(piece)) for piece in pieces]
    assert shown == ["", "a<", "</think", "", "\n<think>", ">"]


def test_the_side_is_known_while_text_comes() -> None:
    parser = ReplyParser()
    sides = []
    for piece in ("<think>", "a", "</thi", "nk>", "b"):
        parser.feed(piece)
        sides.append(parser.in_reasoning)
    assert sides == [True, True, True, False, False]
    assert ReplyParser(thinking=False).in_reasoning is False


@pytest.mark.parametrize("thinking", [True, False, None])
def test_many_line_breaks_cost_no_more_than_other_text(thinking: bool | None) -> None:
    parser = ReplyParser(thinking=thinking)
    assert [delta for piece in ["\n"] * 50_000 for delta in parser.feed(piece)] == []
    deltas = parser.feed("a") + [delta for _ in range(50_000) for delta in parser.feed("\n")] + parser.feed("b")
    assert joined(deltas) in (Reply("a" + "\n" * 50_000 + "b", ""), Reply(None, "a" + "\n" * 50_000 + "b"))


def test_what_is_no_text_is_no_reply() -> None:
    with pytest.raises(OptionError, match="text: found int, expected a string"):
        parse_reply(5)  # type: ignore[arg-type]
