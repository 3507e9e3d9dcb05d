"""Thought in replies: calls and stop strings inside it, cuts, and what it leaves of an answer, streamed and whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mlxqwen.chat.reply_parser import parse_reply
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.text.tokenizer import Tokenizer
from tests.scripted_model import ScriptedModel, scripted_engine
from tests.serving import Served, ask, serving
from tests.test_server_chat import CALCULATOR, PRODUCT, summed, whole

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1"}}\n</tool_call>'
PROSE = 'I could write <tool_call> here, or {"name": "calculator"}.'


@pytest.fixture(scope="module")
def speaking(demo: tuple[Qwen3ForCausalLM, Tokenizer]) -> Iterator[tuple[Served, ScriptedModel]]:
    engine, model = scripted_engine(*demo)
    with serving(engine) as made:
        yield made, model


class Speaker:
    """A server whose model says the same in reply to each request."""

    def __init__(self, served: Served, model: ScriptedModel, text: str) -> None:
        self.served, self._model = served, model
        end = served.engine.tokenizer.token_to_id("<|im_end|>")
        assert end is not None
        self._tokens = [*served.engine.tokenizer.encode(text), end]

    def post(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> Any:
        self._model.say(self._tokens)
        return self.served.post({"temperature": 0.0, **body}, path)

    def both(self, body: dict[str, Any]) -> dict[str, Any]:
        """The message, which is the same streamed and not, and why it ended."""
        reply = self.post(body)
        self._model.say(self._tokens)
        events = self.served.stream({"temperature": 0.0, **body})
        assert summed(events) == whole(reply)
        endings = [event["choices"][0] for event in events if event["choices"] and event["choices"][0]["finish_reason"]]
        ended = {name: value for name, value in endings[-1].items() if name not in ("index", "delta", "logprobs")}
        choice = reply["choices"][0]
        assert {name: choice[name] for name in ended} == ended
        return {**choice["message"], **ended}


def says(speaking: tuple[Served, ScriptedModel], text: str) -> Speaker:
    return Speaker(*speaking, text)


def test_a_call_inside_the_thought_is_not_made(speaking: tuple[Served, ScriptedModel]) -> None:
    reply = says(speaking, f"<think>\nI try {CALL} first.\n</think>\n\nIt is 5.").both(ask(PRODUCT, tools=[CALCULATOR]))
    assert "tool_calls" not in reply
    assert (reply["content"], reply["finish_reason"]) == ("It is 5.", "stop")
    assert reply["reasoning_content"] == f"I try {CALL} first."


def test_prose_is_not_taken_for_a_call(speaking: tuple[Served, ScriptedModel]) -> None:
    speaker = says(speaking, f"<think>\nHm.\n</think>\n\n{PROSE}")
    reply = speaker.both(ask(PRODUCT, tools=[CALCULATOR]))
    assert "tool_calls" not in reply
    assert reply["content"] == PROSE
    assert speaker.both(ask(PRODUCT))["content"] == PROSE


def test_without_tools_a_call_is_text(speaking: tuple[Served, ScriptedModel]) -> None:
    """As clients want it that read calls out of texts, such as Qwen-Agent."""
    reply = says(speaking, f"<think>\nHm.\n</think>\n\n{CALL}").both(ask(PRODUCT))
    assert (reply["content"], reply["finish_reason"]) == (CALL, "stop")
    assert "tool_calls" not in reply


@pytest.mark.parametrize("separate", [True, False])
def test_a_stop_string_acts_behind_the_thought_alone(speaking: tuple[Served, ScriptedModel], separate: bool) -> None:
    speaker = says(speaking, "<think>\nstop here\n</think>\n\nGo on, stop here, no further")
    reply = speaker.both(ask(stop=["stop here", "</think>"], separate_reasoning=separate))
    answer = "Go on, "
    if separate:
        assert (reply["reasoning_content"], reply["content"]) == ("stop here", answer)
    else:
        assert reply["content"] == f"<think>\nstop here\n</think>\n\n{answer}"
    assert (reply["finish_reason"], reply["stop_reason"]) == ("stop", "stop here")


@pytest.mark.parametrize("separate", [True, False])
def test_a_cut_inside_the_thought_doubles_and_halves_nothing(
    speaking: tuple[Served, ScriptedModel], separate: bool
) -> None:
    text = "<think>\nWell, <|im_start|>so</think>\n\nFive."
    tokenizer = speaking[0].engine.tokenizer
    tokens = tokenizer.encode(text)
    for most in range(1, len(tokens) + 1):
        reply = says(speaking, text).both(ask(max_tokens=most, separate_reasoning=separate))
        expected = parse_reply(tokenizer.decode(tokens[:most], skip_special_tokens=True), thinking=None)
        thought, content = expected.reasoning, expected.content
        if separate:
            assert (reply["reasoning_content"], reply["content"]) == (thought, content)
        else:
            closed = f"\n</think>\n\n{content}" if content else ""
            assert reply["content"] == (f"<think>\n{thought}{closed}" if thought else "")
        assert reply.get("ended_in_thought", False) is (not content)


def test_a_begun_answer_whose_thought_is_closed_is_content(speaking: tuple[Served, ScriptedModel]) -> None:
    begun = {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nThere are"}
    reply = says(speaking, " three.").both({"messages": [*ask()["messages"], begun]})
    assert reply["content"].strip() == "three."
    assert not reply["reasoning_content"]
    assert "ended_in_thought" not in reply


@pytest.mark.parametrize(
    ("text", "fields", "reason"),
    [("Hm, so", {}, "stop"), ("", {}, "stop"), ("Hm, so" * 9, {"limit": 4}, "length"), ("Hm", {"limit": 1}, "length")],
)
def test_an_answer_that_the_thought_has_taken_is_told_by_every_api(
    speaking: tuple[Served, ScriptedModel], text: str, fields: dict[str, int], reason: str
) -> None:
    speaker, most = says(speaking, f"<think>\n{text}"), fields.get("limit", 99)
    reply = speaker.both(ask(max_tokens=most))
    assert (reply["content"], reply["finish_reason"], reply["ended_in_thought"]) == ("", reason, True)
    assert bool(reply["reasoning_content"]) is (text != "" and most > 1)
    hidden = speaker.both(ask(max_tokens=most, include_reasoning=False))
    assert (hidden["content"], hidden["ended_in_thought"]) == ("", True)
    response = speaker.post({"input": "Hi", "max_output_tokens": most}, "/v1/responses")
    assert {item["type"] for item in response["output"]} <= {"reasoning"}
    assert response["ended_in_thought"] is True
    assert response["status"] == {"stop": "completed", "length": "incomplete"}[reason]
    thinking = {"type": "enabled", "budget_tokens": 1024}
    body = {"messages": ask()["messages"], "max_tokens": most, "thinking": thinking}
    message = speaker.post(body, "/v1/messages")
    assert {block["type"] for block in message["content"]} <= {"thinking"}
    assert message["ended_in_thought"] is True
    assert message["stop_reason"] == {"stop": "end_turn", "length": "max_tokens"}[reason]


def test_a_budget_that_took_all_still_lets_something_be_said(speaking: tuple[Served, ScriptedModel]) -> None:
    served = speaking[0]
    reply = served.post(ask(thinking_budget=2, max_tokens=60, temperature=0.0))["choices"][0]
    assert reply["message"]["content"]
    assert "ended_in_thought" not in reply


def test_whole_replies_say_nothing_of_an_end_in_thought(speaking: tuple[Served, ScriptedModel]) -> None:
    speaker = says(speaking, "<think>\nHm.\n</think>\n\nFive.")
    assert "ended_in_thought" not in speaker.both(ask())
    assert "ended_in_thought" not in speaker.post({"input": "Hi"}, "/v1/responses")
    assert "ended_in_thought" not in speaker.post({**ask(), "max_tokens": 50}, "/v1/messages")
