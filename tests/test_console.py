"""What a terminal is shown of a model's text, and what a pipe is given; Python's Unicode database is the oracle."""

from __future__ import annotations

import io
import json
import sys
import unicodedata

import pytest

from mlxqwen.chat.reply import Delta
from mlxqwen.cli.chat_markdown import StreamedMarkdown, wrap
from mlxqwen.cli.chat_view import PlainView, TerminalView
from mlxqwen.console import Output, spell_out_controls
from tests.command_line import Terminal

# https://www.unicode.org/reports/tr9/#Bidirectional_Character_Types: explicit formatting
REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
ALL = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
HIDDEN = [c for c in ALL if unicodedata.bidirectional(c) in REORDERING] + ["\xad"]
TEXT = "".join(f"a{c}" for c in HIDDEN)


def terminal() -> Terminal:
    return Terminal(io.BytesIO(), encoding="utf-8")


def written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode()


def test_what_is_spelled_out() -> None:
    changed = [c for c in ALL if spell_out_controls(c) != c]
    controls = [c for c in ALL if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert sorted(changed) == sorted(controls + HIDDEN)
    assert all(spell_out_controls(c).isascii() and spell_out_controls(c).isprintable() for c in changed)


@pytest.mark.parametrize(
    "text", ["\u05e9\u05dc\u05d5\u05dd \u200f!", "\u0645\u06cc\u200c\u0631\u0648\u062f", "👩\u200d💻", "é", "e\u0301"]
)
def test_other_languages_are_shown_as_they_are(text: str) -> None:
    assert spell_out_controls(text) == text


def test_a_terminal_is_shown_escapes_and_a_pipe_is_given_the_text() -> None:
    shown, piped = terminal(), io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    for stream in (shown, piped):
        Output(stream).write(TEXT)
    assert written(shown) == "".join(f"a\\u{ord(c):04x}" for c in HIDDEN)
    assert written(piped) == TEXT


def test_json_on_a_terminal_says_the_same() -> None:
    shown = terminal()
    Output(shown).write(json.dumps(TEXT, ensure_ascii=False))
    assert json.loads(written(shown)) == TEXT


@pytest.mark.parametrize(
    "form", ["{}", "**{}**", "`{}`", "```\n{}\n```", "| a |\n|-|\n| {} |", "# {}", "- {}", "[{}](b)"]
)
def test_no_markdown_lets_them_through(form: str) -> None:
    markdown = StreamedMarkdown(styled=False)
    for character in form.format(TEXT):
        markdown.feed(character)
    lines = "".join(markdown.lines(200))
    assert not set(lines) & set(HIDDEN)
    assert all(f"\\u{ord(c):04x}" in lines for c in HIDDEN)


@pytest.mark.parametrize("folds", [True, False])
def test_a_chat_shows_none_of_them(folds: bool) -> None:
    screen, answers, others = terminal(), terminal(), terminal()
    live = TerminalView(screen, len)
    live.folds_reasoning = folds
    for view in (live, PlainView(answers, others, folds_reasoning=folds, count_tokens=len)):
        view.say(TEXT)
        reply = view.reply()
        reply.show(Delta(reasoning=TEXT))
        reply.show(Delta(content=TEXT))
        reply.end()
    assert wrap(TEXT, 10) == wrap(spell_out_controls(TEXT), 10)
    for stream in (screen, answers, others):
        text = written(stream)
        assert not set(text) & set(HIDDEN)
        assert "\\u202e" in text
