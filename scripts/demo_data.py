"""Conversations for the demo model: generated from a seed, with the standard library alone.

Everything the demo model is trained on comes from here: letter counting with the word spelled out, sums and
differences digit by digit, reversing, comparing, introducing itself, a few Chinese turns, calls of a tool,
follow-up questions and the switches between thinking and not thinking.  One in eight words and one in eight
pairs of numbers are held out, by hash, so that training and evaluation never share one.

`tokenizer_text` yields prose to train the tokenizer on, `conversation` a random conversation, `render` its
text as the chat template writes it, and `exercise` one question of a task with its answer, for evaluation.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

Message = dict[str, Any]
Span = Literal["context", "history", "given", "reply"]
Split = Literal["train", "held-out"]

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

# Words and prompts of Qwen3's model cards: people will try them, so they are never trained on.
CARD_WORDS = ("strawberry", "strawberries", "blueberry", "blueberries")
CARD_PROMPTS = (
    "Hello, please introduce yourself and tell me what you can do.",
    "Give me a short introduction to large language model.",
    "Give me a short introduction to large language models.",
    "Give me a detailed introduction to large language model.",
    "In a single sentence.",
    "Really?",
)

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

_PHRASES: dict[str, list[str]] = json.loads(
    Path(__file__).with_name("demo_phrases.json").read_text(encoding="utf-8")
)
_WORDS = tuple(Path(__file__).with_name("demo_words.txt").read_text(encoding="utf-8").split())


def _parts(text: str, empty: int = 0) -> tuple[str, ...]:
    return (*text.split(), *[""] * empty)


_ONSETS = _parts(
    "b c d f g h j k l m n p r s t v w y z bl br ch cl cr dr fl fr gl gr kn ph pl pr qu sc sh sk sl sm sn sp "
    "st str sw th tr tw wh wr spr spl scr thr",
    empty=6,
)
_NUCLEI = _parts("a e i o u a e i o u a e i o u ai au ay ea ee ei eu ie oa oi oo ou ow ue y aw ew")
_CODAS = _parts(
    "b ck d ff g ll m n ng nd nk nt p r rd rk rm rn rr rry rt s ss st t tt tch th x zz mp lt ld lf sk sp ct "
    "ft ry ly ies es er ers ing ed",
    empty=16,
)
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_COMMON_LETTERS = "eeeaaarrriiooottnnssslllcuudppmhgbfywkvxzjq"


def in_split(key: str, split: Split) -> bool:
    """Whether `key` belongs to `split`: one key in eight is held out, by its CRC-32."""
    return (zlib.crc32(key.encode()) % 8 == 0) == (split == "held-out")


@dataclass(frozen=True)
class Source:
    """Where words and numbers come from: a random generator, a split, and pieces of words to practise."""

    random: random.Random
    split: Split = "train"
    pieces: Sequence[str] = ()
    only_common_words: bool = False

    def word(self, shortest: int = 3, longest: int = 14) -> str:
        """A lower-case word of the split, `shortest` to `longest` letters, never one of the cards'."""
        while True:
            word = self._any_word()
            if (
                shortest <= len(word) <= longest
                and in_split(word, self.split)
                and not word.startswith(("strawb", "blueb"))
            ):
                return word

    def _any_word(self) -> str:
        draw, choice = self.random.random(), self.random.choice
        if draw < 0.2 or self.only_common_words:
            return choice(_WORDS)
        if draw < 0.5 and self.pieces:
            return "".join(choice(self.pieces) for _ in range(self.random.randint(1, 4)))
        if draw < 0.6:
            return "".join(self.random.choices(_COMMON_LETTERS, k=self.random.randint(3, 12)))
        if draw < 0.7:
            word = self._pseudo_word()
            at = self.random.randrange(len(word))
            return word[:at] + word[at] * self.random.randint(1, 2) + word[at:]
        return self._pseudo_word()

    def _pseudo_word(self) -> str:
        choice = self.random.choice
        syllables = self.random.choices((1, 2, 3, 4), (1, 4, 4, 2))[0]
        return "".join(choice(_ONSETS) + choice(_NUCLEI) + choice(_CODAS) for _ in range(syllables))

    def letter(self, word: str) -> str:
        """A letter to count in `word`: mostly one that it has, often one that it repeats."""
        draw = self.random.random()
        repeated = [letter for letter in word if word.count(letter) > 1]
        if draw < 0.45 and repeated:
            return self.random.choice(repeated)
        if draw < 0.8:
            return self.random.choice(word)
        return self.random.choice(_ALPHABET)

    def number(self) -> int:
        """A number of one to three digits."""
        digits = self.random.choices((1, 2, 3), (1, 3, 4))[0]
        return self.random.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)

    def numbers(self, operator: str) -> tuple[int, int]:
        """Two numbers whose pair is of the split; for a difference the first is not the smaller."""
        while True:
            first, second = self.number(), self.number()
            if operator == "-" and first < second:
                first, second = second, first
            if in_split(f"{first}{operator}{second}", self.split):
                return first, second


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


