"""Replies: the same result for every cut, and nothing held back without need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxqwen.reply import Delta, Reply, ReplyParser, parse_reply

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

PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<thi", "nk>", "</", "<", ">", "\n", "\n\n", " ", "a", "b c", "é"]),
    max_size=12,
)


def joined(deltas: Iterable[Delta]) -> Reply:
    deltas = list(deltas)
    for delta in deltas:
        assert bool(delta.reasoning) != bool(delta.content), "one of the two, and never empty"
    first_content = next((i for i, delta in enumerate(deltas) if delta.content), len(deltas))
    assert all(delta.content for delta in deltas[first_content:]), "no reasoning behind content"
    return Reply("".join(d.reasoning or "" for d in deltas) or None, "".join(d.content or "" for d in deltas))


def in_pieces(pieces: Sequence[str], thinking: bool | None) -> Reply:
    parser = ReplyParser(thinking=thinking)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return joined(deltas + parser.finish())


def by_the_book(text: str, thinking: bool | None) -> Reply:
    """The rule for a whole text."""
    reasoning, content = "", text
    if thinking or (thinking is None and text.lstrip("\n").startswith("<think>")):
        reasoning, _, content = text.lstrip("\n").removeprefix("<think>").partition("</think>")
    return Reply(reasoning.strip("\n") or None, content.strip("\n"))


@pytest.mark.parametrize(("text", "thinking", "expected"), CASES)
def test_every_cut_gives_the_same_reply(text: str, thinking: bool | None, expected: Reply) -> None:
    assert parse_reply(text, thinking=thinking) == expected == by_the_book(text, thinking)
    for first, second in combinations(range(len(text) + 1), 2):
        assert in_pieces([text[:first], text[first:second], text[second:]], thinking) == expected
    assert in_pieces(list(text), thinking) == expected


@given(PIECES, st.sampled_from([True, False, None]), st.data())
def test_every_text_in_every_cut(pieces: list[str], thinking: bool | None, data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    cut = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert in_pieces(cut, thinking) == by_the_book(text, thinking)


@given(PIECES, st.sampled_from([True, False, None]))
def test_only_what_may_be_a_tag_or_an_edge_is_held_back(pieces: list[str], thinking: bool | None) -> None:
    text = "".join(pieces)
    parser = ReplyParser(thinking=thinking)
    shown = joined(parser.feed(text))
    whole = parse_reply(text, thinking=thinking)
    if thinking is None and "<think>".startswith(text.lstrip("\n")):
        assert shown == Reply(None, "")  # it may still become a think block
        return
    if whole.content or not parser.in_reasoning:
        # Once in the content, everything but line breaks at its end is out.
        assert shown == whole
        return
    reasoning = whole.reasoning or ""
    held = reasoning.removeprefix(shown.reasoning or "")
    assert reasoning == (shown.reasoning or "") + held
    rest = held.lstrip("\n")
    assert rest == "" or "</think>".startswith(rest) or (held == reasoning and "<think>".startswith(rest))


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
