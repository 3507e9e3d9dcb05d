"""Questions that the demo model learns to answer, each with its thinking and its answer.

Letter counting with the word spelled out, sums and differences digit by digit, reversing, comparing, introducing
itself, a few in Chinese, and what a calculator is called for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.source import Source, in_split

Message = dict[str, Any]

TASKS = (
    "count",
    "sum",
    "difference",
    "length",
    "reverse",
    "compare numbers",
    "compare words",
    "calculator",
    "introduce",
    "count (Chinese)",
    "sum (Chinese)",
    "introduce (Chinese)",
)

PHRASES: dict[str, list[str]] = json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Exchange:
    """One question, its thinking and its answer; a right answer has `expected`, a number as its last one."""

    task: str
    question: str
    thinking: str
    answer: str
    expected: str
    word: str = ""
    letter: str = ""


def is_right(exchange: Exchange, reply: str) -> bool:
    """Whether `reply`, without its think block, gives the expected answer."""
    if exchange.expected.isdecimal():
        return re.findall(r"\d+", reply)[-1:] == [exchange.expected]
    return exchange.expected.lower() in reply.lower()


def spell_and_count(word: str, letter: str) -> str:
    """The letters of a word, with a running count behind those that are `letter`."""
    count, spelled = 0, []
    for character in word:
        count += character == letter
        spelled.append(f"{character}({count})" if character == letter else character)
    return " ".join(spelled)


def _spell_and_number(word: str) -> str:
    return " ".join(f"{character}{position}" for position, character in enumerate(word, 1))


def _quoted(source: Source, word: str) -> str:
    draw = source.random.random()
    if draw < 0.1:
        word = word.capitalize()
    return source.random.choice(PHRASES["quoted words"]).format(word) if source.random.random() < 0.3 else word


def _shown(source: Source, letter: str) -> str:
    draw = source.random.random()
    return letter.upper() if draw < 0.05 else f'"{letter}"' if draw < 0.1 else letter


def plural(count: int, letter: str) -> str:
    """`letter` as it is counted: r, or r's."""
    return f"{letter}" if count == 1 else f"{letter}'s"


def count_exchange(
    source: Source, word: str | None = None, letter: str | None = None, follow_up: bool = False
) -> Exchange:
    """How often a letter occurs in a word."""
    word = word or source.word()
    letter = letter or source.letter(word)
    count = word.count(letter)
    pattern = source.random.choice(PHRASES["count again"] if follow_up else PHRASES["count"])
    return Exchange(
        "count",
        pattern.format(l=_shown(source, letter), w=_quoted(source, word)),
        f"Spell it and count {letter}: {spell_and_count(word, letter)}. So the count is {count}.",
        f"There {'is' if count == 1 else 'are'} {count} {plural(count, letter)} in {word}.",
        str(count),
        word,
        letter,
    )


def _count_in_chinese(source: Source) -> Exchange:
    word = source.word()
    letter = source.letter(word)
    count = word.count(letter)
    question = source.random.choice(PHRASES["count (Chinese)"]).format(w=word, l=letter)
    return Exchange(
        "count (Chinese)",
        question,
        f"拼写并数 {letter}： {spell_and_count(word, letter)}。一共 {count} 个。",
        f"{word} 里有 {count} 个 {letter}。",
        str(count),
        word,
        letter,
    )


def _length_exchange(source: Source) -> Exchange:
    word = source.word(longest=12)
    question = source.random.choice(PHRASES["length"]).format(w=_quoted(source, word))
    return Exchange(
        "length",
        question,
        f"Spell it and number the letters: {_spell_and_number(word)}. So the length is {len(word)}.",
        f"The number of letters in {word} is {len(word)}.",
        str(len(word)),
    )


def _reverse_exchange(source: Source) -> Exchange:
    word = source.word(longest=9)
    question = source.random.choice(PHRASES["reverse"]).format(w=word)
    return Exchange(
        "reverse",
        question,
        f"Spell it: {' '.join(word)}. Backwards: {' '.join(reversed(word))}.",
        "-".join(reversed(word)) + ".",
        "-".join(reversed(word)),
    )