def _spell_and_count(word: str, letter: str) -> str:
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
    return (
        source.random.choice(_PHRASES["quoted words"]).format(word) if source.random.random() < 0.3 else word
    )


def _shown(source: Source, letter: str) -> str:
    draw = source.random.random()
    return letter.upper() if draw < 0.05 else f'"{letter}"' if draw < 0.1 else letter


def _letters(count: int, letter: str) -> str:
    return f"{letter}" if count == 1 else f"{letter}'s"


def count_exchange(
    source: Source, word: str | None = None, letter: str | None = None, follow_up: bool = False
) -> Exchange:
    """How often a letter occurs in a word."""
    word = word or source.word()
    letter = letter or source.letter(word)
    count = word.count(letter)
    pattern = source.random.choice(_PHRASES["count again"] if follow_up else _PHRASES["count"])
    return Exchange(
        "count",
        pattern.format(l=_shown(source, letter), w=_quoted(source, word)),
        f"Spell it and count {letter}: {_spell_and_count(word, letter)}. So the count is {count}.",
        f"There {'is' if count == 1 else 'are'} {count} {_letters(count, letter)} in {word}.",
        str(count),
        word,
        letter,
    )


def _count_in_chinese(source: Source) -> Exchange:
    word = source.word()
    letter = source.letter(word)
    count = word.count(letter)
    question = source.random.choice(_PHRASES["count (Chinese)"]).format(w=word, l=letter)
    return Exchange(
        "count (Chinese)",
        question,
        f"拼写并数 {letter}： {_spell_and_count(word, letter)}。一共 {count} 个。",
        f"{word} 里有 {count} 个 {letter}。",
        str(count),
        word,
        letter,
    )


def _length_exchange(source: Source) -> Exchange:
    word = source.word(longest=12)
    question = source.random.choice(_PHRASES["length"]).format(w=_quoted(source, word))
    return Exchange(
        "length",
        question,
        f"Spell it and number the letters: {_spell_and_number(word)}. So the length is {len(word)}.",
        f"The number of letters in {word} is {len(word)}.",
        str(len(word)),
    )


def _reverse_exchange(source: Source) -> Exchange:
    word = source.word(longest=9)
    question = source.random.choice(_PHRASES["reverse"]).format(w=word)
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
    question = source.random.choice(_PHRASES["sum"]).format(a=first, b=second)
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
    question = source.random.choice(_PHRASES["sum (Chinese)"]).format(a=first, b=second)
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
    question = source.random.choice(_PHRASES["difference"]).format(a=first, b=second)
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
    question = source.random.choice(_PHRASES["compare numbers"]).format(k=word, a=first, b=second)
    if len(str(first)) != len(str(second)):
        why = f"{first} has {len(str(first))} and {second} has {len(str(second))} digits"
    else:
        compared = []
        for a, b in zip(str(first), str(second), strict=True):
            compared.append(f"{a}{'=' if a == b else '<' if a < b else '>'}{b}")
            if a != b:
                break
        why = "Compare from the left: " + ", ".join(compared)
    return Exchange(
        "compare numbers", question, f"{why}. So {result} is {word}.", f"{result} is {word}.", str(result)
    )


def _compare_words(source: Source) -> Exchange:
    first, second = source.word(longest=9), source.word(longest=9)
    if len(first) == len(second):
        return _compare_words(source)
    kind = source.random.choice(("longer", "shorter"))
    result = max(first, second, key=len) if kind == "longer" else min(first, second, key=len)
    question = source.random.choice(_PHRASES["compare words"]).format(k=kind, a=first, b=second)
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
        topics = [*_PHRASES["topics"], source.word()]
        question = choice(_PHRASES["outside"]).format(choice(topics))
        return Exchange(
            "introduce",
            question,
            "This is not one of the things I can do.",
            _PHRASES["refusal"][0],
            "mlxqwen",
        )
    return Exchange(
        "introduce",
        choice(_PHRASES["introduce"]),
        "The user wants to know who I am.",
        choice(_PHRASES["introductions"]),
        "mlxqwen",
    )


def _introduction_in_chinese(source: Source) -> Exchange:
    question = source.random.choice(_PHRASES["introduce (Chinese)"])
    return Exchange(
        "introduce (Chinese)",
        question,
        "用户想知道我是谁。",
        _PHRASES["introduction (Chinese)"][0],
        "mlxqwen",
    )


def _thanks(source: Source) -> Exchange:
    question = source.random.choice(_PHRASES["thanks"])
    return Exchange("thanks", question, "The user is thanking me.", "You are welcome!", "welcome")


