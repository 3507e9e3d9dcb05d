"""Log-probabilities in OpenAI's form: the content's tokens in one list, the thought's in another."""

from __future__ import annotations

from typing import Any

from mlxqwen.chat.reply import Delta
from mlxqwen.chat.tags import Tag
from mlxqwen.engine.generation import GeneratedToken
from mlxqwen.engine.logprobs import TokenLogprobs
from mlxqwen.errors import MlxqwenError
from mlxqwen.text.tokenizer import Tokenizer

__all__ = ["ChoiceLogprobs", "spelled_entry"]

_LEAST = -9999.0  # for what JSON has no number for, as OpenAI and vLLM write it


class ChoiceLogprobs:
    """Tells of each token of a choice whether it is content, thought, or neither (a call, an end token).

    A token belongs to the first piece of text that follows from it: only then it is certain.

    Args:
        tokenizer: spells tokens.
        ends: tokens that end the reply, which are no content.
        tells_thought: whether the thought's tokens are told, too.
    """

    def __init__(self, tokenizer: Tokenizer, ends: frozenset[int], *, tells_thought: bool = True) -> None:
        self._tokenizer = tokenizer
        self._tells_thought = tells_thought
        self._ends = ends
        self._thought_tags = {tokenizer.token_to_id(tag.value) for tag in (Tag.THINK, Tag.END_THINK)}
        self._waiting: list[dict[str, Any]] = []
        self._has_content = False
        self.content: list[dict[str, Any]] = []
        self.reasoning: list[dict[str, Any]] = []

    def feed(self, token: GeneratedToken) -> dict[str, Any] | None:
        """Take the next token → the entries that are certain now, as a chunk has them; None if there are none."""
        if token.logprobs is None:
            return None
        content, reasoning = len(self.content), len(self.reasoning)
        if token.token in self._thought_tags:
            self.reasoning += [*self._waiting, self._entry(token.logprobs)]
            self._waiting = []
        elif token.token not in self._ends:
            self._waiting.append(self._entry(token.logprobs))
        for delta in token.deltas:
            self._assign(delta)
        if not self._tells_thought:
            self.reasoning.clear()
        return _entries(self.content[content:], self.reasoning[reasoning:])

    def _assign(self, delta: Delta) -> None:
        waiting, self._waiting = self._waiting, []
        if delta.reasoning is not None:
            self.reasoning += waiting
        elif delta.content is not None:
            if not self._has_content:  # line breaks between thought and content leave no text
                while waiting and not _text(waiting[0]).strip() and not delta.content.startswith(_text(waiting[0])):
                    waiting.pop(0)
            self.content += waiting
            self._has_content = True

    def whole(self) -> dict[str, Any]:
        """All entries."""
        return _entries(self.content, self.reasoning) or {"content": [], "refusal": None, "reasoning_content": []}

    def _entry(self, told: TokenLogprobs) -> dict[str, Any]:
        likeliest = [spelled_entry(self._tokenizer, token, value) for token, value in told.likeliest]
        return {**spelled_entry(self._tokenizer, told.token, told.logprob), "top_logprobs": likeliest}


def _entries(content: list[dict[str, Any]], reasoning: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not (content or reasoning):
        return None
    return {"content": content, "refusal": None, "reasoning_content": reasoning}


def _text(entry: dict[str, Any]) -> str:
    return str(entry["token"])


def spelled_entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """A token with its text, bytes and log-probability."""
    try:
        data = tokenizer.token_bytes(token)
    except MlxqwenError:  # the model has more ids than the tokenizer has tokens
        data = b""
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, _LEAST), "bytes": list(data)}
