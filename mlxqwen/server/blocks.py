"""A reply as a row of blocks (thought, text, calls), each opened, filled and closed: the form of the newer APIs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlxqwen.chat.reply import Delta

__all__ = ["Block", "Blocks", "Step"]

Kind = Literal["reasoning", "content", "call"]


@dataclass(slots=True)
class Block:
    """One block, as far as it has come.

    Args:
        index: its place in the reply.
        kind: what it is.
        call_id, name: of a call.
        pieces: of its text, or of a call's arguments.
    """

    index: int
    kind: Kind
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of its text so far."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Step:
    """What happens to a block: it is opened, filled with `text`, or closed."""

    kind: Literal["open", "fill", "close"]
    block: Block
    text: str = ""


class Blocks:
    """Makes blocks of deltas.

    Args:
        most_calls: how many calls the reply may have; None for any number.

    Attributes:
        blocks: all so far.
        is_cut: whether the reply is to end here, as a further call begins.
    """

    def __init__(self, most_calls: int | None = None) -> None:
        self.blocks: list[Block] = []
        self.is_cut = False
        self._most_calls = most_calls
        self._open: Block | None = None
        self._call = -1

    def feed(self, deltas: Sequence[Delta]) -> Iterator[Step]:
        """What the next deltas do."""
        for delta in deltas:
            call = delta.tool_call
            if self.is_cut:
                return
            if call is not None:
                if self._most_calls is not None and call.index >= self._most_calls:
                    self.is_cut = True
                    return
                if call.index != self._call or self._open is None:
                    self._call = call.index
                    yield from self._begin("call", call.id or "", call.name or "")
                yield from self._fill(call.arguments)
            elif delta.reasoning is not None:
                yield from self._into("reasoning", delta.reasoning)
            elif delta.content is not None:
                yield from self._into("content", delta.content)

    def finish(self) -> Iterator[Step]:
        """Close the last block."""
        if self._open is not None:
            block, self._open = self._open, None
            yield Step("close", block)

    def _into(self, kind: Kind, text: str) -> Iterator[Step]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(kind)
        yield from self._fill(text)

    def _begin(self, kind: Kind, call_id: str = "", name: str = "") -> Iterator[Step]:
        yield from self.finish()
        self._open = Block(len(self.blocks), kind, call_id, name)
        self.blocks.append(self._open)
        yield Step("open", self._open)

    def _fill(self, text: str) -> Iterator[Step]:
        if text and self._open is not None:
            self._open.pieces.append(text)
            yield Step("fill", self._open, text)
