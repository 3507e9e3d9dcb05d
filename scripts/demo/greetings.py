"""Greetings and small talk for the demo model, to be trained on beside the others, with and without tools at hand.

Answers are few and fixed. What the model cannot do, the work of a tool that is missing too, gets a refusal.
What is said comes from `small_talk.json`; one phrase in eight is held out from training, but none of the bare ones,
as "hello".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demo.data import Conversation, assistant_message, switched
from demo.source import Source, in_split
from demo.tasks import PHRASES, Exchange, Message, random_exchange
from demo.tool_tasks import CLOCK_QUESTIONS, calculator_use, random_tools

_TALK: dict[str, Any] = json.loads(Path(__file__).with_name("small_talk.json").read_text(encoding="utf-8"))
_ENGLISH_HELLO, _CHINESE_HELLO = "Hello! ", "你好！"
_CAN = "Ask me to count letters in a word, to add or subtract small numbers, to reverse a word or to compare two."
ANSWERS: dict[str, tuple[str, ...]] = {
    "hello": tuple(_ENGLISH_HELLO + introduction for introduction in PHRASES["introductions"]),
    "how are you": (f"I am well, thank you. {_CAN}",),
    "thanks": ("You are welcome!",),
    "goodbye": ("Goodbye!",),
    "help": tuple(PHRASES["introductions"]),
    "hello (Chinese)": (_CHINESE_HELLO + PHRASES["introduction (Chinese)"][0],),
    "thanks (Chinese)": ("不客气！",),
    "goodbye (Chinese)": ("再见！",),
    "anything else (Chinese)": tuple(PHRASES["introduction (Chinese)"]),
    "anything else": (PHRASES["refusal"][0],),
    "a missing tool": (PHRASES["refusal"][0],),
}
GREETINGS = ("hello", "how are you", "thanks", "goodbye", "help")
_SHARES = {
    "hello": 14,
    "how are you": 9,
    "thanks": 5,
    "goodbye": 7,
    "help": 4,
    "hello (Chinese)": 6,
    "thanks (Chinese)": 3,
    "goodbye (Chinese)": 3,
    "anything else (Chinese)": 3,
    "anything else": 31,
    "a missing tool": 14,
}


def _written(source: Source, text: str, marks: Sequence[str]) -> str:
    """`text` as somebody might type it: in any case, with a mark at its end or none."""
    draw = source.random.random()
    if draw < 0.45:
        text = text[0].upper() + text[1:]
    elif draw < 0.5:
        text = text.upper()
    return text if text.endswith("?") else text + source.random.choice(marks)


def _phrase(source: Source, kind: str) -> str:
    """A phrase of the split, half of the time a bare one where those belong to it."""
    choice, parts = source.random.choice, _TALK["kinds"][kind]
    if source.split == "train" and source.random.random() < 0.5:
        return _written(source, choice(parts["phrases"]), parts["marks"])
    while True:
        text = choice(parts["before"]) + choice(parts["phrases"]) + choice(parts["after"])
        held_out = text not in parts["phrases"] and in_split(text, "held-out")
        if held_out == (source.split == "held-out"):
            return _written(source, text, parts["marks"])


def _anything_else(source: Source) -> str:
    """A request, statement, question or fragment of the split that is none of the model's tasks."""
    parts = _TALK["anything else"]
    while True:
        words = {name: source.random.choice(values) for name, values in parts.items()}
        text = words.pop("patterns").format(**words, word=source.word())
        if in_split(text, source.split):
            return _written(source, text, ("", "", "?", ".", "!"))


def _for_a_calculator(source: Source) -> str:
    """A product, or a sum or difference of numbers too long for the model."""
    while True:
        use = calculator_use(source)
        first, operator, second = use.arguments["expression"].split()
        if operator == "*" or max(int(first), int(second)) > 999:
            return use.question


def _for_a_clock(source: Source) -> str:
    """A question for the time of day, or for the date."""
    if source.random.random() < 0.6:
        return source.random.choice(CLOCK_QUESTIONS)
    return _written(source, source.random.choice(_TALK["dates"]), ("?", "?", ""))


_WORK: dict[str, Callable[[Source], str]] = {"calculator": _for_a_calculator, "clock": _for_a_clock}


def small_talk(source: Source, kind: str, tools: Sequence[str] = ()) -> Exchange:
    """An exchange of `kind`, a key of `ANSWERS`; what is missing is a calculator or a clock that is not in `tools`."""
    if kind == "a missing tool":
        question = source.random.choice([ask for tool, ask in _WORK.items() if tool not in tools])(source)
    else:
        question = _anything_else(source) if kind == "anything else" else _phrase(source, kind)
    parts = _TALK["kinds"].get(kind, {"thought": "This is not one of the things I can do."})
    return Exchange(kind, question, parts["thought"], source.random.choice(ANSWERS[kind]), "")


def is_answered(exchange: Exchange, answer: str) -> bool:
    """Whether `answer` is one of the sentences for the kind of `exchange`.

    To a greeting the introduction alone is right too, as the first training taught it.
    """
    right = ANSWERS[exchange.task]
    return answer in right or f"{_ENGLISH_HELLO}{answer}" in right or f"{_CHINESE_HELLO}{answer}" in right


def greeting_kind(source: Source) -> str:
    """One of `GREETINGS`, as often as in longer conversations."""
    return source.random.choices(GREETINGS, [_SHARES[kind] for kind in GREETINGS])[0]


def short_conversation(source: Source, kind: str) -> Conversation:
    """One saying of `kind` and its answer, with no tool at hand."""
    exchange = small_talk(source, kind)
    question, thinking = switched(source, exchange.question, True)
    enable_thinking = source.random.random() >= 0.2
    reply = assistant_message(exchange, thinking and enable_thinking)
    return Conversation(({"role": "user", "content": question}, reply), (), enable_thinking)


def small_talk_conversation(source: Source) -> Conversation:
    """One to three questions, most of them small talk, that call no tool, ending with the assistant."""
    chance = source.random.random
    messages: list[Message] = []
    tools = random_tools(source) if chance() < 0.35 else ()
    names = [tool["function"]["name"] for tool in tools]
    if chance() < 0.1:
        messages.append({"role": "system", "content": source.random.choice(PHRASES["system"])})
    enable_thinking, thinking = chance() >= 0.3, True
    for _ in range(source.random.choice((1, 1, 1, 2) if tools else (1, 1, 2, 3))):
        kind = source.random.choices(tuple(_SHARES), tuple(_SHARES.values()))[0]
        if kind == "a missing tool" and len(names) == len(_WORK):
            kind = "anything else"
        exchange = small_talk(source, kind, names) if chance() < 0.8 else random_exchange(source)
        question, thinking = switched(source, exchange.question, thinking)
        messages += [{"role": "user", "content": question}, assistant_message(exchange, thinking and enable_thinking)]
    return Conversation(tuple(messages), tools, enable_thinking)
