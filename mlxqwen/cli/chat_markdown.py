"""Markdown that is still being written → lines for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable
from io import StringIO
from itertools import pairwise
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.markdown import CodeBlock, Heading, ListElement, ListItem, Markdown, MarkdownElement, TableElement
from rich.segment import Segment
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from mlxqwen.console import spell_out_controls

__all__ = ["StreamedMarkdown", "wrap"]

_STYLE = re.compile(r"(\x1b\[[\d;]*m)")
_NARROWEST = 8  # columns; below, rich's tables and lists have no room for their frames


class StreamedMarkdown:
    """Text comes in pieces, lines come out; how it was cut makes no difference.

    Whole blocks (paragraphs, lists, tables, code) are rendered once, only the last is rendered anew as it grows. All
    characters that the model wrote can be seen but the marks of markdown: no HTML, image, entity or link target
    disappears, backslashes of formulas stay, line breaks in paragraphs are kept, and control characters are spelled
    out.

    Args:
        styled: whether to use styles at all, such as bold.
    """

    def __init__(self, *, styled: bool) -> None:
        self._styled = styled
        self._blocks: list[str] = []
        self._tail = ""
        self._lines: list[str] = []  # of all blocks, for `_width`
        self._rendered = 0  # of them, how many
        self._width = 0

    def feed(self, text: str) -> None:
        """Take the next piece."""
        self._tail += spell_out_controls(text)

    def lines(self, width: int) -> list[str]:
        """All lines so far, at most `width` columns wide; styles are the only escape sequences in them."""
        width = max(width, _NARROWEST)
        if width != self._width:
            self._lines, self._rendered, self._width = [], 0, width
        self._settle()
        for block in self._blocks[self._rendered :]:
            self._lines += _apart(self._lines, self._render(block))
        self._rendered = len(self._blocks)
        return self._lines + _apart(self._lines, self._render(self._tail))

    def _settle(self) -> None:
        """Move all but the last whole block out of the tail: no further text can change them."""
        end = self._tail.rfind("\n") + 1
        if not end:
            return
        starts = [token.map[0] for token in _parse(self._tail[:end]) if token.level == 0 and token.map]
        if len(starts) < 2:
            return
        lines = self._tail.split("\n")
        bounds = [0, *starts[1:]]
        self._blocks += ["\n".join(lines[a:b]) for a, b in pairwise(bounds)]
        self._tail = "\n".join(lines[starts[-1] :])

    def _render(self, block: str) -> list[str]:
        if not block.strip():
            return []
        console = Console(
            file=StringIO(),
            width=self._width,
            force_terminal=True,
            color_system="auto" if self._styled else None,
            markup=False,
            emoji=False,
            highlight=False,
            legacy_windows=False,
        )
        with console.capture() as capture:
            console.print(_Markdown(block))
        lines = [_only_styles(line.rstrip()) for line in capture.get().split("\n")]
        while lines and not _STYLE.sub("", lines[0]).strip():
            del lines[0]
        while lines and not _STYLE.sub("", lines[-1]).strip():
            del lines[-1]
        return lines


def wrap(text: str, width: int, *, hanging: int = 0) -> list[str]:
    """Plain text → lines of at most `width` columns, control characters spelled out.

    Args:
        hanging: columns by which the rest of a line is indented, where the window has room for that.
    """
    width = max(width, _NARROWEST)
    console = Console(file=StringIO(), width=width, color_system=None)
    spelled = spell_out_controls(text)
    if not 0 < hanging <= width - _NARROWEST:
        return [line.plain.rstrip() for line in Text(spelled).wrap(console, width, tab_size=4)]
    lines: list[str] = []
    for line in spelled.split("\n"):
        first, *rest = wrap(line, width)
        more = wrap(" ".join(rest), width - hanging) if rest else []
        lines += [first, *(" " * hanging + part for part in more)]
    return lines


def _apart(above: list[str], below: list[str]) -> list[str]:
    return ["", *below] if above and below else below


def _only_styles(line: str) -> str:
    """What rich makes of text without control characters holds none but in styles; here that is made sure of."""
    parts = _STYLE.split(line)
    return "".join(part if i % 2 else spell_out_controls(part) for i, part in enumerate(parts))


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    return parser.disable(["reference", "image", "entity", "escape"])


_PARSER = _parser()


def _parse(text: str) -> list[Token]:
    return _PARSER.parse(text)


class _Code(CodeBlock):
    """Code between its fences, without indentation or background, so that it can be copied."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        language = "" if self.lexer_name == "text" else self.lexer_name
        yield Text(f"```{language}", style="dim")
        code = str(self.text).removesuffix("\n")
        yield Syntax(code, self.lexer_name, theme="ansi_dark", word_wrap=True, background_color="default")
        yield Text("```", style="dim")


class _Table(TableElement):
    """A table; cells too narrow for a word break the word rather than cut it off."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            if isinstance(table, Table):
                for column in table.columns:
                    column.overflow = "fold"
            yield table


class _Heading(Heading):
    """A heading at the left edge, as text on a terminal has it."""

    LEVEL_ALIGN: ClassVar[dict[str, JustifyMethod]] = dict.fromkeys(Heading.LEVEL_ALIGN, "left")


class _Item(ListItem):
    """An item with the number that the model wrote; rich counts by itself."""

    def __init__(self, number: str) -> None:
        super().__init__()
        self.number = number

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> _Item:
        return cls(f"{token.info}{token.markup}" if token.info else "")


class _List(ListElement):
    """A list; bullets as rich draws them, numbers as they were written."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        numbers = [item.number if isinstance(item, _Item) else "" for item in self.items]
        if not all(numbers):
            yield from super().__rich_console__(console, options)
            return
        width = max(map(len, numbers)) + 2
        style = console.get_style("markdown.item.number", default="none")
        for number, item in zip(numbers, self.items, strict=True):
            inner = options.update(width=max(options.max_width - width, 1))
            lines = console.render_lines(item.elements, inner, style=item.style) or [[]]
            for i, line in enumerate(lines):
                yield Segment(("" if i else number).rjust(width - 1) + " ", style)
                yield from line
                yield Segment("\n")


class _Markdown(Markdown):
    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "fence": _Code,
        "code_block": _Code,
        "table_open": _Table,
        "heading_open": _Heading,
        "bullet_list_open": _List,
        "ordered_list_open": _List,
        "list_item_open": _Item,
    }

    def __init__(self, markup: str) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = list(_with_line_breaks(_parse(markup)))


def _with_line_breaks(tokens: Iterable[Token]) -> Iterable[Token]:
    for token in tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
        yield token