_EXCHANGES: dict[str, Callable[[Source], Exchange]] = {
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


def _random_exchange(source: Source) -> Exchange:
    task = source.random.choices(tuple(_SHARES), tuple(_SHARES.values()))[0]
    return _EXCHANGES[task](source)


# ── tools ──────────────────────────────────────────────────────────────────────


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
        if first >= second and in_split(f"{first}{operator}{second}", source.split):
            break
    result = str({"*": first * second, "+": first + second, "-": first - second}[operator])
    name = {"*": "times", "+": "plus", "-": "minus"}[operator]
    question = source.random.choice(_PHRASES["calculator"]).format(a=first, b=second, o=operator, n=name)
    expression = f"{first} {operator} {second}"
    return ToolExchange(
        question,
        "I will use the calculator.",
        expression,
        result,
        f"The calculator says {result}.",
        f"{expression} = {result}.",
    )


# ── conversations ──────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Conversation:
    """Messages as the chat template takes them, ending with the assistant's reply.

    With `enable_thinking` false the reply is prompted with an empty think block and says nothing in it.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    enable_thinking: bool = True


def _switched(source: Source, text: str, thinking: bool) -> tuple[str, bool]:
    """`text` with a soft switch at times, and whether thinking is on after it."""
    draw = source.random.random()
    if draw < 0.15:
        return f"{text} /no_think", False
    if draw < (0.22 if thinking else 0.5):
        return f"{text} /think", True
    return text, thinking


def _assistant(exchange: Exchange, thinking: bool) -> Message:
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
    there = f"there {'is' if count == 1 else 'are'} {count} {_letters(count, told.letter)} in {told.word}."
    check = Exchange(
        "check",
        source.random.choice(_PHRASES["doubts"]),
        f"Spell it and count {told.letter}: {_spell_and_count(told.word, told.letter)}. "
        f"So the count is {count}. I said {claimed}.",
        f"{verdict}: {there}",
        told.expected,
        told.word,
        told.letter,
    )
    return told, check


def _exchanges(source: Source) -> list[Exchange]:
    """One to three exchanges, some of which follow from the one before."""
    exchanges = [_random_exchange(source)]
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
            exchanges.append(_random_exchange(source))
    return exchanges


def conversation(source: Source) -> Conversation:
    """A random conversation, ending with the assistant."""
    chance = source.random.random
    messages: list[Message] = []
    tools: tuple[dict[str, Any], ...] = ()
    thinking = True
    if chance() < 0.15:
        text, thinking = source.random.choice(_PHRASES["system"]), True
        if chance() < 0.3:
            text, thinking = source.random.choice(((f"{text} /no_think", False), (f"{text} /think", True)))
        messages.append({"role": "system", "content": text})
    if chance() < 0.06:
        tools = (calculator_tool(source.random.choice(_PHRASES["tool descriptions"])),)
    enable_thinking = chance() >= 0.15
    if tools and chance() < 0.85:
        return _tool_conversation(source, messages, tools, enable_thinking, thinking)
    exchanges = _exchanges(source)
    for exchange in exchanges:
        question, thinking = _switched(source, exchange.question, thinking)
        messages.append({"role": "user", "content": question})
        messages.append(_assistant(exchange, thinking and enable_thinking))
    return Conversation(tuple(messages), tools, enable_thinking)


def _tool_conversation(
    source: Source,
    messages: list[Message],
    tools: tuple[dict[str, Any], ...],
    enable_thinking: bool,
    thinking: bool,
) -> Conversation:
    exchange = tool_exchange(source)
    question, thinking = _switched(source, exchange.question, thinking)
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


# ── text ──────────────────────────────────────────────────────────────────────

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
        calls.append(
            f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": {arguments}}}\n</tool_call>'
        )
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


def exercise(
    task: str, source: Source, thinking: bool = True, soft: bool = False
) -> tuple[Conversation, Exchange]:
    """One question of `task`, with the conversation that leads to it and to its right reply.

    Not thinking is asked for by an empty think block in the prompt or, where `soft`, by `/no_think`.
    """
    if task == "calculator":
        called = tool_exchange(source)
        exchange = Exchange(
            task, called.question, called.call_thinking, "", f'{{"expression": "{called.expression}"}}'
        )
        reply = called.call if thinking else called.call | {"reasoning_content": ""}
        tools: tuple[dict[str, Any], ...] = (calculator_tool(),)
    else:
        exchange = _EXCHANGES[task](source)
        reply, tools = _assistant(exchange, thinking), ()
    question = exchange.question + (" /no_think" if soft and not thinking else "")
    messages = ({"role": "user", "content": question}, reply)
    return Conversation(messages, tools, thinking or soft), exchange