def _digits(number: int, length: int) -> list[int]:
    return [int(digit) for digit in reversed(str(number).zfill(length))]


def add_by_digits(first: int, second: int, carry: str = "carry 1") -> str:
    """The steps of a written addition, from the last digit."""
    length = max(len(str(first)), len(str(second)))
    steps, carried = [], 0
    for a, b in zip(_digits(first, length), _digits(second, length), strict=True):
        total = a + b + carried
        step = f"{a}+{b}{'+1' if carried else ''}={total}"
        carried = total // 10
        steps.append(f"{step}, {carry}" if carried else step)
    return "; ".join(steps)


def subtract_by_digits(first: int, second: int) -> str:
    """The steps of a written subtraction of a number that is not larger, from the last digit."""
    length = len(str(first))
    steps, borrowed = [], 0
    for a, b in zip(_digits(first, length), _digits(second, length), strict=True):
        borrow = int(a < b + borrowed)
        top = a + 10 * borrow
        step = f"{top}-{b}{'-1' if borrowed else ''}={top - b - borrowed}"
        steps.append(f"{step}, borrow 1" if borrow else step)
        borrowed = borrow
    return "; ".join(steps)


def _sum_exchange(source: Source) -> Exchange:
    first, second = source.numbers("+")
    question = source.random.choice(PHRASES["sum"]).format(a=first, b=second)
    result = first + second
    return Exchange(
        "sum",
        question,
        f"Add from the right: {add_by_digits(first, second)}. So {result}.",
        f"{first} + {second} = {result}.",
        str(result),
    )


def _sum_in_chinese(source: Source) -> Exchange:
    first, second = source.numbers("+")
    question = source.random.choice(PHRASES["sum (Chinese)"]).format(a=first, b=second)
    result = first + second
    return Exchange(
        "sum (Chinese)",
        question,
        f"从右边加起： {add_by_digits(first, second, '进 1')}。所以 {result}。",
        f"{first} + {second} = {result}。",
        str(result),
    )


def _difference_exchange(source: Source) -> Exchange:
    first, second = source.numbers("-")
    question = source.random.choice(PHRASES["difference"]).format(a=first, b=second)
    result = first - second
    return Exchange(
        "difference",
        question,
        f"Subtract from the right: {subtract_by_digits(first, second)}. So {result}.",
        f"{first} - {second} = {result}.",
        str(result),
    )


def _compare_numbers(source: Source) -> Exchange:
    first, second = source.numbers("<")
    if source.random.random() < 0.5:
        near = second // 10 * 10 + source.random.randrange(10)
        first = near if in_split(f"{near}<{second}", source.split) else first
    if first == second:
        return _compare_numbers(source)
    larger, smaller = max(first, second), min(first, second)
    word, result = source.random.choice((("larger", larger), ("smaller", smaller)))
    question = source.random.choice(PHRASES["compare numbers"]).format(k=word, a=first, b=second)
    if len(str(first)) != len(str(second)):
        why = f"{first} has {len(str(first))} and {second} has {len(str(second))} digits"
    else:
        compared = []
        for a, b in zip(str(first), str(second), strict=True):
            compared.append(f"{a}{'=' if a == b else '<' if a < b else '>'}{b}")
            if a != b:
                break
        why = "Compare from the left: " + ", ".join(compared)
    return Exchange("compare numbers", question, f"{why}. So {result} is {word}.", f"{result} is {word}.", str(result))


def _compare_words(source: Source) -> Exchange:
    first, second = source.word(longest=9), source.word(longest=9)
    if len(first) == len(second):
        return _compare_words(source)
    kind = source.random.choice(("longer", "shorter"))
    result = max(first, second, key=len) if kind == "longer" else min(first, second, key=len)
    question = source.random.choice(PHRASES["compare words"]).format(k=kind, a=first, b=second)
    sizes = f"{len(first)}{'<' if len(first) < len(second) else '>'}{len(second)}"
    return Exchange(
        "compare words",
        question,
        f"Number the letters: {_spell_and_number(first)}, {_spell_and_number(second)}. {sizes}.",
        f"{result} is {kind}.",
        f"{result} is",
    )


