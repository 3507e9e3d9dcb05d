"""The pipeline of a reply, from token ids to deltas: decode, tell tags, split, stop, count the thought."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from mlxqwen.chat.reply import Delta, Reply, join_deltas, new_call_id
from mlxqwen.chat.reply_parser import TagLexer
from mlxqwen.chat.splitter import Splitter
from mlxqwen.chat.tags import Tag
from mlxqwen.text.stop import StopStrings
from mlxqwen.text.tokenizer import Tokenizer

__all__ = ["ReplyPipeline"]


class ReplyPipeline:
    """Turns the tokens of one reply into deltas, as they are generated.

    Where the tokenizer has a token for a tag, that token is the tag, and text that spells it is text. Other tags are
    told by their spelling. A character that the last token leaves unfinished is never shown.

    Args:
        tokenizer: decodes the tokens.
        begins: whether the reply begins in thought; see `mlxqwen.chat.thinking.begins_in_thought`.
        tools: whether the reply may call tools.
        stop: the reply ends before the first of these texts in its content; reasoning and calls may hold them.
        split: False for the reply's raw text, with its tags, as content; then `stop` ends that text.
        skip_special_tokens: whether special tokens leave no text.
        new_id: makes the ids of the calls.

    Raises:
        OptionError: a stop is empty or not a string.

    Attributes:
        tools: as it was given.
        tokens: how many tokens were fed, end tokens not counted.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        begins: bool | None,
        tools: bool = False,
        stop: str | Sequence[str] = (),
        split: bool = True,
        skip_special_tokens: bool = True,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        ids = {tag: tokenizer.token_to_id(tag.value) for tag in Tag}
        spelled = [tag for tag, token in ids.items() if token is None]
        self.tools = tools
        self.tokens = 0
        self._tags = {token: tag for tag, token in ids.items() if token is not None}
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
        self._splitter = Splitter(thinking=begins, tools=tools, new_id=new_id, spelled=spelled)
        self._lexer = TagLexer(self._splitter, spelled) if spelled else None
        self._starts: list[int] = []  # where in the lexer's text each token begins
        self._stops = StopStrings(stop)
        self._has_stops = bool(stop)
        self._splits = split
        self._deltas: list[Delta] = []
        self._tail = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found, which ends the reply."""
        return self._stops.found

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found."""
        return self._stops.match

    def tell_arguments_early(self) -> None:
        """Tell the arguments of calls as they come: a constraint keeps all calls behind the thought to Qwen3's form."""
        self._splitter.keeps_calls = True

    @property
    def in_reasoning(self) -> bool:
        """Whether the reply so far ends in reasoning; not while it may be a call that ends it."""
        return self._splitter.in_reasoning

    @property
    def may_reason(self) -> bool:
        """Whether reasoning continues or may still begin."""
        return self._splitter.may_reason

    @property
    def is_inside_character(self) -> bool:
        """Whether the tokens so far end in the middle of a character."""
        return self._detokenizer.is_inside_character

    @property
    def thought_tokens(self) -> int:
        """Tokens of the thought so far, without its tags; line breaks count."""
        start, end = self._splitter.reasoning_start, self._splitter.reasoning_end
        if start is None:
            return 0
        if self._lexer is None:
            return (self.tokens if end is None else end) - start
        last = self._lexer.length + 1 if end is None else end
        return bisect_left(self._starts, last) - bisect_left(self._starts, start)

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of the thought so far, without its tags; 0 while they are only line breaks."""
        return self.thought_tokens if self._splitter.has_reasoned else 0

    @property
    def tail(self) -> str:
        """The last two characters of the reply's raw text, tags included."""
        return self._tail[-2:]

    @property
    def reply(self) -> Reply:
        """The reply that all deltas so far make."""
        return join_deltas(self._deltas)

    def reply_of(self, count: int) -> Reply:
        """The reply that the first `count` deltas make. Another thread may feed the pipeline meanwhile."""
        return join_deltas(self._deltas[:count])

    @property
    def warnings(self) -> list[str]:
        """Why calls were kept as text; empty for raw text."""
        return self._splitter.warnings if self._splits else []

    def feed(self, token: int, *, ends: bool = False) -> list[Delta]:
        """Take the next token → the deltas that are now certain.

        Args:
            token: its id.
            ends: whether it is an end token, which leaves no text, even if it is a tag.

        Raises:
            TokenizerError: no 32-bit id.
        """
        if ends or self._stops.found:
            return []
        text = self._detokenizer.add(token)
        tag = self._tags.get(token)
        splitter = self._splitter
        if tag is None and not self._has_stops and self._lexer is None and self._splits and splitter.shows_text:
            # The common case, kept short: text of which nothing has to be held back.
            self.tokens += 1
            if not text:
                return []
            self._tail = self._tail[-1:] + text
            if text[-1] != "\n" and text[0] != "\n":
                if splitter.in_thought:
                    splitter.has_reasoned = True
                    delta = Delta(reasoning=text)
                else:
                    delta = Delta(content=text)
                self._deltas.append(delta)
                return [delta]
            deltas = splitter.take(text, self.tokens - 1, self.tokens)
        else:
            self._tail = (self._tail[-2:] + text)[-2:]
            deltas = self._take(text, tag)
            if not self._splits:
                deltas = [Delta(content=text)] if text else []
        return self._returned(deltas) if deltas else []

    def finish(self) -> list[Delta]:
        """End the reply → the deltas that were held back."""
        if self._stops.found:
            return []
        deltas = self._splitter.finish() if self._lexer is None else self._lexer.finish()
        returned = self._returned(deltas) if self._splits else []
        if self._has_stops and not self._stops.found and (rest := self._stops.finish()):
            returned.append(Delta(content=rest))
            self._deltas.append(returned[-1])
        return returned

    def _take(self, text: str, tag: Tag | None) -> list[Delta]:
        at = self.tokens
        self.tokens += 1
        if not self._splits and not self._splitter.may_reason:
            return []
        if tag is not None:
            text = text.removesuffix(tag.value)  # a tag may have to complete a character that was cut off before it
        deltas: list[Delta] = []
        if self._lexer is None:
            if text:
                deltas = self._splitter.take(text, at, at + 1)
            return deltas if tag is None else deltas + self._splitter.take(tag, at, at + 1)
        if tag is None:
            self._starts.append(self._lexer.length)
            return self._lexer.feed(text)
        deltas = self._lexer.feed(text)
        self._starts.append(self._lexer.length)
        return deltas + self._lexer.feed_tag(tag)

    def _returned(self, deltas: list[Delta]) -> list[Delta]:
        if self._has_stops:
            deltas = [shown for delta in deltas for shown in self._before_stop(delta)]
        self._deltas += deltas
        return deltas

    def _before_stop(self, delta: Delta) -> list[Delta]:
        """What may be returned of `delta`: content before a stop string, without an end that may become one.

        No stop string contains a call: text held back as the beginning of one comes before the call.
        """
        before = []
        if delta.tool_call is not None and (rest := self._stops.finish()):
            before.append(Delta(content=rest))
        if self._stops.found:
            return before
        if delta.content is None:
            return [*before, delta]
        shown, _ = self._stops.feed(delta.content)
        return [Delta(content=shown)] if shown else []
