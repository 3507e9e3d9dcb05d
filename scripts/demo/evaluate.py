"""Print how often the demo model is right, by task and mode, as a markdown table.

    python scripts/demo evaluate --model mlxqwen/demo --n 200 --seed 1

Words and numbers are held out from training.  Replies are drawn as the model cards advise: temperature 0.6
and top-p 0.95 with thinking, 0.7 and 0.8 without, top-k 20.  A reply counts only if it thinks where it is
asked to think, and only then.  Where tools are used, a calculator and a clock are at hand; right is a reply that calls
the one that is needed, alone and as it should, and after its result one that tells it.  Small talk, in phrases held
out, is answered right by one of its sentences, word for word and with no call; so is the work of a missing tool.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from demo.data import Conversation, exercise
from demo.greetings import is_answered, small_talk
from demo.source import CARD_WORDS, Source
from demo.tasks import PHRASES, TASKS, Exchange, Message, count_exchange, is_right
from demo.tool_tasks import (
    CLOCK_QUESTIONS,
    ToolUse,
    calculator_use,
    clock_tool,
    clock_use,
    failed,
    strict_calculator_tool,
)
from mlxqwen import Reply, SamplingParams, batch_generate, load, parse_reply

THINKING = SamplingParams(temperature=0.6, top_p=0.95, top_k=20)
DIRECT = SamplingParams(temperature=0.7, top_p=0.8, top_k=20)
MODES = {"thinking": (True, False), "no thinking": (False, False), "`/no_think`": (False, True)}
MAX_TOKENS = 200
BATCH = 50
TOOLS = (strict_calculator_tool("Evaluate an arithmetic expression."), clock_tool())
TOOL_TASKS: dict[str, Callable[[Source], ToolUse]] = {
    "clock": clock_use,
    "What is A * B?": lambda source: calculator_use(source, "What is {a} {o} {b}?"),
    "Calculate A * B.": lambda source: calculator_use(source, "Calculate {a} {o} {b}."),
    "a tool that fails": lambda source: failed(source, source.random.choice((clock_use, calculator_use))(source)),
}
TOOL_ROWS = (*TOOL_TASKS, "no tool needed", "no clock there")
_GREETINGS = ("hello", "how are you", "thanks", "goodbye", "help")
_ELSE = ("anything else",)
TALK_TASKS: dict[str, tuple[tuple[str, ...], tuple[Message, ...]]] = {  # kinds of small talk, tools at hand
    "greetings": (_GREETINGS, ()),
    "greetings (Chinese)": (tuple(f"{kind} (Chinese)" for kind in ("hello", "thanks", "goodbye")), ()),
    "anything else": (_ELSE, ()),
    "anything else (Chinese)": (("anything else (Chinese)",), ()),
    "a missing tool": (("a missing tool",), ()),
    "greetings, tools at hand": (_GREETINGS, TOOLS),
    "anything else, tools at hand": (_ELSE, TOOLS),
}
CARDS = "words of the cards"
ROWS = (*TASKS, *TALK_TASKS, *TOOL_ROWS, CARDS)


def replies(
    model: Any,
    tokenizer: Any,
    conversations: list[Conversation],
    seed: int,
    thinking: bool,
    thinking_budget: int | None = None,
) -> list[str]:
    """What the model says next in each conversation, its last message left out."""
    prompts = [
        tokenizer.apply_chat_template(
            list(conversation.messages[:-1]),
            tools=list(conversation.tools) or None,
            add_generation_prompt=True,
            enable_thinking=conversation.enable_thinking,
        )
        for conversation in conversations
    ]
    profile = THINKING if thinking else DIRECT
    texts: list[str] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        sampling = [replace(profile, seed=seed + start + row) for row in range(len(batch))]
        texts += batch_generate(
            model, tokenizer, batch, max_tokens=MAX_TOKENS, sampling=sampling, thinking_budget=thinking_budget
        )
    return texts


def accuracy(model: Any, tokenizer: Any, task: str, mode: str, n: int, seed: int) -> float:
    """The share of `n` held-out exercises of `task` answered right in `mode`."""
    thinking, soft = MODES[mode]
    source = Source(random.Random(seed), "held-out")
    exercises = [exercise(task, source, thinking, soft) for _ in range(n)]
    said = replies(model, tokenizer, [conversation for conversation, _ in exercises], seed, thinking)
    return sum(_counts(asked, text, thinking) for (_, asked), text in zip(exercises, said, strict=True)) / n


def _counts(asked: Exchange, text: str, thinking: bool) -> bool:
    thought, _, answer = text.rpartition("</think>")
    return is_right(asked, answer) and bool(thought.replace("<think>", "").strip()) == thinking


def talk_accuracy(model: Any, tokenizer: Any, task: str, mode: str, n: int, seed: int) -> float:
    """The share of `n` held-out sayings of `task`, one of `TALK_TASKS`, that are answered right in `mode`."""
    thinking, soft = MODES[mode]
    source = Source(random.Random(seed), "held-out")
    kinds, tools = TALK_TASKS[task]
    exchanges = [small_talk(source, source.random.choice(kinds)) for _ in range(n)]
    blank = {"role": "assistant", "content": ""}
    said = [{"role": "user", "content": asked.question + (" /no_think" if soft else "")} for asked in exchanges]
    conversations = [Conversation((message, blank), tools, thinking or soft) for message in said]
    answers = [
        parse_reply(text, thinking=None, tools=True)
        for text in replies(model, tokenizer, conversations, seed, thinking)
    ]
    right = [
        (reply.reasoning is not None) == thinking and not reply.tool_calls and is_answered(asked, reply.content)
        for asked, reply in zip(exchanges, answers, strict=True)
    ]
    return sum(right) / n


def tool_accuracy(model: Any, tokenizer: Any, task: str, mode: str, n: int, seed: int) -> float:
    """The share of `n` questions with tools at hand that are answered right in `mode`."""
    thinking, soft = MODES[mode]
    source = Source(random.Random(seed), "held-out")

    def say(asked: list[list[Message]], tools: tuple[Message, ...] = TOOLS) -> list[Reply]:
        blank = {"role": "assistant", "content": ""}
        conversations = [Conversation((*messages, blank), tools, thinking or soft) for messages in asked]
        texts = replies(model, tokenizer, conversations, seed, thinking)
        return [parse_reply(text, thinking=None, tools=True) for text in texts]

    def question(text: str) -> list[Message]:
        return [{"role": "user", "content": text + (" /no_think" if soft else "")}]

    def thinks(reply: Reply) -> bool:
        return (reply.reasoning is not None) == thinking

    if task == "no clock there":
        said = say([question(source.random.choice(CLOCK_QUESTIONS)) for _ in range(n)], TOOLS[:1])
        return sum(thinks(reply) and not reply.tool_calls and reply.content in PHRASES["refusal"] for reply in said) / n
    if task == "no tool needed":
        counts = [count_exchange(source) for _ in range(n)]
        said = say([question(asked.question) for asked in counts])
        # Counts without thinking are mostly wrong; here it matters that nothing is called.
        right = [
            thinks(reply) and not reply.tool_calls and (is_right(asked, reply.content) or not thinking)
            for asked, reply in zip(counts, said, strict=True)
        ]
        return sum(right) / n
    uses = [TOOL_TASKS[task](source) for _ in range(n)]
    called = [
        (use, messages)
        for use, reply in zip(uses, say([question(use.question) for use in uses]), strict=True)
        if thinks(reply) and (messages := _after_call(use, reply, question(use.question)))
    ]
    told = say([messages for _, messages in called])
    return sum(thinks(reply) and reply.content == use.answer for (use, _), reply in zip(called, told, strict=True)) / n


def _after_call(use: ToolUse, reply: Reply, asked: list[Message]) -> list[Message]:
    """The conversation up to the tool's result, or nothing if the call is not the one that is needed."""
    calls = [(call.name, json.loads(call.arguments)) for call in reply.tool_calls]
    if calls != [(use.name, use.arguments)] or reply.content:
        return []
    call = {"type": "function", "function": {"name": use.name, "arguments": use.arguments}}
    said = {"role": "assistant", "content": "", "reasoning_content": reply.reasoning or "", "tool_calls": [call]}
    return [*asked, said, {"role": "tool", "content": use.result}]


