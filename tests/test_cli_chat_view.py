"""What `mlxqwen chat` draws: markdown as it comes, thoughts, lines that change; and what a typed line is."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.chat.reply import Delta, Reply
from mlxqwen.cli import chat_screen
from mlxqwen.cli.chat_commands import ALIASES, COMMANDS, HELP, HELP_INDENT, ChatCommand, Message, parse_line
from mlxqwen.cli.chat_markdown import StreamedMarkdown, wrap
from mlxqwen.cli.chat_screen import LiveLines
from mlxqwen.cli.chat_thought import Thought, thought_line
from mlxqwen.cli.chat_view import PlainView, TerminalView
from mlxqwen.engine.events import Done, Timings, Usage
from mlxqwen.errors import OptionError
from tests.command_line import Terminal
from tests.terminal_screen import Screen

STYLE = re.compile(r"\x1b\[[\d;]*m")
MARKDOWN = """\
# A title

Some *soft* and **bold** `code`,
a [link](http://example.org/x) and 你好.

- one
- two

  still two
* another list
3. three
4. four

```python
def add(a, b):

    return a + b
```

| a | b |
|---|--:|
| 1 | 22 |

> said
by somebody

Setext
---
***
    indented
"""


# Lines that are typed


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("Hello", Message("Hello")),
        ("  two\nlines \n", Message("  two\nlines ")),
        ("//etc/hosts?", Message("/etc/hosts?")),
        ("///", Message("//")),
        ("//quit", Message("/quit")),
        ("why /help?", Message("why /help?")),
        ("/think", ChatCommand("/think")),
        (" /no_think \n", ChatCommand("/no_think")),
        ("/think How many?", Message("/think How many?")),
        ("/no_think\nHow many?", Message("/no_think\nHow many?")),
        ("/budget 20", ChatCommand("/budget", "20")),
        ("/budget", ChatCommand("/budget")),
        ("/system You are\nbrief.", ChatCommand("/system", "You are\nbrief.")),
        ("/exit", ChatCommand("/quit")),
        ("/bye", ChatCommand("/quit")),
        ("/?", ChatCommand("/help")),
        ("/save my chat.json", ChatCommand("/save", "my chat.json")),
        ("", None),
        (" \n\t", None),
    ],
)
def test_what_a_line_is(typed: str, meant: object) -> None:
    assert parse_line(typed) == meant


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("/hlep", ["/hlep", "Did you mean /help?", "//"]),
        ("/tihnk How many?", ["/tihnk", "/think"]),
        ("/HELP", ["/HELP", "no such command"]),
        ("/", ["/: found no such command", "/help lists all"]),
        ("/etc/hosts", ["/etc/hosts", "//"]),
        ("/\x1b[31m", ["\\x1b"]),
        ("/quit now", ["/quit", "'now'", "nothing"]),
        ("/save", ["/save", "FILE"]),
        ("/load ", ["/load", "FILE"]),
    ],
)
def test_mistyped_commands_are_named(typed: str, words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        parse_line(typed)
    for word in words:
        assert word in str(caught.value)


def test_help_lists_every_command() -> None:
    assert [line.split()[0] for line in HELP.splitlines()[: len(COMMANDS)]] == list(COMMANDS)
    assert {name for name in ALIASES if name in HELP} == {*ALIASES}


@pytest.mark.parametrize(("columns", "most"), [(80, 23), (60, 40)])
def test_help_is_seen_at_a_glance(columns: int, most: int) -> None:
    lines = wrap(HELP, columns, hanging=HELP_INDENT)
    assert len(lines) <= most  # and the next prompt
    of_commands = lines[: lines.index("")]
    begun = [line for line in of_commands if line.startswith("/")]
    assert len(begun) == len(COMMANDS)
    assert all(line.startswith(" " * HELP_INDENT) for line in of_commands if line not in begun)
    assert " ".join(" ".join(of_commands).split()) == " ".join(HELP.partition("\n\n")[0].split())


# Markdown


def rendered(text: str, width: int = 60, *, cuts: list[int] | None = None, styled: bool = False) -> list[str]:
    markdown = StreamedMarkdown(styled=styled)
    bounds = [0, *sorted(cuts or []), len(text)]
    for start, end in pairwise(bounds):
        markdown.feed(text[start:end])
        markdown.lines(width)
    return markdown.lines(width)


def test_markdown_is_rendered() -> None:
    lines = rendered("Some **bold**\nlines\n\n- one\n- two\n\n```python\nx = 1\n\ny = 2\n```\n")
    assert lines == ["Some bold", "lines", "", " • one", " • two", "", "```python", "x = 1", "", "y = 2", "```"]
    assert "\x1b[1mbold\x1b[0m" in rendered("Some **bold**", styled=True)[0]


def test_lists_keep_their_numbers_and_headings_stay_left() -> None:
    assert rendered("# One\n\n## Two\n\n### Three") == ["One", "", "Two", "", "Three"]
    assert rendered("1. a\n1. b\n\n```\nx\n```\n\n2) c\n\npara\n\n7. d") == [
        *(" 1. a", " 1. b", "", "```", "x", "```", "", " 2) c", "", "para", "", " 7. d")
    ]
    assert rendered("9. some words\n10. and others\n    - deep\n11.", 14) == [
        *("  9. some", "     words", " 10. and", "     others", "      • deep", " 11.")
    ]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, len(MARKDOWN)), max_size=30))
def test_cuts_make_no_difference(cuts: list[int]) -> None:
    assert rendered(MARKDOWN, cuts=cuts) == rendered(MARKDOWN)


def test_each_cut_makes_no_difference() -> None:
    whole = rendered(MARKDOWN)
    for cut in range(0, len(MARKDOWN), 3):
        assert rendered(MARKDOWN, cuts=[cut]) == whole, MARKDOWN[:cut]


def test_line_by_line_makes_no_difference() -> None:
    assert rendered(MARKDOWN, cuts=list(range(len(MARKDOWN)))) == rendered(MARKDOWN)


@pytest.mark.parametrize(
    "text",
    [
        "<b>html</b>",
        "<div>\nblock\n</div>",
        "&lt;script&gt; &#27;[31m &#13;",
        "[ref]: http://example.org",
        r"\[ \frac{1}{2} \]",
        "[bold]rich[/bold] :smile:",
        "<!-- comment -->",
        "snake_case_name and 2 * 3 * 4",
    ],
)
def test_what_is_no_markdown_is_shown(text: str) -> None:
    assert rendered(text) == text.split("\n")


def test_targets_of_links_and_images_are_shown() -> None:
    assert rendered("[a](http://x.example/b)", styled=False) == ["a (http://x.example/b)"]
    assert rendered("![a](http://x.example/b)") == ["!a (http://x.example/b)"]
    assert "\x1b]" not in "".join(rendered("[a](http://x.example/b)", styled=True))


@settings(deadline=None)
@given(st.text(st.sampled_from("\x1b\x07\x9b\x00\r\x08[]31mJ;`*-#|>&<\n\t a1\u2028\u202e你"), max_size=80))
def test_only_styles_steer_the_terminal(text: str) -> None:
    for styled in (True, False):
        for line in rendered(text, 20, styled=styled):
            plain = STYLE.sub("", line) if styled else line
            assert not re.search(r"[\x00-\x1f\x7f-\x9f]", plain.replace("\t", ""))


@pytest.mark.parametrize("width", [1, 8, 13, 20, 40, 200])
def test_no_line_is_wider_than_the_window(width: int) -> None:
    from rich.cells import cell_len

    lines = rendered(MARKDOWN, width)
    assert max(map(cell_len, lines)) <= max(width, 8)
    letters = re.sub(r"\W", "", "".join(lines))
    for word in ("title", "soft", "bold", "exampleorg", "你好", "another", "return", "22", "somebody", "indented"):
        assert word in letters


def test_another_width_renders_anew() -> None:
    markdown = StreamedMarkdown(styled=False)
    markdown.feed(MARKDOWN)
    markdown.lines(20)
    assert markdown.lines(60) == rendered(MARKDOWN, 60)


def test_wrap() -> None:
    assert wrap("one two three\n\nfour", 8) == ["one two", "three", "", "four"]
    assert wrap("a\x1bb\rc", 20) == ["a\\x1bb\\x0dc"]


# Thoughts


def count_words(text: str) -> int:
    return len(text.split())


def test_a_thought_is_folded() -> None:
    thought = Thought(folds=True, count_tokens=count_words)
    assert thought.lines(20, 10) == []
    thought.end()
    assert thought.lines(20, 10) == []
    thought.feed("one two\nthree")
    thought.feed(" four")
    assert thought.lines(20, 10) == ["Thinking…", "one two", "three four"]
    thought.end()
    assert re.fullmatch(r"Thought for \d+\.\d s, 4 tokens", thought.lines(20, 10)[0])
    thought.end(7, cut_off=True)
    (line,) = thought.lines(20, 10)
    assert line.endswith("7 tokens, its whole budget")


def test_a_long_thought_shows_its_end() -> None:
    thought = Thought(folds=True, count_tokens=count_words)
    thought.feed("\n".join(f"step {i}" for i in range(1000)))
    assert thought.lines(80, 24) == ["Thinking…", *(f"step {i}" for i in range(994, 1000))]
    assert thought.lines(80, 3) == ["Thinking…", "step 998", "step 999"]
    assert thought.lines(80, 1) == ["Thinking…"]
    thought.feed(" word" * 1000)
    assert len(thought.lines(80, 24)) == 7


def test_a_shown_thought_stays() -> None:
    thought = Thought(folds=False, count_tokens=count_words)
    text = "\n".join(f"step {i} of many" for i in range(50))
    for piece in re.findall(r".{1,7}", text, re.DOTALL):
        thought.feed(piece)
        thought.lines(10, 5)
    expected = [line for i in range(50) for line in wrap(f"step {i} of many", 10)]
    assert thought.lines(10, 5) == expected
    thought.end()
    assert thought.lines(10, 5)[:-1] == expected
    assert thought.lines(10, 5)[-1].startswith("Thought for ")


def test_a_thought_that_was_stopped_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    text = "\n".join(f"step {i}" for i in range(40))
    for done in (None, Done(Reply(text, ""), "stop", Usage(1, 2, 3), Timings(1, 1, 1, 1))):
        for view in (TerminalView, plain_view):
            stream = io.StringIO()
            reply = view(stream, count_words).reply()
            reply.show(Delta(reasoning=text))
            reply.end(done)
            screen = Screen(80, 24)
            screen.write(stream.getvalue())
            shown = [line for line in screen.lines if line]
            assert shown[-1].startswith("Thought for ")
            assert shown[:-1] == ([] if done else text.split("\n"))


def plain_view(stream: io.StringIO, count_tokens: Callable[[str], int]) -> PlainView:
    return PlainView(stream, stream, folds_reasoning=True, count_tokens=count_tokens)


def test_thought_line() -> None:
    assert thought_line(3.21, 1) == "Thought for 3.2 s, 1 token"
    assert thought_line(0, 2140) == "Thought for 0.0 s, 2,140 tokens"


# Lines that change


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], tuple[LiveLines, Callable[[], str]]]:
    """`LiveLines` on a terminal of a size, and what was written since the last look."""

    def make(columns: int, rows: int) -> tuple[LiveLines, Callable[[], str]]:
        buffer = io.BytesIO()
        stream = Terminal(buffer, encoding="utf-8", newline="")
        monkeypatch.setattr(chat_screen, "terminal_size", lambda stream: os.terminal_size((columns, rows)))

        def written() -> str:
            text = buffer.getvalue().decode()
            buffer.seek(0)
            buffer.truncate()
            return text

        return LiveLines(stream), written

    return make


Live = Callable[[int, int], tuple[LiveLines, Callable[[], str]]]


TEXTS = st.sampled_from(["", "a", "ab", "0123456789", "你好"])


@settings(deadline=None)
@given(st.data())
def test_the_screen_shows_the_lines(data: st.DataObject) -> None:
    columns, rows = 10, data.draw(st.integers(2, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_screen, "terminal_size", lambda stream: os.terminal_size((columns, rows)))
        buffer = io.StringIO()
        lines, screen, top = LiveLines(buffer), Screen(columns, rows), 0
        screen.write("above\n")
        for _ in range(data.draw(st.integers(1, 8))):
            wanted = data.draw(st.lists(TEXTS, min_size=min(top + 1, 9), max_size=9))
            lines.update(wanted)
            screen.write(buffer.getvalue())
            buffer.seek(0)
            buffer.truncate()
            assert screen.lines[0] == "above"
            assert screen.lines[1 + top :] == (wanted[top:] or [""])
            top = max(top, len(wanted) - rows)


def test_no_more_is_written_than_has_changed(live: Live) -> None:
    lines, written = live(20, 10)
    lines.update(["one", "two"])
    assert written() == "one\ntwo"
    lines.update(["one", "two and"])
    assert written() == " and"
    lines.update(["one", "two and"])
    assert written() == ""
    lines.update(["one", "two and", "three"])
    assert written() == "\nthree"
    lines.update(["1", "two and", "three"])
    assert written() == "\x1b[2A\r\x1b[J1\ntwo and\nthree"
    lines.close()
    assert written() == "\n"
    lines.close()
    assert written() == ""


def test_a_narrower_window_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([os.terminal_size((10, 5)), os.terminal_size((4, 5))])
    monkeypatch.setattr(chat_screen, "terminal_size", lambda stream: next(sizes))
    buffer = io.StringIO()
    lines = LiveLines(buffer)
    lines.update(["01234567", "ab"])
    buffer.truncate(0)
    buffer.seek(0)
    lines.update(["0123", "4567", "ab"])
    assert buffer.getvalue() == "\x1b[2A\r\x1b[J0123\n4567\nab"


def test_a_narrow_encoding() -> None:
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii")
    LiveLines(stream).update(["• 你"])
    assert buffer.getvalue() == b"? ?"
