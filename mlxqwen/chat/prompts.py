"""Prompts: the token ids that the model sees of a conversation, without old reasoning and short enough."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache
from typing import Any

from mlxqwen.chat.shown import check_shown, fate_of_content
from mlxqwen.chat.thinking import begins_in_thought, knows_think_blocks
from mlxqwen.chat.thinking_modes import thinking_modes
from mlxqwen.chat.turns import (
    check_conversation,
    count_turns,
    prepare_conversation,
    soft_switch,
    without_old_reasoning,
    without_oldest_turns,
)
from mlxqwen.chat.unrendered import naming_what_fails
from mlxqwen.checks import check_flag
from mlxqwen.errors import ContextLengthError, MessagesError, MlxqwenError, OptionError
from mlxqwen.files.config import MOST_YARN_FACTOR, ModelConfig
from mlxqwen.files.json_file import json_kind, shown
from mlxqwen.text.messages import ContentError, Message, split_reasoning
from mlxqwen.text.tokenizer import Tokenizer

__all__ = [
    "asks_for_thought",
    "check_messages",
    "drop_oldest_turns",
    "extending",
    "hard_switch",
    "least_tokens",
    "prepare_for",
    "render_prompt",
    "said_of_extending",
    "shortest_prompt",
]

_BY_REQUEST = 'extend the context (--yarn auto or --yarn-factor; in Python load(yarn="auto") or load(yarn_factor=…)), '
_BY_FACTOR = "extend the context (--yarn-factor; in Python load(yarn_factor=…)), "

# The content of an assistant's message that leaves its think block open.
_BEGUN_THOUGHT = re.compile(r"\s*<think>((?:(?!</think>).)*)\Z", re.DOTALL)

# Arguments of `Tokenizer.apply_chat_template`, and what every template is given.
_NO_VARIABLES = {
    *("self", "messages", "tools", "add_generation_prompt", "tokenize", "enable_thinking", "continue_final_message"),
    *("chat_template", "trust_special_tokens"),
}
_LONGEST_NAME = 64

Messages = Sequence[Mapping[str, Any]]


def extending(config: ModelConfig, tokens: int) -> str:
    """For a hint: `extend the context (…), ` by what would hold a prompt of so many tokens; "" if nothing would."""
    if config.yarn_choices:
        return ""
    if tokens < config.with_yarn_by_request().context_length:
        return _BY_REQUEST
    return _BY_FACTOR if tokens < config.with_yarn(MOST_YARN_FACTOR).context_length else ""


def said_of_extending(hint: str) -> str:
    """What `extending` has given to a hint."""
    return next((way for way in (_BY_REQUEST, _BY_FACTOR) if way in hint), "")


def hard_switch(thinking: bool | None, thinking_budget: int | None = None) -> bool | None:
    """The hard switch that `thinking` and the budget make together: a budget of 0 turns thinking off.

    Raises:
        OptionError: `thinking` is no switch, or the budget contradicts it.
    """
    check_flag("thinking", thinking, optional=True)
    if thinking_budget != 0 or isinstance(thinking_budget, bool):
        return thinking
    if thinking:
        raise OptionError(
            "thinking: found True with a thinking_budget of 0, expected one that agrees with the other",
            hint="Leave out thinking, or give a budget from 1, or None for no limit.",
        )
    return False


def prepare_for(tokenizer: Tokenizer, messages: Messages) -> tuple[Message, ...]:
    """`prepare_conversation`, whose error says of content that is no text what this model's template makes of it."""
    try:
        return prepare_conversation(messages)
    except ContentError as error:
        fate = None
        with suppress(MlxqwenError):
            fate = fate_of_content(messages, error.index, _renderer(tokenizer, {}))
        if fate is None:
            raise
        raise MessagesError(f"{error.found}: {fate}", hint=error.hint) from None


