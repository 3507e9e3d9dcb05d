"""What the tags of a reply are: tokens where the tokenizer has them, else the text that spells them."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxqwen.text.tokenizer import Tokenizer

__all__ = ["TEXT_TAGS", "ReplyTags", "reply_tags"]

_SPELLED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
# Each stands for a tag that is a token. UTF-8 has no surrogates, so no text of a tokenizer holds them.
_MARKS = ("\ud800", "\ud801", "\ud802", "\ud803")
_SPELL = str.maketrans(dict(zip(_MARKS, _SPELLED, strict=True)))


@dataclass(frozen=True, slots=True)
class ReplyTags:
    """What stands for each tag in the text that a reply is read from.

    Args:
        think, end_think, tool_call, end_tool_call: its characters, or a mark where the tag is a token: then the same
            characters spelled by other tokens are text.
        marks: the marks by token id.
    """

    think: str = _SPELLED[0]
    end_think: str = _SPELLED[1]
    tool_call: str = _SPELLED[2]
    end_tool_call: str = _SPELLED[3]
    marks: dict[int, str] = field(default_factory=dict)

    def mark(self, token: int, text: str) -> str:
        """The `text` that `token` completes, with the mark in the place of a tag."""
        mark = self.marks.get(token)
        return text if mark is None else text.removesuffix(self.spell(mark)) + mark

    def spell(self, text: str) -> str:
        """Text as it is shown: with the tags' characters in the places of their marks."""
        return text.translate(_SPELL) if self.marks else text


TEXT_TAGS = ReplyTags()


def reply_tags(tokenizer: Tokenizer) -> ReplyTags:
    """The tags of the replies that `tokenizer` decodes."""
    tokens = [tokenizer.token_to_id(tag) for tag in _SPELLED]
    think, end_think, tool_call, end_tool_call = (
        tag if token is None else mark for tag, mark, token in zip(_SPELLED, _MARKS, tokens, strict=True)
    )
    marks = {token: mark for mark, token in zip(_MARKS, tokens, strict=True) if token is not None}
    return ReplyTags(think, end_think, tool_call, end_tool_call, marks)
