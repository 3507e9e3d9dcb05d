"""Replies: the same in every cut, and each character looked at a few times."""

from __future__ import annotations

import random
from typing import Any

from mlxqwen.chat.reply import join_deltas
from mlxqwen.chat.reply_parser import ReplyParser
from mlxqwen.chat.splitter import Splitter

_PIECES = [
    *(
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "<",
        "x",
        "\n",
        " ",
        "```",
        "```json\n",
        "{",
        "}",
        "[",
        "]",
    ),
    *('"', "\\", ",", '"name":', '"f"', '"arguments":', "{}", "null", '{"name":"f","arguments":{"a":[1,"b"]}}', "é"),
]
_MOST_TAKEN = 4  # times the length


def make_reply(seed: int) -> tuple[str, list[str], bool | None]:
    """A text, its pieces, and how it begins."""
    draw = random.Random(seed)
    unit = "".join(draw.choices(_PIECES, k=draw.randrange(1, 9)))
    text = "".join(draw.choices(_PIECES, k=draw.randrange(30))) if seed % 2 else unit * draw.randrange(1, 200)
    cuts = sorted(draw.randrange(len(text) + 1) for _ in range(draw.randrange(20)))
    return (
        text,
        [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)],
        draw.choice([True, False, None]),
    )


def check(seed: int) -> str | None:
    """What broke: another reply in pieces, or more work than the text is long. None if nothing."""
    text, pieces, thinking = make_reply(seed)
    taken = 0
    take = Splitter.take

    def counting(self: Splitter, piece: Any, *places: int) -> Any:
        nonlocal taken
        taken += len(piece) if isinstance(piece, str) else len(piece.value)
        return take(self, piece, *places)

    Splitter.take = counting  # type: ignore[method-assign, assignment]
    try:
        whole, cut = parsed([text], thinking), parsed(pieces, thinking)
    finally:
        Splitter.take = take  # type: ignore[method-assign]
    if whole != cut:
        return f"{text!r} in {pieces}: found {cut}, expected {whole}"
    return f"{text[:200]!r}: {taken} characters taken of {len(text)}" if taken > 2 * _MOST_TAKEN * len(text) else None


def parsed(pieces: list[str], thinking: bool | None) -> tuple[Any, ...]:
    """The reply, without the calls' own ids."""
    parser = ReplyParser(thinking=thinking, tools=True)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    reply = join_deltas([*deltas, *parser.finish()])
    return reply.reasoning, reply.content, [(call.name, call.arguments) for call in reply.tool_calls]