def render_prompt(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    thinking: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    trust_special_tokens: bool = False,
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool | None = None,
) -> list[int]:
    """The ids of a conversation up to the beginning of the answer; see `Engine.prompt` and `Engine.stream`.

    Args:
        variables: further variables of the template; those that are arguments here, or the tokenizer's, are none.
    """
    thinking = hard_switch(thinking)
    messages = prepare_for(tokenizer, messages)
    check_conversation(messages)
    more = _check_variables(variables)
    schemas = _check_tools(tools) if tools is not None else None
    prepared = without_old_reasoning(messages, trust_special_tokens=trust_special_tokens)
    prepared[-1] = split_reasoning(prepared[-1])  # so that a closed think block is no content to go on with
    goes_on = _goes_on(prepared, continue_final_message)
    values: dict[str, Any] = {"tools": schemas or None, "enable_thinking": thinking, **more}
    with _naming_what_fails(tokenizer, prepared, values):
        _check_shown(tokenizer, prepared, **values)
        values["trust_special_tokens"] = trust_special_tokens
        begun = _BEGUN_THOUGHT.match(prepared[-1]["content"] or "") if goes_on and len(prepared) > 1 else None
        if begun is not None and knows_think_blocks(tokenizer, tools=bool(schemas)):
            asked = {**values, "add_generation_prompt": True, "enable_thinking": thinking or None}
            before: list[int] = tokenizer.apply_chat_template(prepared[:-1], **asked)
            return [*before, *_thought_ids(tokenizer, before, begun[1], trust_special_tokens)]
        ids: list[int] = tokenizer.apply_chat_template(
            prepared,
            add_generation_prompt=add_generation_prompt and not goes_on,
            continue_final_message=goes_on,
            **values,
        )
        return ids


def _naming_what_fails(
    tokenizer: Tokenizer, messages: Sequence[Message], values: Mapping[str, Any]
) -> AbstractContextManager[None]:
    """See `naming_what_fails`."""

    def render(some: Sequence[Message], others: Mapping[str, Any]) -> str:
        return _renderer(tokenizer, others)(some)

    return naming_what_fails(messages, dict(values), render)


def _check_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    from mlxqwen.chat.tools import check_tool_schemas  # of no use to most prompts

    return check_tool_schemas(tools)


def check_messages(tokenizer: Tokenizer, messages: Messages) -> None:
    """Check a conversation, and that the model's chat template shows all of it.

    Raises:
        MessagesError: names the message, what a template would do with it, and the way out.
        TemplateError: the template raises for another reason.
    """
    messages = prepare_for(tokenizer, messages)
    check_conversation(messages)
    prepared = without_old_reasoning(messages)
    with _naming_what_fails(tokenizer, prepared, {}):
        _check_shown(tokenizer, prepared)


def _check_shown(tokenizer: Tokenizer, prepared: Sequence[Message], **values: Any) -> None:
    check_shown(prepared, _renderer(tokenizer, values))


def _renderer(tokenizer: Tokenizer, values: Mapping[str, Any]) -> Callable[[Sequence[Message]], str]:
    def render(messages: Sequence[Message]) -> str:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **values)

    return render


def _goes_on(messages: Messages, continue_final_message: bool | None) -> bool:
    """Whether the reply goes on with the last message: by default with an assistant's that calls no tools.

    Raises `OptionError` if it should, and cannot.
    """
    check_flag("continue_final_message", continue_final_message, optional=True)
    is_assistants, calls = messages[-1]["role"] == "assistant", bool(messages[-1].get("tool_calls"))
    if continue_final_message and not is_assistants:
        raise OptionError(
            f"continue_final_message: found True behind a message of role {messages[-1]['role']!r}, expected one of "
            "the assistant's",
            hint="Leave it out, or add the beginning of the answer as the assistant's message.",
        )
    if continue_final_message and calls:
        raise OptionError(
            "continue_final_message: found True behind calls of tools, which would be dropped in silence, expected a "
            "message without",
            hint="Leave it out, or add a message of role 'tool' for each call.",
        )
    return is_assistants and not calls and continue_final_message is not False


