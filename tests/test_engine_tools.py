"""The demo model calls functions."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mlxqwen import Engine, make_cache
from mlxqwen.chat.reply import Delta
from mlxqwen.engine.events import Done
from mlxqwen.engine.tool_loop import ToolResult, ToolRun
from mlxqwen.errors import ContextLengthError, OptionError

QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "What is 1234 * 567?"}]
GREEDY: dict[str, Any] = {"sampling": {"temperature": 0}}


class Calculator:
    """Multiplies, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, expression: str) -> int:
        """Evaluate an arithmetic expression.

        Args:
            expression: The expression.
        """
        self.asked.append(expression)
        first, second = expression.split("*")
        return int(first) * int(second)


@pytest.fixture(scope="module")
def engine(demo: Any) -> Engine:
    return Engine(*demo)


@pytest.mark.parametrize("thinking", [None, False])
def test_the_demo_calls_a_calculator(engine: Engine, thinking: bool | None) -> None:
    before = copy.deepcopy(QUESTION)
    calculator = Calculator()
    run = engine.run_tools(QUESTION, {"calculator": calculator}, thinking=thinking, **GREEDY)
    assert calculator.asked == ["1234 * 567"]
    assert run.finish_reason == "stop"
    assert str(1234 * 567) in run.reply.content
    assert [message["role"] for message in run.messages] == ["assistant", "tool", "assistant"]
    assert [done.finish_reason for done in run.rounds] == ["tool_calls", "stop"]
    assert before == QUESTION
    # What the run added can be asked about.
    engine.chat([*QUESTION, *run.messages, {"role": "user", "content": "Thanks!"}], max_tokens=1)


def test_reasoning_stays_within_the_loop(engine: Engine) -> None:
    run = engine.run_tools(QUESTION, {"calculator": Calculator()}, **GREEDY)
    reasoning = run.messages[0]["reasoning_content"]
    during = engine.tokenizer.decode(engine.prompt([*QUESTION, *run.messages[:2]]))
    later = engine.tokenizer.decode(engine.prompt([*QUESTION, *run.messages, *QUESTION]))
    assert reasoning in during
    assert reasoning not in later


def test_the_stream_tells_of_every_step(engine: Engine) -> None:
    events = list(engine.stream_tools(QUESTION, {"calculator": Calculator()}, **GREEDY))
    kinds = [type(event) for event in events if not isinstance(event, Delta)]
    assert kinds == [Done, ToolResult, Done, ToolRun]
    pieces = [event.tool_call for event in events if isinstance(event, Delta) and event.tool_call is not None]
    assert [(piece.name, piece.arguments) for piece in pieces] == [("calculator", '{"expression": "1234 * 567"}')]
    assert engine.run_tools(QUESTION, {"calculator": Calculator()}, **GREEDY).reply == events[-1].reply  # type: ignore[union-attr]


def test_a_tool_that_fails_is_told_to_the_model(engine: Engine) -> None:
    def calculator(expression: str) -> str:
        """Evaluate an arithmetic expression."""
        raise ArithmeticError("out of order")

    run = engine.run_tools(QUESTION, {"calculator": calculator}, max_rounds=2, **GREEDY)
    assert run.messages[1]["content"] == "Error: ArithmeticError: out of order"


def test_rounds_used_up(engine: Engine) -> None:
    run = engine.run_tools(QUESTION, {"calculator": Calculator()}, max_rounds=1, **GREEDY)
    assert (run.finish_reason, run.messages[-1]["content"]) == ("tool_calls", str(1234 * 567))
    rest = engine.run_tools([*QUESTION, *run.messages], {"calculator": Calculator()}, **GREEDY)
    whole = engine.run_tools(QUESTION, {"calculator": Calculator()}, **GREEDY)
    assert rest.reply == whole.reply


def test_a_result_too_long_for_the_context_loses_nothing(engine: Engine) -> None:
    def calculator(expression: str) -> str:
        """Evaluate an arithmetic expression.

        Args:
            expression: The expression.
        """
        return "9 " * 2000

    run = engine.run_tools(QUESTION, {"calculator": calculator}, **GREEDY)
    assert (run.finish_reason, len(run.rounds), run.messages[-1]["role"]) == ("length", 1, "tool")
    with pytest.raises(ContextLengthError):
        engine.run_tools([{"role": "user", "content": "9 " * 2000}], {"calculator": calculator})


def test_no_tools_is_a_chat(engine: Engine) -> None:
    run = engine.run_tools(QUESTION, {}, seed=1, max_tokens=30)
    assert run.reply == engine.chat(QUESTION, seed=1, max_tokens=30)


def test_what_cannot_be_is_refused(engine: Engine) -> None:
    with pytest.raises(OptionError, match="cache: found one"):
        engine.run_tools(QUESTION, {}, cache=make_cache(engine.model))
    with pytest.raises(OptionError, match="tool calculator: found int"):
        engine.run_tools(QUESTION, {"calculator": 3})  # type: ignore[dict-item]
