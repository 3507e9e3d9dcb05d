"""Conversations for the demo model: generated from a seed, with the standard library alone.

Single questions and longer talks, with follow-up questions and doubts, calls of a calculator, and the switches
between thinking and not thinking.  `conversation` makes a random one, `render` its text as the chat template writes
it, `stream` an endless sequence, and `exercise` one question of a task with its answer, for evaluation.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from demo.source import Source, Split
from demo.tasks import (
    EXCHANGES,
    PHRASES,
    Exchange,
    Message,
    calculator_tool,
    count_exchange,
    plural,
    random_exchange,
    spell_and_count,
    tool_exchange,
)

Span = Literal["context", "history", "given", "reply"]

# Qwen3's added tokens, in the order of their ids, and whether they are special.
ADDED_TOKENS: tuple[tuple[str, bool], ...] = (
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<|object_ref_start|>", True),
    ("<|object_ref_end|>", True),
    ("<|box_start|>", True),
    ("<|box_end|>", True),
    ("<|quad_start|>", True),
    ("<|quad_end|>", True),
    ("<|vision_start|>", True),
    ("<|vision_end|>", True),
    ("<|vision_pad|>", True),
    ("<|image_pad|>", True),
    ("<|video_pad|>", True),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<|fim_prefix|>", False),
    ("<|fim_middle|>", False),
    ("<|fim_suffix|>", False),
    ("<|fim_pad|>", False),
    ("<|repo_name|>", False),
    ("<|file_sep|>", False),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
)


@dataclass(frozen=True)
class Conversation:
    """Messages as the chat template takes them, ending with the assistant's reply.

    With `enable_thinking` false the reply is prompted with an empty think block and says nothing in it.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    enable_thinking: bool = True


def switched(source: Source, text: str, thinking: bool) -> tuple[str, bool]:
    """`text` with a soft switch at times, and whether thinking is on after it."""
    draw = source.random.random()
    if draw < 0.15:
        return f"{text} /no_think", False
    if draw < (0.22 if thinking else 0.5):
        return f"{text} /think", True
    return text, thinking


def assistant_message(exchange: Exchange, thinking: bool) -> Message:
    """The reply of `exchange`, with its thought or without."""
    reasoning = exchange.thinking if thinking else ""
    return {"role": "assistant", "content": exchange.answer, "reasoning_content": reasoning}


def _doubted(source: Source, told: Exchange) -> tuple[Exchange, Exchange]:
    """A count as told, at times wrong, and its check."""
    count = int(told.expected)
    claimed = count
    if source.random.random() < 0.4:
        claimed = source.random.choice([n for n in (count - 1, count + 1, count + 2) if n >= 0])
        answer = told.answer.replace(f" {count} ", f" {claimed} ")
        told = replace(told, answer=answer)
    verdict = "Yes, I checked" if claimed == count else "No, I was wrong"
    there = f"there {'is' if count == 1 else 'are'} {count} {plural(count, told.letter)} in {told.word}."
    check = Exchange(
        "check",
        source.random.choice(PHRASES["doubts"]),
        f"Spell it and count {told.letter}: {spell_and_count(told.word, told.letter)}. "
        f"So the count is {count}. I said {claimed}.",
        f"{verdict}: {there}",
        told.expected,
        told.word,
        told.letter,
    )
    return told, check


def _exchanges(source: Source) -> list[Exchange]:
    """One to three exchanges, some of which follow from the one before."""
    exchanges = [random_exchange(source)]
    more = source.random.choices((0, 1, 2), (60, 27, 13))[0]
    for _ in range(more):
        last = exchanges[-1]
        draw = source.random.random()
        if last.task in ("count", "check") and draw < 0.4:
            if draw < 0.12 and last.task == "count":
                exchanges[-1:] = _doubted(source, last)
            elif draw < 0.2:
                letter = source.letter(last.word)
                follow_up = count_exchange(source, last.word, letter)
                exchanges.append(replace(follow_up, question=f"And how many {letter}'s?"))
            else:
                same = last.letter if source.random.random() < 0.6 else None
                exchanges.append(count_exchange(source, letter=same, follow_up=True))
        else:
            exchanges.append(random_exchange(source))
    return exchanges


def conversation(source: Source) -> Conversation:
    """A random conversation, ending with the assistant."""
    chance = source.random.random
    messages: list[Message] = []
    tools: tuple[dict[str, Any], ...] = ()
    thinking = True
    if chance() < 0.15:
        text, thinking = source.random.choice(PHRASES["system"]), True
        if chance() < 0.3:
            text, thinking = source.random.choice(((f"{text} /no_think", False), (f"{text} /think", True)))
        messages.append({"role": "system", "content": text})
    if chance() < 0.06:
        tools = (calculator_tool(source.random.choice(PHRASES["tool descriptions"])),)
    enable_thinking = chance() >= 0.15
    if tools and chance() < 0.85:
        return _tool_conversation(source, messages, tools, enable_thinking, thinking)
    exchanges = _exchanges(source)
    for exchange in exchanges:
        question, thinking = switched(source, exchange.question, thinking)
        messages.append({"role": "user", "content": question})
        messages.append(assistant_message(exchange, thinking and enable_thinking))
    return Conversation(tuple(messages), tools, enable_thinking)


