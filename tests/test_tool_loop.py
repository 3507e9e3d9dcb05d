"""Rounds of calls and results, over scripted replies."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from mlxqwen.chat.reply import Delta, Reply, ToolCall
from mlxqwen.chat.turns import check_conversation
from mlxqwen.engine.events import Done, Event, Timings, Usage
from mlxqwen.engine.generation import FinishReason
from mlxqwen.engine.tool_loop import ToolResult, ToolRun, stream_tool_loop
from mlxqwen.errors import ContextLengthError, MessagesError, OptionError

QUESTION: list[Mapping[str, Any]] = [{"role": "user", "content": "What is 2 + 3?"}]


def calls(*numbers: int, reason: FinishReason = "tool_calls", name: str = "add") -> Done:
    made = tuple(ToolCall(f"id{n}", name, f'{{"first": {n}, "second": 3}}') for n in numbers)
    return done(Reply("I add.", "", made), reason)


def done(reply: Reply, reason: FinishReason = "stop") -> Done:
    return Done(reply, reason, Usage(1, 1, 0), Timings(0.0, 0.0, 0.0, 0.0))


ANSWER = done(Reply(None, "5."))


class Script:
    """Answers with the given ends in turn, and remembers what it was asked."""

    def __init__(self, *ends: Done | Exception) -> None:
        self._ends = iter(ends)
        self.asked: list[list[Mapping[str, Any]]] = []
        self.schemas: list[Any] = []

    def __call__(self, messages: Sequence[Mapping[str, Any]], schemas: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
        check_conversation(list(messages))
        self.asked.append(copy.deepcopy(list(messages)))
        self.schemas.append(schemas)
        end = next(self._ends)
        if isinstance(end, Exception):
            raise end
        return iter([Delta(content=end.reply.content), end])


def run(script: Script, tools: Mapping[str, Any], **options: Any) -> tuple[list[Any], ToolRun]:
    *events, last = stream_tool_loop(script, QUESTION, tools, **options)
    assert isinstance(last, ToolRun)
    check_conversation([*QUESTION, *last.messages])
    return events, last


class Adder:
    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []

    def __call__(self, first: int, second: int) -> int:
        """Add."""
        self.made.append((first, second))
        return first + second


def test_results_are_fed_back_in_order_with_ids_and_reasoning() -> None:
    script, add = Script(calls(2, 7), ANSWER), Adder()
    events, last = run(script, {"add": add})
    assert add.made == [(2, 3), (7, 3)]
    assert (last.reply, last.finish_reason) == (ANSWER.reply, "stop")
    assert [done.reply.content for done in last.rounds] == ["", "5."]
    asked, *results, answer = last.messages
    assert asked["reasoning_content"] == "I add."
    assert [call["id"] for call in asked["tool_calls"]] == ["id2", "id7"]
    assert [(r["role"], r["tool_call_id"], r["content"]) for r in results] == [
        ("tool", "id2", "5"),
        ("tool", "id7", "10"),
    ]
    assert answer == {"role": "assistant", "content": "5."}
    assert script.asked == [QUESTION, [*QUESTION, *last.messages[:-1]]]
    assert [schema["function"]["name"] for schema in script.schemas[1]] == ["add"]
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["Delta", "Done", "ToolResult", "ToolResult", "Delta", "Done"]
    assert QUESTION == [{"role": "user", "content": "What is 2 + 3?"}]


def test_only_functions_that_were_passed_are_called_and_errors_are_told() -> None:
    def fail(first: int, second: int) -> str:
        raise RuntimeError("no\nluck")

    _, last = run(Script(calls(2, name="eval"), calls(2, name="fail"), ANSWER), {"fail": fail})
    told = [message["content"] for message in last.messages if message["role"] == "tool"]
    assert told[0].startswith("Error: found no tool named 'eval'")
    assert told[1].startswith("Error: RuntimeError: no")
    assert "\n" not in told[1]
    assert last.finish_reason == "stop"


@pytest.mark.parametrize("max_rounds", [1, 2, 3])
def test_rounds_used_up_lose_nothing(max_rounds: int) -> None:
    add = Adder()
    events, last = run(Script(*[calls(2)] * 3, ANSWER), {"add": add}, max_rounds=max_rounds)
    assert (last.finish_reason, len(last.rounds), len(add.made)) == ("tool_calls", max_rounds, max_rounds)
    assert last.reply.tool_calls
    assert last.messages[-1]["role"] == "tool"
    assert isinstance(events[-1], ToolResult)
    going_on = stream_tool_loop(Script(ANSWER), [*QUESTION, *last.messages], {"add": add})
    assert [event.finish_reason for event in going_on if isinstance(event, ToolRun)] == ["stop"]


@pytest.mark.parametrize("reason", ["length", "loop", "stop"])
def test_a_reply_that_was_cut_off_calls_nothing(reason: FinishReason) -> None:
    add = Adder()
    _, last = run(Script(calls(2, 7, reason=reason)), {"add": add})
    assert add.made == []
    assert last.finish_reason == reason
    assert [m["content"].startswith("Error: the reply was cut off") for m in last.messages[1:]] == [True, True]


def test_results_too_long_for_the_context_end_the_run() -> None:
    script = Script(calls(2), ContextLengthError("too long"))
    _, last = run(script, {"add": Adder()})
    assert (last.finish_reason, last.messages[-1]["content"]) == ("length", "5")
    with pytest.raises(ContextLengthError):
        stream_tool_loop(Script(ContextLengthError("too long")), QUESTION, {})
    with pytest.raises(MessagesError):
        run(Script(calls(2), MessagesError("broken")), {"add": Adder()})


def test_interrupts_pass_through() -> None:
    def interrupted(first: int, second: int) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Script(calls(2), ANSWER), {"add": interrupted})


@pytest.mark.parametrize(
    ("tools", "options", "match"),
    [
        ([Adder()], {}, r"tools\[0\]: found Adder without a name"),
        (None, {}, "tools: found NoneType"),
        ({"add": 3}, {}, "tool add: found int"),
        ({"<name>": Adder()}, {}, "<name>"),
        ({"add": Adder()}, {"max_rounds": 0}, "max_rounds: found 0"),
        ({"add": Adder()}, {"max_rounds": True}, "max_rounds: found True"),
    ],
)
def test_bad_arguments_are_errors_at_once(tools: Any, options: dict[str, Any], match: str) -> None:
    script = Script(ANSWER)
    with pytest.raises(OptionError, match=match):
        stream_tool_loop(script, QUESTION, tools, **options)
    assert script.asked == []