def _check_variables(variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """The variables by name. Raises `OptionError` for what is none, or has another way in."""
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        raise OptionError(f"template_variables: found {json_kind(variables)}, expected an object")
    for name in variables:
        if not isinstance(name, str) or not name.isidentifier() or len(name) > _LONGEST_NAME or name in _NO_VARIABLES:
            raise OptionError(
                f"template_variables: found {shown(name)}, expected names of variables that the template alone reads"
            )
    return dict(variables)


def _thought_ids(tokenizer: Tokenizer, before: Sequence[int], thought: str, trust_special_tokens: bool) -> list[int]:
    """The ids of a thought that the caller has begun, after the ids `before` of the prompt."""
    encode = tokenizer.encode if trust_special_tokens else tokenizer.encode_plain
    if begins_in_thought(tokenizer, before):  # the template has opened the block
        return encode(thought.removeprefix("\n") if tokenizer.decode(before[-8:]).endswith("\n") else thought)
    return [*tokenizer.encode("<think>"), *encode(thought)]


def least_tokens(tokenizer: Tokenizer, messages: Messages, *, trust_special_tokens: bool = False) -> int:
    """A lower bound of the length of the prompt for `messages`, computed without encoding it."""
    kept = without_old_reasoning(messages, trust_special_tokens=trust_special_tokens)
    return tokenizer.least_tokens("".join((message["content"] or "").strip() for message in kept))


def shortest_prompt(tokenizer: Tokenizer) -> int | None:
    """The tokens of a prompt that asks one letter; None where no conversation can be rendered."""
    try:
        return len(render_prompt(tokenizer, [{"role": "user", "content": "a"}]))
    except MlxqwenError:
        return None


def asks_for_thought(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    messages: Messages,
    *,
    thinking: bool | None = None,
    tools: bool = False,
    continue_final_message: bool | None = None,
) -> bool:
    """Whether the reply to `prompt`, the ids of `messages`, is expected to think.

    The prompt's end tells; where it leaves the model free, the hard switch does if the template has it, and then the
    soft switches. An answer that is gone on with is no thought, nor does a model think whose template has no switch.

    Args:
        thinking: the hard switch.
        tools: whether tools are given.
        continue_final_message: False if the reply does not go on with the assistant's last message.
    """
    begins = begins_in_thought(tokenizer, prompt)
    if begins is not None:
        return begins
    if _goes_on(messages, continue_final_message) or not thinking_modes(tokenizer, tools=tools).thinks(thinking):
        return False
    return soft_switch(messages) is not False


def drop_oldest_turns(
    messages: Messages,
    tokens_of: Callable[[Messages], int],
    *,
    room: int,
    reserve: int,
    extending: Callable[[int], str] = lambda tokens: "",
    trust_special_tokens: bool = False,
) -> list[Mapping[str, Any]]:
    """Drop as few of the oldest turns as needed to leave `reserve` of `room` tokens.

    A turn is a question with all that follows it, with calls of tools and their results, and is dropped as a whole.
    System messages and the last turn stay, even if they leave less than the reserve.

    Args:
        messages: never modified; the result holds the same dicts.
        tokens_of: the length of the prompt for a list of messages.
        room, reserve: tokens for prompt and reply, and for the reply.
        extending: what a hint says of extending the context for a prompt of so many tokens.
        trust_special_tokens: see `without_old_reasoning`.

    Raises:
        ContextLengthError: the last turn leaves no room at all.
    """

    @cache
    def tokens_without(count: int) -> int:
        return tokens_of(without_oldest_turns(messages, count, trust_special_tokens=trust_special_tokens))

    if tokens_without(0) + reserve <= room:
        return list(messages)
    last = count_turns(messages, trust_special_tokens=trust_special_tokens) - 1
    count = bisect_left(range(last), True, key=lambda count: tokens_without(count) + reserve <= room)
    if tokens_without(count) >= room:
        raise ContextLengthError(
            f"messages: {tokens_without(count):,} tokens without the older turns, but the context has room for "
            f"{room:,}, prompt and answer together",
            hint=f"Shorten the last turn, {extending(tokens_without(count))}or slide over it in a window that fits it "
            "(--max-kv-size; cache=make_cache(model, max_kv_size=…)).",
        )
    return without_oldest_turns(messages, count, trust_special_tokens=trust_special_tokens)