def _tool_conversation(
    source: Source,
    messages: list[Message],
    tools: tuple[dict[str, Any], ...],
    enable_thinking: bool,
    thinking: bool,
) -> Conversation:
    exchange = tool_exchange(source)
    question, thinking = switched(source, exchange.question, thinking)
    thinking = thinking and enable_thinking
    call = exchange.call if thinking else exchange.call | {"reasoning_content": ""}
    messages += [{"role": "user", "content": question}, call]
    if source.random.random() < 0.65:
        reasoning = exchange.thinking if thinking else ""
        messages += [
            {"role": "tool", "content": exchange.result},
            {"role": "assistant", "content": exchange.answer, "reasoning_content": reasoning},
        ]
    return Conversation(tuple(messages), tools, enable_thinking)


_TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def _system_text(conversation: Conversation) -> str:
    first = conversation.messages[0]
    own = first["content"] if first["role"] == "system" else ""
    if not conversation.tools:
        return own
    listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in conversation.tools)
    return (f"{own}\n\n" if own else "") + _TOOLS_BEFORE + listed + _TOOLS_AFTER


def _calls_text(message: Message) -> str:
    calls = []
    for call in message.get("tool_calls", ()):
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append(f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": {arguments}}}\n</tool_call>')
    return "\n".join(calls)


def spans(conversation: Conversation) -> list[tuple[Span, str]]:
    """The text of a conversation as the chat template writes it, cut where its use in training changes.

    "context" is what others write, "given" the empty think block of a prompt, "history" an assistant's turn
    whose thinking is gone, "reply" what the model is to say.
    """
    messages = conversation.messages
    last_question = max(index for index, message in enumerate(messages) if message["role"] == "user")
    context = ""
    result: list[tuple[Span, str]] = []
    if system := _system_text(conversation):
        context = f"<|im_start|>system\n{system}<|im_end|>\n"
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "user":
            context += f"<|im_start|>user\n{content}<|im_end|>\n"
        elif role == "tool":
            context += f"<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n"
        elif role == "assistant":
            result.append(("context", context + "<|im_start|>assistant\n"))
            context = ""
            says = content + _calls_text(message) + "<|im_end|>\n"
            thinking = message["reasoning_content"]
            last = index == len(messages) - 1
            if index < last_question or not (thinking or last):
                result.append(("history", says))
            elif conversation.enable_thinking:
                result.append(("reply", f"<think>\n{thinking}\n</think>\n\n{says}"))
            else:
                result += [("given", "<think>\n\n</think>\n\n"), ("reply", says)]
    return result


def render(conversation: Conversation) -> str:
    """The text of a conversation as the chat template writes it."""
    return "".join(text for _, text in spans(conversation))


def tokenizer_text(seed: int, count: int) -> Iterator[str]:
    """The text of `count` conversations, without added tokens and with only common words to be spelled.

    Any other word must fall into short pieces, or the model could not learn how each is spelled.
    """
    source = Source(random.Random(seed), only_common_words=True)
    for _ in range(count):
        text = render(conversation(source))
        yield from re.split(r"<\|im_\w+\|>|</?think>|</?tool_\w+>", text)


def stream(seed: int, pieces: Sequence[str] = (), split: Split = "train") -> Iterator[str]:
    """An endless stream of conversations as texts, each ended by `<|endoftext|>`."""
    source = Source(random.Random(seed), split, pieces)
    while True:
        yield render(conversation(source)) + "<|endoftext|>"


def exercise(task: str, source: Source, thinking: bool = True, soft: bool = False) -> tuple[Conversation, Exchange]:
    """One question of `task`, with the conversation that leads to it and to its right reply.

    Not thinking is asked for by an empty think block in the prompt or, where `soft`, by `/no_think`.
    """
    if task == "calculator":
        called = tool_exchange(source)
        exchange = Exchange(task, called.question, called.call_thinking, "", f'{{"expression": "{called.expression}"}}')
        reply = called.call if thinking else called.call | {"reasoning_content": ""}
        tools: tuple[dict[str, Any], ...] = (calculator_tool(),)
    else:
        exchange = EXCHANGES[task](source)
        reply, tools = assistant_message(exchange, thinking), ()
    question = exchange.question + (" /no_think" if soft and not thinking else "")
    messages = ({"role": "user", "content": question}, reply)
    return Conversation(messages, tools, thinking or soft), exchange
