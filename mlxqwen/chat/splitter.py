"""Pieces of a reply, text or tags → reasoning, content and tool calls: the one set of rules.

Qwen3 thinks between `<think>` and `</think>` and answers behind it; a call stands between `<tool_call>` and
`</tool_call>`. Who feeds a `Splitter` has told tags from text before, by their token ids or by their spelling.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from mlxqwen.chat.constrained_call import ConstrainedCall
from mlxqwen.chat.edge_line_breaks import EdgeLineBreaks
from mlxqwen.chat.open_call import HeldCalls, OpenCall
from mlxqwen.chat.reply import Delta, ToolCallDelta, new_call_id
from mlxqwen.chat.tags import Tag
from mlxqwen.chat.tool_call_text import parse_tool_calls

__all__ = ["MAX_WARNINGS", "Splitter"]

MAX_WARNINGS = 20
_SPACE = re.compile(r"[ \t\n\r]*")


class Splitter:
    """Takes text and tags as they come, and returns what is certain.

    Think tags count only around the reply's first thought; elsewhere they are text. The text of a call is kept until
    its closing tag and parsed then. What is no call stays where it stands, as reasoning or as content, exactly as
    written, and `warnings` says why it is none. What is no JSON behind a `<tool_call>` is text at once. A whole call at
    the end of the reply counts without its closing tag. Line breaks around a call are no content, except that texts
    before and behind it stay on lines of their own.

    A call in a thought is made, and ends it, where the reply has nothing further to say: the model has forgotten to
    close its thought. Where more thought or an answer follows, it was only thought of, and is reasoning.

    In a call, another `<tool_call>`, and a `</think>` that is still due, end it as text. Tags that are spelled by text
    are no tags inside a JSON string; if that call comes to nothing, it ends at the first of them, and what follows is
    read again, once, with every tag a tag.

    Args:
        thinking: whether the reply begins in thought; None if it does where it opens with `<think>`.
        tools: whether `<tool_call>` begins a call.
        new_id: makes the ids of the calls.
        spelled: the tags that text spells, rather than a token of their own.

    Attributes:
        warnings: why calls were kept as text; at most `MAX_WARNINGS` and a line that there are more.
        keeps_calls: whether a constraint keeps calls behind the thought to Qwen3's form; then their arguments are told
            as they come, also those of a call that the reply ends in.
        in_thought: whether the text so far is thought, or may become one of its calls.
        may_open: whether `<think>` may still open the thought.
        has_reasoned: whether any reasoning was returned.
        reasoning_start, reasoning_end: positions, as `take` was given them, between which the thought stands; None
            while not known.
    """

    def __init__(
        self,
        *,
        thinking: bool | None,
        tools: bool = False,
        new_id: Callable[[], str] = new_call_id,
        spelled: Collection[Tag] = (),
    ) -> None:
        self.warnings: list[str] = []
        self.in_thought = thinking is True
        self.may_open = thinking is not False
        self.has_reasoned = False
        self.reasoning_start = 0 if thinking else None
        self.reasoning_end: int | None = None
        self._end_think_due = thinking is True
        self.keeps_calls = False
        self._constrained: ConstrainedCall | None = None
        self._tools = tools
        self._new_id = new_id
        self._spelled = frozenset(spelled)
        self._calls = 0
        self._call: OpenCall | None = None
        self._held: HeldCalls | None = None
        self._edges = EdgeLineBreaks()
        self._rereads = False

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends in reasoning; not while it may be a call that ends it."""
        return self.in_thought and self._call is None and self._held is None

    @property
    def may_reason(self) -> bool:
        """Whether reasoning continues or may still begin."""
        return self.in_thought or self.may_open

    @property
    def shows_text(self) -> bool:
        """Whether text without line breaks at its ends is shown as it is."""
        is_in_call = self._call is not None or self._constrained is not None or self._held is not None
        return not is_in_call and not self.may_open and self._edges.is_clear

    def awaits(self, tag: Tag) -> bool:
        """Whether `tag` would be a tag here rather than text."""
        if tag is Tag.CALL:
            return self._tools
        if tag is Tag.THINK:
            return self.may_open and self._call is None
        if tag is Tag.END_THINK:
            return self._end_think_due
        return self._call is not None or self._constrained is not None

    def take(self, piece: str | Tag, at: int = 0, end: int = 0) -> list[Delta]:
        """Take the next piece → the deltas that are now certain.

        Args:
            piece: text or a tag.
            at, end: where it begins and ends, in the caller's units.
        """
        if self._constrained is not None:
            return self._take_constrained(self._constrained, piece)
        if self._held is not None and self._call is None:
            if self._holds(self._held, piece, at):
                return []
            if piece is not Tag.CALL or self._held.closed_at is not None:
                return self._let_go() + self.take(piece, at, end)
        if isinstance(piece, Tag):
            if not self.awaits(piece):
                return self._take_text(piece.value, at)
            return self._take_tag(piece, at, end)
        return self._take_text(piece, at)

    def finish(self) -> list[Delta]:
        """End the reply → the deltas that were held back."""
        if self._constrained is not None:
            rest = self._constrained.cut()
            return [Delta(tool_call=ToolCallDelta(self._calls, None, None, rest))] if rest else []
        deltas: list[Delta] = []
        while self._call is not None:
            deltas += self._end_call(self._call)
        return deltas + self._make_held()

    def _take_text(self, text: str, at: int) -> list[Delta]:
        if self._call is not None:
            return self._add_to_call(self._call, text, at)
        if self.may_open:
            text = text.lstrip("\n")
            if not text:
                return []
            self.may_open = False
        return self._shown(text)

    def _take_tag(self, tag: Tag, at: int, end: int) -> list[Delta]:
        call = self._call
        if call is not None and call.in_string and tag in self._spelled and not self._rereads:
            return self._add_to_call(call, tag, at)
        if tag is Tag.END_CALL and call is not None:
            return self._end_call(call, at)
        if tag is Tag.THINK:
            self.may_open = False
            self.in_thought = self._end_think_due = True
            self.reasoning_start = end
            return []
        deltas: list[Delta] = []
        if call is not None:
            deltas = self._give_up(call, f"found {tag.value}, expected {Tag.END_CALL.value}")
            return deltas + self.take(tag, at, end)
        self.may_open = False
        if tag is Tag.CALL:
            if self.keeps_calls and not self.in_thought:
                self._constrained = ConstrainedCall()
            else:
                self._call = OpenCall(at)
            return deltas
        self._end_think_due = False
        if self.in_thought:
            self._end_thought(at)
        else:
            self._edges.cut()
        return deltas

    def _take_constrained(self, call: ConstrainedCall, piece: str | Tag) -> list[Delta]:
        """Take the next piece of a call that a constraint keeps to its form."""
        name = call.name
        if piece is not Tag.END_CALL:
            arguments = call.add(piece.value if isinstance(piece, Tag) else piece)
            if name is None and call.name is not None:
                return [Delta(tool_call=ToolCallDelta(self._calls, self._new_id(), call.name, arguments))]
            return [Delta(tool_call=ToolCallDelta(self._calls, None, None, arguments))] if arguments else []
        try:
            rest = call.end()
        except ValueError as problem:
            self._warn(str(problem))
            rest = ""
        deltas = [Delta(tool_call=ToolCallDelta(self._calls, None, None, rest))] if rest else []
        self._constrained = None
        self._calls += 1
        self._edges.cut()
        return deltas

    def _end_thought(self, end: int) -> None:
        self.in_thought, self.reasoning_end, self._edges = False, end, EdgeLineBreaks()

    def _add_to_call(self, call: OpenCall, piece: str | Tag, at: int) -> list[Delta]:
        call.add(piece, at)
        return [] if call.problem is None else self._give_up(call, call.problem)

    def _end_call(self, call: OpenCall, closed_at: int | None = None) -> list[Delta]:
        try:
            calls = parse_tool_calls(call.text)
        except ValueError as problem:
            if closed_at is None:
                return self._give_up(call, f"the reply ends, expected {Tag.END_CALL.value}")
            call.add(Tag.END_CALL, closed_at)
            return self._give_up(call, str(problem))
        self._call = None
        if not self.in_thought:
            return self._made(calls)
        self._held = self._held or HeldCalls(call.at)
        self._held.calls += calls
        closing = "" if closed_at is None else Tag.END_CALL.value
        self._held.texts.append(f"{Tag.CALL.value}{call.text}{closing}")
        return []

    def _made(self, calls: Sequence[tuple[str, str]]) -> list[Delta]:
        self._edges.cut()
        deltas = []
        for name, arguments in calls:
            deltas.append(Delta(tool_call=ToolCallDelta(self._calls, self._new_id(), name, arguments)))
            self._calls += 1
        return deltas

    def _holds(self, held: HeldCalls, piece: str | Tag, at: int) -> bool:
        """Whether the calls in the thought are still undecided behind `piece`, which is kept with them then."""
        if piece is Tag.END_THINK and self._end_think_due:
            self._end_think_due = False
            held.closed_at = at
            return True
        if isinstance(piece, Tag) or _SPACE.fullmatch(piece) is None:
            return False
        (held.texts if held.closed_at is None else held.behind).append(piece)
        return True

    def _make_held(self) -> list[Delta]:
        """The calls in the thought, behind which the reply has ended."""
        held, self._held = self._held, None
        if held is None:
            return []
        self._end_thought(held.at)
        return self._made(held.calls)

    def _let_go(self) -> list[Delta]:
        """The calls in the thought as the reasoning that they are, since something follows."""
        held, self._held = self._held, None
        if held is None:
            return []
        deltas = self._shown("".join(held.texts))
        if held.closed_at is not None:
            self._end_thought(held.closed_at)
            deltas += self._shown("".join(held.behind))
        return deltas

    def _give_up(self, call: OpenCall, problem: str) -> list[Delta]:
        """Give up `call`: show its text up to the first tag in it, and read the rest again."""
        self._call = None
        self._warn(problem)
        text, rest = call.parts()
        deltas = self._let_go() + self._shown(Tag.CALL.value + text)
        rereads, self._rereads = self._rereads, True
        for piece, at in rest:
            deltas += self.take(piece, at, at + len(piece.value if isinstance(piece, Tag) else piece))
        self._rereads = rereads
        return deltas

    def _shown(self, text: str) -> list[Delta]:
        text = self._edges.strip(text)
        if not text:
            return []
        if self.in_thought:
            self.has_reasoned = True
            return [Delta(reasoning=text)]
        return [Delta(content=text)]

    def _warn(self, problem: str) -> None:
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(f"a tool call was kept as text: {problem[:200]}")
        elif len(self.warnings) == MAX_WARNINGS:
            self.warnings.append("more tool calls were kept as text")
