"""Conversations in which the demo model uses a calculator and a clock, to be trained on beside the others.

Which tools are offered and in which order is random, so that the model has to look; at times a tool fails, is not
offered, or is not needed. The schemas are those that `mlxqwen.chat.tools.tool_schema` makes of a function.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from demo.data import Conversation
from demo.source import Source
from demo.tasks import PHRASES, Message, calculator_tool, random_exchange, tool_exchange

CLOCK_QUESTIONS = (
    "What time is it?",
    "What time is it now?",
    "What time is it, please?",
    "What is the time?",
    "What's the time?",
    "Tell me the time.",
    "Please tell me the time.",
    "Can you tell me the time?",
    "Do you know what time it is?",
    "What does the clock say?",
    "How late is it?",
    "what time is it",
    "现在几点？",
)
CLOCK_DESCRIPTIONS = ("Tell the time of day.", "The time of day.", "Tell what time it is.", "Current time, as HH:MM.")
CALCULATOR_QUESTIONS = (*PHRASES["calculator"], "Calculate {a} {o} {b}.", "What's {a} {o} {b}?", "{a} {o} {b} = ?")
FAILURES = ("Error: ZeroDivisionError: division by zero", "Error: OSError: not available", "Error: ValueError: 3")


@dataclass(frozen=True)
class ToolUse:
    """A question, the call that it needs, what the tool says, and the thought and the answer that follow."""

    name: str
    question: str
    arguments: dict[str, str]
    result: str
    thought: str
    answer: str


def clock_tool(description: str = CLOCK_DESCRIPTIONS[0]) -> dict[str, Any]:
    """A clock as a tool of the chat template."""
    parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "function", "function": {"name": "clock", "description": description, "parameters": parameters}}


def strict_calculator_tool(description: str) -> dict[str, Any]:
    """The calculator as `tool_schema` describes it."""
    tool = calculator_tool(description)
    tool["function"]["parameters"]["additionalProperties"] = False
    return tool


def clock_use(source: Source) -> ToolUse:
    """A question for the time of day."""
    time = f"{source.random.randrange(24):02}:{source.random.randrange(60):02}"
    return ToolUse(
        "clock", source.random.choice(CLOCK_QUESTIONS), {}, time, f"The clock says {time}.", f"It is {time}."
    )


def calculator_use(source: Source, pattern: str | None = None) -> ToolUse:
    """A product, sum or difference of long numbers, asked for by `pattern` or by any."""
    exchange = tool_exchange(source)
    first, operator, second = exchange.expression.split()
    name = {"*": "times", "+": "plus", "-": "minus"}[operator]
    pattern = pattern or source.random.choice(CALCULATOR_QUESTIONS)
    question = pattern.format(a=first, o=operator, b=second, n=name)
    arguments = {"expression": exchange.expression}
    return ToolUse("calculator", question, arguments, exchange.result, exchange.thinking, exchange.answer)


def failed(source: Source, use: ToolUse) -> ToolUse:
    """The same question, whose tool fails."""
    result = source.random.choice(FAILURES)
    return replace(use, result=result, thought=f"The {use.name} has failed.", answer=f"The {use.name} does not work.")


def _turn(source: Source, use: ToolUse, thinking: bool) -> list[Message]:
    """The question, the call, the tool's response and the answer."""
    verb = "look at the clock" if use.name == "clock" else "use the calculator"
    if source.random.random() < 0.08:
        use = failed(source, use)
    call = {"type": "function", "function": {"name": use.name, "arguments": use.arguments}}
    return [
        {"role": "user", "content": use.question},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": f"I will {verb}." if thinking else "",
            "tool_calls": [call],
        },
        {"role": "tool", "content": use.result},
        {"role": "assistant", "content": use.answer, "reasoning_content": use.thought if thinking else ""},
    ]


def _plain_turn(source: Source, thinking: bool, missing_clock: bool) -> list[Message]:
    """A question that needs no tool, or one that needs a clock where there is none."""
    if missing_clock:
        question, thought = source.random.choice(CLOCK_QUESTIONS), "This is not one of the things I can do."
        answer = PHRASES["refusal"][0]
    else:
        exchange = random_exchange(source)
        question, thought, answer = exchange.question, exchange.thinking, exchange.answer
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer, "reasoning_content": thought if thinking else ""},
    ]


def random_tools(source: Source) -> tuple[dict[str, Any], ...]:
    """A calculator, a clock or both, in any order and described in one way or another."""
    describe = strict_calculator_tool if source.random.random() < 0.8 else calculator_tool
    calculator = describe(source.random.choice(PHRASES["tool descriptions"]))
    clock = clock_tool(source.random.choice(CLOCK_DESCRIPTIONS))
    both = (calculator, clock)
    return source.random.choice(((calculator,), (clock,), both, both, (clock, calculator)))


def tool_conversation(source: Source) -> Conversation:
    """One question or two with a calculator, a clock or both at hand, ending with the assistant.

    Half of them end with a call, as the model's turn does before the tool has spoken.
    """
    chance = source.random.random
    tools = random_tools(source)
    names = [tool["function"]["name"] for tool in tools]
    enable_thinking = chance() >= 0.15
    messages: list[Message] = []
    for _ in range(source.random.choice((1, 1, 2))):
        if chance() < 0.2:
            messages += _plain_turn(source, enable_thinking, "clock" not in names and chance() < 0.5)
        elif source.random.choice(names) == "clock":
            messages += _turn(source, clock_use(source), enable_thinking)
        else:
            messages += _turn(source, calculator_use(source), enable_thinking)
    if messages[-2]["role"] == "tool" and chance() < 0.5:
        messages = messages[:-2]
    return Conversation(tuple(messages), tools, enable_thinking)
