"""A conversation → token ids in which special tokens come from the chat template alone.

Whoever writes `<|im_end|>` into a message must not end the turn with it. So the added tokens that the template itself
spells are replaced, before it is compiled, by placeholders: halves of surrogate pairs, which no text holds that is
Unicode, and others are refused. In what the template renders, placeholders are the only added tokens; all other text,
whatever it spells, is encoded without them. A test of the template such as `'</think>' in content` finds its own
tokens, not what a message spells. Text between the template's tokens gets the ids that Hugging Face transformers
gives it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from mlxqwen.errors import OptionError, TemplateError, TokenizerError
from mlxqwen.text.chat_template import render_chat
from mlxqwen.text.messages import Message, split_reasoning

__all__ = ["SafeChatEncoder"]

SURROGATES = range(0xD800, 0xE000)
# The `tokenizers` library takes no surrogates. It is shown these private-use characters in their place, and the last
# one for the text's own: it looks at white space and words around them, and all are neither.
SHOWN = range(0xE000, 0xE000 + len(SURROGATES))
OTHER = chr(0xF8FF)

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
        self._tokens = {token_id: token for token_id, token in added_tokens.items() if token.content}
        if len(self._tokens) > len(SURROGATES):
            raise TokenizerError(
                f"tokenizer: found {len(self._tokens)} added tokens, expected at most {len(SURROGATES)}",
                hint="Use the tokenizer.json that Qwen publishes, which has 26, or pass trust_special_tokens=True.",
            )
        self._ids = list(self._tokens)
        self._placeholders = {
            token.content: chr(code) for token, code in zip(self._tokens.values(), SURROGATES, strict=False)
        }
        self._spellings = {placeholder: spelling for spelling, placeholder in self._placeholders.items()}
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
            MessagesError: see `render_chat`.
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
        own = {name: self._placeholders.get(token, token) for name, token in special_tokens.items()}
        try:
            text = render_chat(
                source, messages, tools=tools, variables={**own, **variables}, replacements=self._placeholders, **flags
            )
        except TemplateError as error:
            raise type(error)(self._restore_escaped(error.problem), hint=error.hint) from error
        return self._encode_rendered(text)

    def _encode_rendered(self, text: str) -> list[int]:
        ids: list[int] = []
        end = 0
        for index, start, stop in self._found(text):
            ids += self._encode_plain(self._spelled(text[end:start]))
            ids.append(self._ids[index])
            end = stop
        return ids + self._encode_plain(self._spelled(text[end:]))

    def _found(self, text: str) -> Iterator[tuple[int, int, int]]:
        """The number of each placeholder that is a token, and where the token begins and ends."""
        if not any(token.lstrip or token.rstrip or token.single_word for token in self._tokens.values()):
            for place in self._placeholder.finditer(text):
                yield SURROGATES.index(ord(place[0])), *place.span()
            return
        found = self._finder.encode(text.translate(self._shown), add_special_tokens=False)
        for index, (start, stop) in zip(found.ids, found.offsets, strict=True):
            yield index, start, stop

    def _spelled(self, text: str) -> str:
        """A text with the placeholders that are no tokens in it as what they stand for."""
        return self._placeholder.sub(lambda place: self._spellings[place[0]], text)

    @cached_property
    def _placeholder(self) -> re.Pattern[str]:
        return re.compile("|".join(self._placeholders.values()) or "(?!)")

    @cached_property
    def _shown(self) -> dict[int, str]:
        """Character → what stands for it in the text that `_finder` is shown."""
        return dict.fromkeys(SHOWN, OTHER) | {code: chr(shown) for code, shown in zip(SURROGATES, SHOWN, strict=True)}

    @cached_property
    def _finder(self) -> tokenizers.Tokenizer:
        """A tokenizer that knows placeholders alone: their rules of white space and words are the library's own."""
        # Its words are whole texts: a cache of them would hold what users said, 10,000 times.
        finder = tokenizers.Tokenizer(tokenizers.models.BPE(cache_capacity=0))
        finder.add_tokens(
            [
                tokenizers.AddedToken(
                    chr(shown), lstrip=t.lstrip, rstrip=t.rstrip, single_word=t.single_word, normalized=False
                )
                for t, shown in zip(self._tokens.values(), SHOWN, strict=False)
            ]
        )
        return finder

    def _restore_escaped(self, problem: str) -> str:
        """The text of an error, with escaped placeholders as the tokens that they stand for."""
        for spelling, placeholder in self._placeholders.items():
            problem = problem.replace(placeholder.encode("unicode_escape").decode(), spelling)
        return problem

    def _check_template(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Check that the template spells out all its special tokens. Raises `TemplateError`."""
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
