"""A conversation → token ids in which special tokens come from the chat template alone.

Whoever writes `<|im_end|>` into a message must not end the turn with it. So the added tokens that the template itself
spells are replaced, before it runs, by private-use characters that occur nowhere else. In what it renders those
characters are the only added tokens; all other text, whatever it spells, is encoded without them. A test of the
template such as `'</think>' in content` finds its own tokens, not what a message spells. Text between the template's
tokens gets the ids that Hugging Face transformers gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import tokenizers

from mlxqwen.errors import MessagesError, OptionError, TemplateError
from mlxqwen.text.chat_template import render_chat
from mlxqwen.text.messages import Message, check_unicode, split_reasoning

__all__ = ["SafeChatEncoder"]

PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))

_TRUST = "They could not be told from forged ones: use another template, or trust_special_tokens=True."
_QUESTION = {"role": "user", "content": "a"}
_CALL = {"type": "function", "function": {"name": "b", "arguments": {"c": 1}}}
_TOOL = {"type": "function", "function": {"name": "b", "description": "d", "parameters": {"type": "object"}}}
# Conversations that hold nothing special, to learn where a template puts its tokens.
_PROBES: Sequence[dict[str, Any]] = (
    {"messages": [_QUESTION]},
    {"messages": [_QUESTION], "variables": {"enable_thinking": False}},
    {"messages": [{"role": "system", "content": "a"}, _QUESTION, {"role": "assistant", "content": "b"}, _QUESTION]},
    {
        "messages": [
            _QUESTION,
            {"role": "assistant", "content": "", "reasoning_content": "b", "tool_calls": [_CALL]},
            {"role": "tool", "content": "d"},
        ],
        "tools": [_TOOL],
    },
)


class SafeChatEncoder:
    """Encodes conversations for one tokenizer.

    Args:
        added_tokens: id → token, as the `tokenizers` library gives them.
        encode: text → ids, with added tokens recognised.
        encode_plain: text → ids, without.
    """

    def __init__(
        self,
        added_tokens: Mapping[int, tokenizers.AddedToken],
        encode: Callable[[str], list[int]],
        encode_plain: Callable[[str], list[int]],
    ) -> None:
        self._ids = [token_id for token_id, token in added_tokens.items() if token.content]
        self._tokens = [added_tokens[token_id] for token_id in self._ids]
        self._encode_trusted = encode
        self._encode_plain = encode_plain
        self._checked_templates: set[str] = set()

    def encode(
        self,
        source: str,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        special_tokens: Mapping[str, str],
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The ids of a conversation.

        Args:
            source: the template; its author is trusted to say special tokens.
            messages: as `mlxqwen.text.messages.prepare_messages` returns them. A think block that opens an assistant's
                content is taken for its reasoning.
            tools: as `mlxqwen.text.messages.prepare_tools` returns them.
            special_tokens: variables that hold the checkpoint's own special tokens, such as `eos_token`.
            variables: further variables, no more trusted than messages.
            add_generation_prompt, continue_final_message: see `mlxqwen.text.chat_template.render_chat`.

        Raises:
            TemplateError: the template is broken, or puts special tokens together from pieces.
            MessagesError: see `render_chat`; or the conversation leaves no private-use character free.
        """
        if source not in self._checked_templates:
            self._check_template(source, special_tokens)
            self._checked_templates.add(source)
        return self._encode(
            source,
            [dict(split_reasoning(message)) for message in messages],
            special_tokens,
            tools=tools,
            variables=variables or {},
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def _encode(
        self,
        source: str,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, str],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any],
        **flags: bool,
    ) -> list[int]:
        taken = set().union(source, *texts_in([messages, tools, variables, dict(special_tokens)]))
        placeholders = self._choose_placeholders(taken)
        own = {name: placeholders.get(token, token) for name, token in special_tokens.items()}
        try:
            text = render_chat(
                source, messages, tools=tools, variables={**own, **variables}, replacements=placeholders, **flags
            )
        except TemplateError as error:
            raise TemplateError(_restore_escaped(error.problem, placeholders), hint=error.hint) from error
        return self._encode_rendered(text, placeholders)

    def _choose_placeholders(self, taken: set[str]) -> dict[str, str]:
        """Each added token's spelling → a character that is not `taken`."""
        free = (chr(code) for code in chain(*PRIVATE_USE) if chr(code) not in taken)
        placeholders = dict(zip((token.content for token in self._tokens), free, strict=False))
        if len(placeholders) < len(self._tokens):
            raise MessagesError(
                "messages: nearly all private-use characters of Unicode are in use",
                hint="Text hardly needs them: leave them out.",
            )
        return placeholders

    def _encode_rendered(self, text: str, placeholders: Mapping[str, str]) -> list[int]:
        check_unicode(text, "the rendered conversation")
        restored = str.maketrans({placeholder: spelling for spelling, placeholder in placeholders.items()})
        finder = _make_finder(tuple((placeholders[t.content], t.lstrip, t.rstrip, t.single_word) for t in self._tokens))
        found = finder.encode(text, add_special_tokens=False)
        ids: list[int] = []
        end = 0
        for index, (start, stop) in zip(found.ids, found.offsets, strict=True):
            ids += self._encode_plain(text[end:start].translate(restored))
            ids.append(self._ids[index])
            end = stop
        return ids + self._encode_plain(text[end:].translate(restored))

    def _check_template(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Refuse a template whose special tokens are not all spelled out in it."""
        for probe in _PROBES:
            arguments = {"variables": {}, **probe, "add_generation_prompt": True}
            variables = {**special_tokens, **arguments["variables"]}
            try:
                trusted = self._encode_trusted(render_chat(source, **{**arguments, "variables": variables}))
                safe = self._encode(source, special_tokens=special_tokens, **arguments)
            except (TemplateError, OptionError):
                continue  # not every template takes every conversation
            if self._added_only(trusted) != self._added_only(safe):
                raise TemplateError(
                    "chat template: found special tokens put together from pieces, expected them spelled out",
                    hint=_TRUST,
                )

    def _added_only(self, ids: Sequence[int]) -> list[int]:
        added = set(self._ids)
        return [token_id for token_id in ids if token_id in added]


def texts_in(value: Any) -> Iterator[str]:
    """All strings in a plain JSON value, keys included."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack += chain(item.keys(), item.values())
        elif isinstance(item, list):
            stack += item


@lru_cache(maxsize=8)
def _make_finder(placeholders: tuple[tuple[str, bool, bool, bool], ...]) -> tokenizers.Tokenizer:
    """A tokenizer that knows placeholders alone: their rules of white space and words are the library's own."""
    finder = tokenizers.Tokenizer(tokenizers.models.BPE())
    finder.add_tokens(
        [
            tokenizers.AddedToken(character, lstrip=lstrip, rstrip=rstrip, single_word=single_word, normalized=False)
            for character, lstrip, rstrip, single_word in placeholders
        ]
    )
    return finder


def _restore_escaped(problem: str, placeholders: Mapping[str, str]) -> str:
    """An error's text, in which what a template says about its own tokens is escaped as not printable."""
    for spelling, placeholder in placeholders.items():
        problem = problem.replace(placeholder.encode("unicode_escape").decode(), spelling)
    return problem