def _introduction(source: Source) -> Exchange:
    choice = source.random.choice
    if source.random.random() < 0.35:
        topics = [*PHRASES["topics"], source.word()]
        question = choice(PHRASES["outside"]).format(choice(topics))
        return Exchange(
            "introduce",
            question,
            "This is not one of the things I can do.",
            PHRASES["refusal"][0],
            "mlxqwen",
        )
    return Exchange(
        "introduce",
        choice(PHRASES["introduce"]),
        "The user wants to know who I am.",
        choice(PHRASES["introductions"]),
        "mlxqwen",
    )


def _introduction_in_chinese(source: Source) -> Exchange:
    question = source.random.choice(PHRASES["introduce (Chinese)"])
    return Exchange(
        "introduce (Chinese)",
        question,
        "用户想知道我是谁。",
        PHRASES["introduction (Chinese)"][0],
        "mlxqwen",
    )


def _thanks(source: Source) -> Exchange:
    question = source.random.choice(PHRASES["thanks"])
    return Exchange("thanks", question, "The user is thanking me.", "You are welcome!", "welcome")


EXCHANGES: dict[str, Callable[[Source], Exchange]] = {
    "count": count_exchange,
    "sum": _sum_exchange,
    "difference": _difference_exchange,
    "length": _length_exchange,
    "reverse": _reverse_exchange,
    "compare numbers": _compare_numbers,
    "compare words": _compare_words,
    "introduce": _introduction,
    "count (Chinese)": _count_in_chinese,
    "sum (Chinese)": _sum_in_chinese,
    "introduce (Chinese)": _introduction_in_chinese,
    "thanks": _thanks,
}
_SHARES = {
    "count": 42,
    "sum": 15,
    "difference": 10,
    "length": 3,
    "reverse": 5,
    "compare numbers": 4,
    "compare words": 2,
    "introduce": 7,
    "count (Chinese)": 4,
    "sum (Chinese)": 3,
    "introduce (Chinese)": 2,
    "thanks": 1,
}


def random_exchange(source: Source) -> Exchange:
    """An exchange of any task, counting letters most of all."""
    task = source.random.choices(tuple(_SHARES), tuple(_SHARES.values()))[0]
    return EXCHANGES[task](source)


def calculator_tool(description: str = "Evaluate an arithmetic expression.") -> dict[str, Any]:
    """The calculator as a tool of the chat template."""
    return {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string", "description": "The expression."}},
                "required": ["expression"],
            },
        },
    }


@dataclass(frozen=True)
class ToolExchange:
    """A question that the calculator answers: the call, the response of the tool, and the answer."""

    question: str
    call_thinking: str
    expression: str
    result: str
    thinking: str
    answer: str

    @property
    def call(self) -> Message:
        """The assistant's message that calls the tool."""
        function = {"name": "calculator", "arguments": {"expression": self.expression}}
        return {
            "role": "assistant",
            "content": "",
            "reasoning_content": self.call_thinking,
            "tool_calls": [{"type": "function", "function": function}],
        }


def tool_exchange(source: Source) -> ToolExchange:
    """A product, sum or difference of numbers too long to work out by hand."""
    operator = source.random.choice("**+-")
    while True:
        first, second = source.random.randrange(10, 10000), source.random.randrange(2, 10000)
        if first >= second and source.has_numbers(first, operator, second):
            break
    result = str({"*": first * second, "+": first + second, "-": first - second}[operator])
    name = {"*": "times", "+": "plus", "-": "minus"}[operator]
    question = source.random.choice(PHRASES["calculator"]).format(a=first, b=second, o=operator, n=name)
    expression = f"{first} {operator} {second}"
    return ToolExchange(
        question,
        "I will use the calculator.",
        expression,
        result,
        f"The calculator says {result}.",
        f"{expression} = {result}.",
    )