def card_words(model: Any, tokenizer: Any, n: int, seed: int) -> list[tuple[str, float]]:
    """How often the r's in the cards' words, never trained on, are counted right with thinking."""
    result = []
    for word in CARD_WORDS:
        question = f"How many r's in {word}?"
        conversation = Conversation(({"role": "user", "content": question}, {"role": "assistant", "content": ""}))
        asked = Exchange("count", question, "", "", str(word.count("r")))
        said = replies(model, tokenizer, [conversation] * n, seed, thinking=True)
        result.append((question, sum(_counts(asked, text, thinking=True) for text in said) / n))
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder; by default the demo model")
    parser.add_argument("--n", type=int, default=200, help="exercises for each cell")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=ROWS, default=ROWS)
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    print("| task |", " | ".join(MODES), "|")
    print("| --- |", " | ".join("---:" for _ in MODES), "|")
    for task in options.tasks:
        if task == CARDS:
            for question, mark in card_words(model, tokenizer, options.n, options.seed):
                print(f"| {question} | {mark:.1%} | | |", flush=True)
            continue
        if task in TOOL_ROWS:
            measure, name = tool_accuracy, f"tools: {task}"
        else:
            measure, name = (accuracy if task in TASKS else talk_accuracy), task
        marks = [measure(model, tokenizer, task, mode, options.n, options.seed) for mode in MODES]
        print(f"| {name} |", " | ".join(f"{mark:.1%}" for mark in marks), "|", flush=True)
